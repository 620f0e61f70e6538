"""Checks that keep numbers that are not finite out of the weights, and name their source."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import Trainer

from .arguments import CapsuleTrainingArguments
from .capsule_model import find_capsule_model

logger = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # buffers of batch normalisation
COMPLETE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # each process has all gradients
NOTHING = "nothing when the last batch was run again, without mixup"
MOST = 4  # names, or samples, in a message


class StepCheck:
    """Checks the losses of a step, and its gradients before they reach the weights.

    It reads one number from the device per step: whether all losses and the norm of the gradients are finite. The
    Trainer's own filter of logged losses reads two per batch. `filter_loss` replaces that filter, and reads none.

    All processes come to the same decision. Gradients whose norm overflows count as not finite: Trainer divides by the
    norm, and that gives NaN. With a gradient scaler (fp16), gradients may overflow as long as its scale is above 1,
    because it skips such steps itself. DeepSpeed takes its step before gradients can be read, so only the loss is
    checked there, after the step.

    Args:
        trainer: the trainer whose steps are checked.

    Attributes:
        norm: the norm of the step's gradients, once they are found finite; None if they are scaled, or spread over
            processes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches: list[tuple[Tensor, Mapping[str, Any]]] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._statistics: list[tuple[list[Tensor], list[Tensor]]] = []
        self._is_prepared = False
        self._shown: Tensor | None = None
        self.norm: Tensor | None = None

    def _find_tensors(self) -> None:
        """Find the model's parameters and its batch statistics, and make copies of the statistics."""
        model = self._trainer.model
        assert model is not None  # CapsuleTrainer refuses to be made without one
        self._parameters = dict(model.named_parameters())
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # one launch copies all tensors of a kind
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in STATISTICS:
                by_kind.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        self._statistics = [(buffers, [x.clone() for x in buffers]) for buffers in by_kind.values()]
        self._is_prepared = True

    def before_training(self) -> None:
        """Forget the model's tensors: modules may have been added or replaced since the last training."""
        self._is_prepared = False

    def before_batch(self) -> None:
        """Copy the batch statistics before the forward pass of a step's first batch."""
        if self._batches:  # not the first of the step
            return
        self.norm = None
        if not self._is_prepared:  # once, as a backbone has many modules
            self._find_tensors()
        for buffers, copies in self._statistics:
            torch._foreach_copy_(copies, buffers)

    def after_batch(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Keep a batch and its loss, after its backward pass, until the step's last batch."""
        self._batches.append((loss, inputs))

    def filter_loss(self, loss: Tensor) -> Tensor:
        """Return the loss, or the last finite loss if this one is not finite. The log shows a mean of these."""
        last = torch.zeros_like(loss) if self._shown is None else self._shown
        self._shown = torch.where(loss.isfinite(), loss, last)
        return self._shown

    def after_last_batch(self, model: nn.Module) -> None:
        """Check the losses and the gradients of a step, after its last batch.

        Args:
            model: the model with its wrappers.

        Raises:
            FloatingPointError: If something is not finite and steps are not to be skipped, or if weights are not
                finite, which skipping steps does not repair.
        """
        batches, parameters = self._batches, self._parameters
        self._batches = []
        gradients = {f"the gradient of {name}": x.grad for name, x in parameters.items() if x.grad is not None}
        losses = torch.stack([loss for loss, _ in batches])
        norm = torch.nn.utils.get_total_norm([_local(x) for x in gradients.values()])
        # NaN unless all losses are finite. Squares of norms can be summed over processes.
        found = losses.mul(0).sum() + norm.to(losses.device).float().square()
        accelerator = self._trainer.accelerator
        if accelerator.reduce(found).isfinite():  # the one read of the step
            self.norm = norm if self._has_gradients(gradients.values()) else None
            return
        bad_losses = int(accelerator.reduce(losses.isfinite().logical_not().sum()))
        if not bad_losses and self._scaler_skips_the_step():
            return
        for buffers, copies in self._statistics:
            torch._foreach_copy_(buffers, copies)
        # All processes take the same branch, as the model may be spread over them.
        broken = gather_object(_places(parameters))
        of_gradients = [] if bad_losses else _places(gradients)
        inputs = next((inputs for loss, inputs in batches if not loss.isfinite()), batches[-1][1])
        places = broken or gather_object(self._of_process(self._in_batch(model, inputs) + of_gradients))
        what = "loss" if bad_losses else "norm of the gradients"
        step = self._trainer.state.global_step + 1
        message = f"Step {step}: the {what} is not finite. Not finite: {_listed(places) or NOTHING}."
        if broken:
            raise FloatingPointError(f"{message} These weights are lost; go back to an earlier checkpoint.")
        args = self._trainer.args
        if not (isinstance(args, CapsuleTrainingArguments) and args.on_nonfinite == "skip"):
            raise FloatingPointError(
                f"{message} The weights are as before this step. Correct the data, or skip such steps with "
                'on_nonfinite="skip".'
            )
        logger.warning("%s The step is skipped.", message)
        self._drop(parameters.values())

    def _has_gradients(self, gradients: Iterable[Tensor]) -> bool:
        """Return whether this process has all gradients, neither spread over processes nor scaled."""
        accelerator = self._trainer.accelerator
        has_all = accelerator.distributed_type in COMPLETE and not any(hasattr(x, "to_local") for x in gradients)
        return has_all and accelerator.scaler is None

    def _scaler_skips_the_step(self) -> bool:
        scaler = self._trainer.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _in_batch(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[str]:
        with self._trainer.compute_loss_context_manager():
            prepared = self._trainer._prepare_inputs(dict(inputs))
            return find_nonfinite(model, prepared, find_capsule_model(self._trainer.model).config.layers)

    def _of_process(self, places: list[str]) -> list[str]:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return places
        return [f"{place} (process {accelerator.process_index})" for place in places]

    def _drop(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if self._trainer.accelerator.scaler is None:
                parameter.grad = None  # an optimizer then leaves the parameter and its state as they are
            elif parameter.grad is not None:
                parameter.grad.fill_(math.nan)  # the scaler needs gradients, and skips the step for these


@torch.no_grad()
def find_nonfinite(model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int]) -> list[str]:
    """Run a capsule-head model on a batch in evaluation mode, and return what is not finite, and in which samples.

    Args:
        model: the model, perhaps wrapped. It is left in evaluation mode.
        inputs: inputs of its forward pass.
        layers: the layers in use.

    Returns:
        The inputs that are not finite. If all are finite, the hidden states that are not, by layer. If those are finite
        too, the logits, with the largest hidden state.
    """
    outputs = model.eval()(**inputs, output_hidden_states=True)  # in all processes, whatever each of them finds
    tensors = {f"the input {name}": x for name, x in inputs.items() if isinstance(x, Tensor)}
    tensors.pop("the input hidden_states", None)
    found = _places(tensors, of_samples=True)
    if found:
        return found
    states = {f"the hidden state at layer {layer}": x for layer, x in zip(layers, outputs.hidden_states)}
    found = _places(states, of_samples=True)
    if found:
        return found
    largest = max((float(x.abs().max()) for x in outputs.hidden_states if x.numel()), default=0.0)
    return [
        f"{place} (hidden states are finite, up to {largest:.1e})"
        for place in _places({"the logits": outputs.logits}, of_samples=True)
    ]


def _places(tensors: Mapping[str, Tensor], of_samples: bool = False) -> list[str]:
    """Return the names of tensors that are not finite, and in how many of their numbers, or in which samples."""
    places = []
    for name, tensor in tensors.items():
        bad = ~_local(tensor).isfinite()
        if not bad.any():
            continue
        rows = bad.flatten(1).any(1) if of_samples and bad.ndim > 1 else bad
        samples = [str(int(i)) for i in rows.nonzero()[:, 0]] if of_samples else []
        where = f"in samples {_listed(samples)}" if of_samples else f"in {int(bad.sum()):,} of {bad.numel():,} numbers"
        places.append(f"{name} {where}")
    return places


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is spread over several (FSDP)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
