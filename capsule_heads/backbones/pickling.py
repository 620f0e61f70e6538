"""Pickling a model: traces of earlier runs are left out, and another process makes what it lacks again."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import output_capturing

from .probe import TRIED

# Attributes that hold only in this process and version of transformers: hooks are in place, and how indices are read.
OF_THE_PROCESS = ("_output_capturing_hooks_installed", TRIED)


def without_recording(module: nn.Module, copies: dict[nn.Module, Any] | None = None) -> Any:
    """Return a shallow copy of a module and its submodules, without transformers' hooks that record outputs.

    The hooks are local functions, which cannot be pickled. The next run adds new ones. Tensors are shared.

    Args:
        module: the module, which is not changed.
        copies: copies made so far, by module.
    """
    copies = {} if copies is None else copies
    if module not in copies:
        copies[module] = copy = object.__new__(type(module))
        fields = {name: value for name, value in vars(module).items() if name not in OF_THE_PROCESS}
        hooks = fields["_forward_hooks"]
        kept = (item for item in hooks.items() if getattr(item[1], "__module__", "") != output_capturing.__name__)
        fields["_forward_hooks"] = type(hooks)(kept)
        fields["_modules"] = {
            name: None if child is None else without_recording(child, copies) for name, child in module._modules.items()
        }
        vars(copy).update(fields)
    return copies[module]


def register_recording(model: nn.Module) -> None:
    """Register which outputs each module can record, as transformers does when it builds a module."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs
