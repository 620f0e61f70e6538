"""A backbone: its source, its part of a model, and how it is loaded, probed and run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from .loading import (
    MismatchedShapes,
    check_fields,
    check_quantisation,
    load_backbone_config,
    reading_weights,
    reference_of,
    resolve_backbone,
)
from .parts import (
    AUDIO_INPUTS,
    ENCODER,
    IMAGE_INPUTS,
    Inputs,
    Part,
    Windowing,
    check_main_input,
    check_part,
    part_of,
    tower_config,
)
from .probe import probe_hidden_sizes, probe_hidden_sizes_without_weights, selects
from .running import BackboneOutput, run_backbone
from .windows import run_in_windows

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True)
class Backbone:
    """The description of a backbone, without its weights.

    Attributes:
        config: the configuration of the model that is loaded.
        name_or_path: the source of the weights: a name on the Hub, a directory, or `package:NAME/FOLDER` inside an
            installed Python package; None for a backbone with random weights.
        revision: the commit of the weights, if they are on the Hub.
        part: the part of the model that is the backbone.
        windowing: the windows that texts are cut into; None to run on complete texts.
        hidden_sizes: size of each hidden state, the embedding output included; empty until it is known.

    Raises:
        ValueError: If the model has no such part.
    """

    config: PreTrainedConfig
    name_or_path: str | None = None
    revision: str | None = None
    part: Part = ENCODER
    windowing: Windowing | None = None
    hidden_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_part(self.part, self.config)

    @classmethod
    def find(
        cls,
        name_or_path: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
        main_inputs: Sequence[str],
        *,
        revision: str | None = None,
        part: Part = ENCODER,
        hidden_sizes: Sequence[int] | None = None,
        **loading: Any,
    ) -> tuple[Backbone, PreTrainedModel]:
        """Load the part of a model that takes some inputs, and find the sizes of its hidden states.

        In a model of several towers, the backbone is the first of `candidates` that runs on these inputs alone.

        Args:
            name_or_path: the attribute `name_or_path`, a configuration or a loaded model. A backbone from a
                configuration has random weights. The weights of a loaded model have no name.
            main_inputs: the kinds of input that the backbone may take; it has to run on one of them alone.
            revision: branch, tag or commit.
            part: the part to use; a tower of None chooses one.
            hidden_sizes: the sizes, if they are known; None to run the backbone once.
            **loading: arguments of `BACKBONE_KWARGS`.

        Returns:
            The backbone, and the loaded module.

        Raises:
            ValueError: If no part of the model runs on these inputs, or its hidden states have an unknown layout.
            OSError: If there is no such checkpoint.
            TypeError: If arguments of loading are given with a loaded model, or with a configuration.
        """
        from transformers.modeling_utils import PreTrainedModel  # here: see candidates

        loaded: Any = None
        dtype = loading.get("dtype", loading.get("torch_dtype"))
        if isinstance(name_or_path, PreTrainedConfig):
            without_effect = [name for name in loading if name not in ("dtype", "torch_dtype", "trust_remote_code")]
            if without_effect or revision is not None:
                given = ", ".join([*without_effect, *(["revision"] if revision is not None else [])])
                raise TypeError(
                    f"{given} given with a configuration; expected a name to load, or a field set in the configuration."
                )
            backbone = cls(name_or_path, part=part)
        elif isinstance(name_or_path, PreTrainedModel):
            if loading or revision is not None:
                given = ", ".join([*loading, *(["revision"] if revision is not None else [])])
                raise TypeError(f"{given} given with a loaded {type(name_or_path).__name__}; expected a name to load.")
            loaded = name_or_path.base_model  # without a head
            backbone = cls(loaded.config, part=part)
        else:
            config, commit = load_backbone_config(name_or_path, revision, **loading)
            backbone = cls(config, reference_of(name_or_path), commit, part)
        first_error: ValueError | None = None
        for choice in backbone.candidates(main_inputs):
            try:
                if loaded is not None:
                    module = part_of(loaded, choice.part)
                elif choice.name_or_path is None:
                    module = choice.build(
                        None if dtype == "auto" else dtype, trust_remote_code=loading.get("trust_remote_code", False)
                    )
                else:
                    choice, module, _ = choice.load(**loading)
                check_main_input(module, main_inputs)
                sizes = tuple(hidden_sizes or probe_hidden_sizes(module, choice.part.stack))
                return dataclasses.replace(choice, hidden_sizes=sizes), module
            except ValueError as error:
                first_error = first_error or error
        assert first_error is not None  # there is always a candidate
        raise first_error

    def candidates(self, main_inputs: Sequence[str]) -> list[Backbone]:
        """Return the parts of the model that may be the backbone for some inputs, the likeliest first.

        For images and audio, a model of several towers gives its tower for them. For text, the complete model comes
        first, as language models with a vision tower run on text alone, and then the text tower (as in CLIP). A tower
        is loaded by itself if transformers has a class for it, or else taken out of the complete model.
        """
        from transformers import MODEL_MAPPING  # here, as configurations import this file, and need no models

        kind = {IMAGE_INPUTS: "vision", AUDIO_INPUTS: "audio"}.get(tuple(main_inputs), "text")
        tower = tower_config(self.config, kind)
        if self.part.tower is not None or tower is None:
            return [self]
        towers = [dataclasses.replace(self, part=self.part._replace(tower=kind))]
        if type(tower) in MODEL_MAPPING:
            towers.insert(0, dataclasses.replace(self, config=tower))
        return towers if kind == "vision" else [self, *towers] if kind == "text" else [*towers, self]

    def build(self, dtype: torch.dtype | str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
        """Build the backbone with random weights, without parts that a head does not need. Keep the configuration.

        Args:
            dtype: dtype of the weights; None for the dtype in the configuration.
            trust_remote_code: whether to run code that its configuration names, from the repository of its weights.

        Raises:
            ValueError: If no model can be built from the configuration's values.
        """
        from transformers import MODEL_MAPPING, AutoModel

        if dtype is not None:
            self.config.dtype = dtype
        self._check_fields()
        is_known = type(self.config) in MODEL_MAPPING  # then no code is loaded, and from_config passes the keyword on
        code_kwargs = {"code_revision": self.revision} if trust_remote_code and not is_known else {}
        try:
            complete = AutoModel.from_config(self.config, trust_remote_code=trust_remote_code, **code_kwargs)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            reason = " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])  # torch adds a trace
            raise ValueError(
                f"A backbone of type {self.config.model_type} cannot be built from its configuration ({reason})."
            ) from error
        return part_of(complete, self.part)

    def load(
        self, *, may_differ: bool = False, **loading: Any
    ) -> tuple[Backbone, PreTrainedModel, list[tuple[str, Any, Any]]]:
        """Load the backbone's weights.

        Args:
            may_differ: whether weights may have other shapes than the configuration requires; these are then random.
            **loading: arguments of `BACKBONE_KWARGS`.

        Returns:
            The backbone, with a configuration to build it from again; the module; and for each weight that is random
            its name, its shape in the checkpoint and its shape here.

        Raises:
            ValueError: If the checkpoint is itself a capsule-head model, or lacks weights of the backbone.
            MismatchedShapes: If weights have other shapes than the configuration requires.
            OSError: If there is no such checkpoint.
        """
        from transformers import AutoModel

        if self.name_or_path is None:
            raise ValueError(f"The {self.config.model_type} backbone has random weights, and no checkpoint to load.")
        self._check_fields()
        check_quantisation(loading.get("quantization_config"), f"Loading {self.name_or_path}")
        own_config, commit = load_backbone_config(self.name_or_path, self.revision, **loading)
        source = resolve_backbone(self.name_or_path)
        if hasattr(own_config, "quantization_config"):  # it says that the checkpoint itself is quantised
            self.config.quantization_config = own_config.quantization_config
        loading = {"trust_remote_code": False, **loading}  # transformers would ask on the terminal
        with reading_weights(source):
            complete, found = AutoModel.from_pretrained(
                source,
                config=self.config,
                revision=commit or self.revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the error below names differences in one sentence
                **loading,
            )
        module = part_of(complete, self.part)
        used = {id(tensor): key for key, tensor in module.state_dict(keep_vars=True).items()}
        state_dict = complete.state_dict(keep_vars=True)
        missing = sorted(key for key in found["missing_keys"] if key in state_dict and id(state_dict[key]) in used)
        if missing:
            raise ValueError(
                f"The checkpoint of {source} has no weights for {len(missing)} tensors of the "
                f"{complete.config.model_type} backbone, among them {missing[0]}; expected a checkpoint with all of "
                "them."
            )
        mismatched = [
            (used[id(state_dict[key])], tuple(there), tuple(here))
            for key, there, here in sorted(found["mismatched_keys"])
            if key in state_dict and id(state_dict[key]) in used
        ]
        if mismatched and not may_differ:
            key, there, here = mismatched[0]
            raise MismatchedShapes(
                f"The checkpoint of {source} has {key} of shape {there}, where the configuration of the backbone makes "
                f"it {here}, and {len(mismatched) - 1} more such weights; expected its own configuration, or "
                "from_pretrained with ignore_mismatched_sizes=True to start from random values with these."
            )
        return dataclasses.replace(self, config=complete.config), module, mismatched

    def probe(self) -> Backbone:
        """Return the backbone with the sizes of its hidden states, found without weights.

        The backbone is built on the meta device and run on tensors that have shapes and no data.

        Raises:
            ValueError: If the backbone does not run on a text, an image or audio alone.
        """
        self._check_fields()
        return dataclasses.replace(self, hidden_sizes=tuple(probe_hidden_sizes_without_weights(self.config, self.part)))

    def _check_fields(self) -> None:
        check_fields(self.config, f"The configuration of the {self.config.model_type} backbone")

    def run(
        self,
        module: PreTrainedModel,
        layers: Sequence[int],
        inputs: Inputs,
        *,
        trains: bool = False,
        output_attentions: bool = False,
    ) -> BackboneOutput:
        """Run the backbone on a batch, in windows if texts are longer than one window.

        Args:
            module: the loaded backbone.
            layers: indices of the hidden states to return, ascending.
            inputs: inputs by our names; inputs that are None are left out.
            trains: whether to keep a graph for the gradients of the backbone.
            output_attentions: whether to return the backbone's attentions too.

        Returns:
            The hidden states at these layers, their masks, and all attentions if requested.

        Raises:
            ValueError: If inputs or hidden states do not fit the configuration, or there are no attentions.
        """
        # Not inference_mode: the head's affine map keeps its input for the gradient of its weight, and autograd cannot
        # save inference tensors. A clone of every state would cost more than the mode saves.
        gradients: AbstractContextManager[None] = nullcontext() if trains else torch.no_grad()
        stack = self.part.stack
        by_index = selects(module, stack, layers, self.hidden_sizes)
        with gradients:
            run = partial(run_backbone, module, layers, self.hidden_sizes, stack, by_index, output_attentions)
            output = run_in_windows(run, self.windowing, inputs)
        if output_attentions and output.attentions is None:
            raise ValueError(
                "output_attentions is True, and texts are longer than window_length, so each window has "
                "attentions of its own; pass shorter texts, or leave output_attentions out."
            )
        return output

    def fields(self) -> dict[str, Any]:
        """Return the fields of a `CapsuleHeadConfig` that describe the backbone."""
        fields: dict[str, Any] = {
            "base_config": self.config,
            "base_model_name_or_path": self.name_or_path,
            "base_model_revision": self.revision,
            "hidden_sizes": list(self.hidden_sizes),
            **self.part._asdict(),
        }
        if self.windowing is not None:
            fields |= {
                "window_length": self.windowing.length,
                "window_overlap": self.windowing.overlap,
                "window_special_tokens": [self.windowing.n_before, self.windowing.n_after],
            }
        return fields
