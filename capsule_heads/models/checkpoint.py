"""Checkpoints: how models are made from a backbone, loaded and saved, completely or not at all."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, PushToHubMixin

from ..backbones import Backbone, Part
from ..backbones.adapters import Adapters
from ..backbones.limits import check_windows
from ..backbones.loading import (
    BACKBONE_KWARGS,
    HUB_KWARGS,
    MismatchedShapes,
    check_model_type,
    is_quantised,
    reading_weights,
)
from ..backbones.parts import TEXT_INPUTS, check_main_input, main_input_name
from ..checks import check_dtype, check_memory
from ..heads import Head, get_head
from ..hub import check_backbone_is_shared, push_folder
from ..weights import same_weights, sample_weights
from .configuration_capsule_head import CapsuleHeadConfig, check_not_quantised, option_names

REPOSITORY_KWARGS = (*HUB_KWARGS, "revision", "subfolder")  # where a checkpoint of ours is
# Fields of the configuration that the model knows better, and what the signature of __init__ has beside fields.
SET_BY_MODEL = {
    "adapters",
    "base_config",
    "base_model_name_or_path",
    "base_model_revision",
    "head_only",
    "kwargs",
    "self",
}
UNFINISHED = "unfinished-model"  # the folder, in a model's, of the files that are being written


class CheckpointModel(PreTrainedModel):
    """A backbone and a head that are loaded and saved together, or the head alone.

    Args:
        config: the model's configuration.
        n_out: number of the head's outputs; None for a head that stops at the parts.
        backbone: the loaded backbone; None to build one with random weights.
        build: False to build none where none is given.
        backbone_dtype: dtype of a backbone that is built; None for that of its configuration.
        trust_backbone_code: whether to run code that came with the backbone, to build it.

    Attributes:
        head: the head.
        backbone: the backbone; None for a model that was loaded with `load_backbone=False`, which takes hidden states.
        adapters: what `training.adapt` added to the weights of the backbone that the configuration refers to; None
            where it added nothing.
        main_input_name: the input that the backbone takes, as a field of transformers' models.
    """

    config_class = CapsuleHeadConfig
    config: CapsuleHeadConfig
    base_model_prefix = "backbone"
    backbone_inputs: tuple[str, ...] = TEXT_INPUTS  # a backbone's main input is one of these
    head: Head
    backbone: PreTrainedModel | None
    adapters: Adapters | None

    def __init__(
        self,
        config: CapsuleHeadConfig,
        n_out: int | None,
        backbone: PreTrainedModel | None,
        build: bool = True,
        backbone_dtype: torch.dtype | str | None = None,
        trust_backbone_code: bool = False,
    ) -> None:
        hidden_sizes = hidden_sizes_in_use(config)
        super().__init__(config)
        # The head comes first: a model's dtype and device are those of its first parameter, and the head's are saved.
        make_head, options = get_head(config.head_type), config.head_options.as_dict()
        check_memory(lambda: make_head(hidden_sizes=hidden_sizes, n_out=n_out, **options), options)
        self.head = make_head(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        self.adapters = Adapters(config.adapters) if config.adapters else None
        if backbone is None and build:
            config.head_only = False  # the backbone made here is random, not the one that the reference names
            backbone = config.backbone.build(backbone_dtype, trust_remote_code=trust_backbone_code)
        if config.windowing is not None and not set(TEXT_INPUTS) & set(self.backbone_inputs):
            raise ValueError("window_length is for texts, and this model takes none; leave it out.")
        self._set_backbone(backbone)

    def _set_backbone(self, backbone: PreTrainedModel | None) -> None:
        if backbone is not None:
            check_main_input(backbone, self.backbone_inputs)
            check_windows(self.config.windowing, backbone)
            if is_quantised(backbone) and not self.config.freeze_backbone:
                raise ValueError(
                    "A quantised backbone cannot be trained: leave it frozen (freeze_backbone=True), with or without "
                    "adapters of PEFT in it."
                )
            self._weights_as_loaded = sample_weights(backbone)
            self.main_input_name = main_input_name(backbone)
        self.backbone = backbone
        self.freeze()

    def freeze(self) -> None:
        """Freeze the backbone, if the configuration says so: no gradients, and no dropout."""
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.requires_grad_(False)
            self.backbone.eval()

    def add_adapters(self, adapters: Adapters) -> None:
        """Add trained adapters to the backbone's weights, and save them with the head from now on.

        Where the backbone is not one that the configuration refers to, it is saved with the head, changed as it is.

        Raises:
            ValueError: If adapters were added before, or the backbone has no such linear layers.
        """
        config, backbone = self.config, self.backbone
        if self.adapters is not None:
            raise ValueError("This model has adapters already; expected one whose backbone is as it was loaded.")
        assert backbone is not None  # `adapt` refuses a model without one
        refers = config.head_only and same_weights(backbone, self._weights_as_loaded)
        adapters.add_to(backbone)
        if refers:
            self.adapters, config.adapters = adapters.to(backbone.device), adapters.shapes
            self._weights_as_loaded = sample_weights(backbone)

    @property
    def has_adapters(self) -> bool:
        """Whether PEFT has put adapters into the model."""
        # PEFT sets this on the model that it puts adapters into, and takes it off when it takes them out.
        return any(hasattr(module, "peft_config") for module in (self, self.backbone))

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel,
        *,
        num_labels: int | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put a new head on a pretrained backbone.

        Args:
            name_or_path: the backbone: a model on the Hub, a local directory, or `package:NAME/FOLDER` for one that
                comes inside an installed Python package; or a configuration, for one with random weights; or a loaded
                model of transformers, which is used as it is (without its head and pooler) and saved with the head.
            num_labels: number of classes; default 2, or that of `id2label`.
            revision: the backbone's branch, tag or commit.
            **kwargs: fields of `CapsuleHeadConfig`, such as `layers` or `freeze_backbone`, options of the head, and
                arguments of loading a backbone: `dtype`, `device_map`, `attn_implementation`, `quantization_config`,
                `token`, `cache_dir`, `trust_remote_code`, ... The head is never quantised.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If the backbone's hidden states are not `[batch, tokens, hidden_size]` or feature maps, it takes
                other inputs than this model, or a field has no such value.
            TypeError: If an argument is unknown.
            OSError: If the backbone is not found.
        """
        loading = {name: kwargs.pop(name) for name in BACKBONE_KWARGS if name in kwargs}
        check_dtype(loading.get("dtype", loading.get("torch_dtype")))
        check_config_kwargs(kwargs)
        if num_labels is not None:
            kwargs["num_labels"] = num_labels
        backbone, module = Backbone.find(
            name_or_path,
            cls.backbone_inputs,
            revision=revision,
            part=Part(kwargs.pop("stack", "encoder"), kwargs.pop("tower", None)),
            hidden_sizes=kwargs.pop("hidden_sizes", None),
            **loading,
        )
        config = CapsuleHeadConfig(**backbone.fields(), **kwargs)
        model = cls(config, backbone=module)  # type: ignore[call-arg]  # the classes that are built choose n_out themselves
        model._refer_to_backbone(config.freeze_backbone and config.base_model_name_or_path is not None)
        model.head.to(module.device)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: CapsuleHeadConfig | str | os.PathLike[str] | None = None,
        load_backbone: bool = True,
        trust_backbone_code: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint that `save_pretrained` wrote, and the backbone it refers to where it holds the head alone.

        Args:
            pretrained_model_name_or_path: the checkpoint, on the Hub or in a directory.
            *model_args: as in transformers.
            config: a configuration to use instead of the checkpoint's, or where to load it from.
            load_backbone: False to leave out the backbone of a head-only checkpoint: the model takes hidden states.
            trust_backbone_code: whether to run code that comes with the backbone, from its own repository;
                `trust_remote_code`, an argument of the auto classes, is about this checkpoint's alone.
            output_loading_info: whether to return what transformers says of the weights too.
            **kwargs: as in transformers. `quantization_config` is of the backbone alone; by default it is that which
                the backbone had when the head was saved.

        Returns:
            The model, in evaluation mode; with `output_loading_info`, a pair of it and a dictionary.

        Raises:
            ValueError: If the checkpoint is of another kind of model, lacks weights or has the backbone's where they
                are to be quantised, or the backbone has code of its own that is not trusted.
            MismatchedShapes: If weights have other shapes than the configuration makes them, as in transformers; with
                `ignore_mismatched_sizes=True` these start from random values.
            OSError: If the checkpoint, or the backbone it refers to, is not found or cannot be read. Of the checkpoint,
                nothing but safetensors files is read.
        """
        source = pretrained_model_name_or_path
        loaded: Any
        if source is None:  # with a state_dict, as transformers' own tools do
            loaded = super().from_pretrained(None, *model_args, config=config, output_loading_info=True, **kwargs)
            check_weights("The state_dict", loaded[1], may_differ=True)
            loaded[0].freeze()
            return loaded if output_loading_info else loaded[0]
        loading_kwargs = {k: kwargs.pop(k) for k in (*BACKBONE_KWARGS, *REPOSITORY_KWARGS) if k in kwargs}
        check_dtype(loading_kwargs.get("dtype", loading_kwargs.get("torch_dtype")))
        loading_kwargs["trust_remote_code"] = trust_backbone_code  # an auto class has seen to the checkpoint's own
        kwargs["trust_backbone_code"] = trust_backbone_code  # the configuration and __init__ go by it
        config, kwargs = load_config(source, config, loading_kwargs, kwargs)
        check_not_quantised(vars(config).get("quantization_config"))
        backbone_kwargs = {name: loading_kwargs[name] for name in BACKBONE_KWARGS if name in loading_kwargs}
        # transformers would take one in the backbone's configuration to be for the head too.
        quantization_config = vars(config.backbone.config).pop("quantization_config", None)
        backbone_kwargs.setdefault("quantization_config", quantization_config)
        if loading_kwargs.pop("quantization_config", None) is not None and not config.head_only:
            raise ValueError(
                f"quantization_config is for a backbone, and {source} has the weights of backbone and head in one; "
                "expected a checkpoint saved with head_only=True."
            )
        dtype = backbone_kwargs.setdefault("dtype", backbone_kwargs.pop("torch_dtype", config.base_config.dtype))
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        loading_kwargs["use_safetensors"] = True  # a head is never saved as a pickle, which could execute code
        with reading_weights(source, loading_kwargs.get("subfolder", "")):
            loaded = super().from_pretrained(
                source,
                *model_args,
                config=config,
                build=not config.head_only,
                backbone_dtype=None if dtype == "auto" else dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_weights says more clearly which they are
                **loading_kwargs,
                **kwargs,
            )
        model, loading_info = loaded
        check_weights(source, loading_info, may_differ)
        if config.head_only and load_backbone:
            loading_info["mismatched_keys"].update(model._load_backbone(source, backbone_kwargs, may_differ))
        elif config.head_only and quantization_config is not None:
            model.config.base_config.quantization_config = quantization_config
        model.freeze()  # the weights that were loaded are new parameters
        model.eval()
        return (model, loading_info) if output_loading_info else model

    def _load_backbone(
        self, source: str | os.PathLike[str], loading: dict[str, Any], may_differ: bool
    ) -> list[tuple[str, Any, Any]]:
        """Load the backbone, and return its weights that are random, by their names in the model, and their shapes."""
        config = self.config
        try:
            backbone, module, mismatched = config.backbone.load(may_differ=may_differ, **loading)
        except OSError as error:
            revision = f" (revision {config.base_model_revision})" if config.base_model_revision else ""
            raise OSError(
                f"{source} holds a head alone, and its backbone {config.base_model_name_or_path}{revision} could not "
                f"be loaded: {error} Pass base_model_name_or_path=... (and base_model_revision=...) if it is elsewhere "
                "now, or load_backbone=False."
            ) from error
        config.base_config = backbone.config
        if self.adapters is not None:
            self.adapters.add_to(module)
        self._set_backbone(module)
        self.post_init()  # again, now that there is a backbone: it collects the backbone's tied weights and the like
        self._refer_to_backbone(config.freeze_backbone and not mismatched)
        return [(f"backbone.{key}", *shapes) for key, *shapes in mismatched]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        head_only: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as in transformers, but all files or none, and the head alone where the backbone is elsewhere.

        Args:
            save_directory: the directory to write to.
            is_main_process: as in transformers, as are the next and all that are not here.
            state_dict: weights to save instead of the model's.
            push_to_hub: whether to push to the Hub what was saved.
            *args: as in transformers.
            head_only: True to write the head and the reference to its backbone, False to write all weights. None for
                the head alone if the backbone is, unchanged, the one that the configuration refers to.
            **kwargs: as in transformers. With `distributed_checkpoint=True` all processes write to one directory, in
                place.

        Raises:
            OSError: If the directory cannot be written to, or its disk is full; what was there is as it was.
            ValueError: If `head_only=True` and the backbone's weights are not those of its reference, if
                `head_only=False` and there is no backbone, or if the model has adapters of PEFT.
        """
        if os.path.isfile(save_directory):  # of which transformers would say so in its log, and return
            raise NotADirectoryError(f"{save_directory} is a file; expected a directory to save to.")
        config = self.config
        if self.has_adapters:
            raise ValueError(
                "This model has adapters of PEFT in it, which would be lost: save the PeftModel (with "
                'modules_to_save=["head"], the head is in it too), or call its merge_and_unload() first.'
            )
        refers = config.head_only and (config.freeze_backbone or self.backbone is None)
        if refers and self.backbone is not None:
            refers = same_weights(self.backbone, self._weights_as_loaded)  # adapters may have been merged into it
        if head_only and not refers:
            raise ValueError(
                "head_only=True would lose the backbone: its weights were trained here, or are not from a checkpoint "
                "that the configuration refers to. Save all weights, with head_only=False."
            )
        refers_now = refers if head_only is None else head_only
        if head_only is False and self.backbone is None:
            raise ValueError("head_only=False needs the backbone, and this model was loaded with load_backbone=False.")
        if not refers_now and is_quantised(self.backbone):
            raise ValueError(
                "The weights of a quantised backbone are not saved; save the head alone, or merge adapters into a "
                "backbone that was loaded without quantization_config."
            )
        if self.backbone is not None:
            config.base_config.dtype = self.backbone.dtype
        if not self.is_remote_code():
            vars(config).pop("auto_map", None)  # of a checkpoint with code, from which this one was loaded
        self._refer_to_backbone(refers_now)
        is_first = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
        in_place = kwargs.get("distributed_checkpoint") or not (is_main_process and is_first)
        try:
            directory = Path(save_directory)
            with contextlib.nullcontext(directory) if in_place else replacing(directory) as folder:
                # transformers takes weights out of the dictionary as it writes them.
                weights = {**state_dict} if push_to_hub and state_dict else state_dict
                super().save_pretrained(folder, is_main_process, weights, False, *args, **kwargs)
            if push_to_hub:
                kwargs.setdefault("repo_id", Path(save_directory).name)
                with tempfile.TemporaryDirectory() as other:
                    super().save_pretrained(other, is_main_process, state_dict, True, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{save_directory} could not be written: {error}. What was there is as it was.") from error
        finally:
            self._refer_to_backbone(refers)

    def push_to_hub(  # type: ignore[override]  # transformers' own also takes arguments of repositories without a card
        self,
        repo_id: str,
        *,
        processor: PushToHubMixin | None = None,
        head_only: bool | None = None,
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> CommitInfo:
        """Push the model with a model card, in one commit.

        Args:
            repo_id: the repository, "name" or "owner/name"; created if it does not exist.
            processor: the model's tokenizer, image processor or feature extractor, to push with it.
            head_only: as in `save_pretrained`.
            max_shard_size: as in transformers.
            **options: those of `hub.push_run` after `repo_id`, and `results`, which that reads from the directory.

        Returns:
            The commit.

        Raises:
            ValueError: If a head alone refers to a backbone that others cannot have.
            OSError: If pushing fails; the repository is then as it was.
        """
        config = self.config
        refers = config.head_only if head_only is None else head_only
        check_backbone_is_shared(config.base_model_name_or_path, refers)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, head_only=head_only, max_shard_size=max_shard_size)
            if processor is not None:
                processor.save_pretrained(folder)
            return push_folder(Path(folder), repo_id, **options)

    def _refer_to_backbone(self, refers: bool) -> None:
        # Whether the backbone is left out when the model is saved, because the configuration says where to get it.
        self.config.head_only = refers
        left_out = list(self.backbone.state_dict()) if refers and self.backbone is not None else []
        # Trainer, too, goes by this list: it then expects a checkpoint without these weights.
        self._keys_to_ignore_on_save = {f"backbone.{key}" for key in left_out}

    def names_of_frozen_backbone(self) -> list[str]:
        """Return the names of parameters and buffers of a frozen backbone that is not saved with the head."""
        if self.backbone is None or not (self.config.head_only and self.config.freeze_backbone):
            return []
        tensors = (*self.backbone.named_parameters(), *self.backbone.named_buffers())
        return [f"backbone.{name}" for name, tensor in tensors if not tensor.requires_grad]


@contextlib.contextmanager
def replacing(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to write a model to; at the end its files replace those of an earlier model in a directory.

    An error leaves the directory as it was. A process that is killed does so too, or, within the moment in which files
    are renamed, leaves it without a config.json, so that nothing loads what is of two models.

    Args:
        directory: of the model; made if it is not there. Files that the model does not have stay, except for weights.
    """
    directory = Path(directory)
    unfinished = directory / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        paths = [path for path in unfinished.rglob("*") if path.is_file()]
        for path in paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # some disks say only here that they are full
        _replace(directory, [path.relative_to(unfinished) for path in paths])
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _replace(directory: Path, names: list[Path]) -> None:
    for name in names:  # while there may yet be no room for a folder
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    if Path(CONFIG_NAME) in names:
        (directory / CONFIG_NAME).unlink(missing_ok=True)
    weights = {_weights_name(path.name) for path in names if path.suffix == ".safetensors"}
    for path in list(directory.iterdir()):  # transformers would load one file rather than several, whichever is new
        if path.is_file() and _weights_name(path.name) in weights and Path(path.name) not in names:
            path.unlink()
    for name in sorted(names, key=lambda name: name == Path(CONFIG_NAME)):
        (directory / UNFINISHED / name).replace(directory / name)


def _weights_name(name: str) -> str:
    """Return `model.safetensors` for itself, for its parts `model-00001-of-00002.safetensors`, and for their index."""
    name = re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", name)
    return re.sub(r"\.safetensors\.index(\.[^.]+)?\.json$", r"\1.safetensors", name)


def load_config(
    source: str | os.PathLike[str],
    config: CapsuleHeadConfig | str | os.PathLike[str] | None,
    loading_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[CapsuleHeadConfig, dict[str, Any]]:
    """Load the configuration of a checkpoint of ours.

    Args:
        source: the checkpoint.
        config: a `CapsuleHeadConfig` to use instead of the checkpoint's, or where to load it from, or None.
        loading_kwargs: those of `REPOSITORY_KWARGS` say where the checkpoint is.
        kwargs: the other arguments of `from_pretrained`; those that are fields of the configuration are set in it.

    Returns:
        The configuration, and the arguments that are not its fields.

    Raises:
        ValueError: If checkpoint or configuration are of another kind of model.
    """
    repository_kwargs = {name: loading_kwargs[name] for name in REPOSITORY_KWARGS if name in loading_kwargs}
    config_dict, _ = CapsuleHeadConfig.get_config_dict(source, **repository_kwargs)
    check_model_type(config_dict, source)
    loaded: Any
    if isinstance(config, PreTrainedConfig):
        check_model_type({"model_type": config.model_type}, "The config that was given")
        loaded = config, kwargs
    else:
        loaded = CapsuleHeadConfig.from_pretrained(
            source if config is None else config, return_unused_kwargs=True, **repository_kwargs, **kwargs
        )
    return loaded


def hidden_sizes_in_use(config: CapsuleHeadConfig) -> list[int]:
    """Return the sizes of the hidden states that the head takes; find all and set them, if the configuration has none.

    Raises:
        ValueError: If the configuration has no backbone, or the sizes do not follow from its configuration.
    """
    if not config.backbone.hidden_sizes:
        config.set_hidden_sizes(config.backbone.probe().hidden_sizes)
    return [config.hidden_sizes[layer] for layer in config.layers]


def check_weights(source: str | os.PathLike[str], loading_info: dict[str, Any], may_differ: bool) -> None:
    """Refuse a checkpoint that left weights random.

    Args:
        source: the checkpoint.
        loading_info: what transformers says of its keys.
        may_differ: whether weights may have other shapes than the configuration makes them, and those of the head be
            missing; these are then random.

    Raises:
        ValueError: If weights are missing.
        MismatchedShapes: If they have another shape.
    """
    missing, mismatched = loading_info["missing_keys"], sorted(loading_info["mismatched_keys"])
    lacking = sorted(key for key in missing if key.startswith("backbone."))
    if lacking:
        raise ValueError(
            f"{source} lacks {len(lacking)} weights of the backbone, among them {lacking[0]}; expected a "
            "complete checkpoint, or one saved with head_only=True."
        )
    if may_differ:
        return
    remedy = "expected its own configuration, or ignore_mismatched_sizes=True to start from random values with these"
    if mismatched:
        key, found, expected = mismatched[0]
        raise MismatchedShapes(
            f"{source} has {key} of shape {tuple(found)}, where the configuration makes it {tuple(expected)}, and "
            f"{len(mismatched) - 1} more such weights; {remedy}."
        )
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of the head, among them {min(missing)}; {remedy}.")


def check_config_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse keyword arguments that are no field of `CapsuleHeadConfig`, or not one to set by hand.

    transformers would keep unknown ones, unused.

    Raises:
        TypeError: If an argument is unknown.
    """
    known = {*inspect.signature(CapsuleHeadConfig.__init__).parameters, *vars(PreTrainedConfig()), "num_labels"}
    known |= option_names()
    unknown = sorted(set(kwargs) - (known - SET_BY_MODEL))
    if unknown:
        raise TypeError(f"Unknown arguments {', '.join(unknown)}; expected fields of CapsuleHeadConfig.")
