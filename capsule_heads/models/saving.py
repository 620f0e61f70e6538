"""Saving models: the head alone or all weights, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from ..weights import same_weights
from .loading import is_quantised

UNFINISHED = "unfinished-model"  # the folder, in a model's, of the files that are being written


@contextlib.contextmanager
def replacing(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to write a model to; at the end its files go to a directory, in the place of an earlier model's.

    An error leaves the directory as it was. A process that is killed does so too, or, within the moment in which files
    are renamed, leaves it without a config.json, so that nothing loads what is of two models.

    Args:
        directory: the model's; made if it is not there. What the model has no file of stays, but for weights.
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
    if Path(CONFIG_NAME) in names:
        (directory / CONFIG_NAME).unlink(missing_ok=True)
    weights = {_weights_name(path.name) for path in names if path.suffix == ".safetensors"}
    for path in list(directory.iterdir()):  # transformers would load one file rather than several, whichever is new
        if path.is_file() and _weights_name(path.name) in weights and Path(path.name) not in names:
            path.unlink()
    for name in sorted(names, key=lambda name: name == Path(CONFIG_NAME)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / UNFINISHED / name).replace(directory / name)


def _weights_name(name: str) -> str:
    """`model.safetensors` of itself, of its parts `model-00001-of-00002.safetensors`, and of their index."""
    name = re.sub(r"-\d{5}-of-\d{5}(?=\.safetensors$)", "", name)
    return re.sub(r"\.safetensors\.index(\.[^.]+)?\.json$", r"\1.safetensors", name)


class SavingMixin:
    """How models are saved: the head alone, where its backbone's weights can be had, or all weights."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        head_only: bool | None = None,
        **kwargs,
    ) -> None:
        """Saves as in transformers, but all files or none; the backbone too, or only where its weights can be had.

        Args:
            save_directory: where to.
            is_main_process: as in transformers, as are the next and all that are not here.
            state_dict: weights to save in the place of the model's.
            push_to_hub: whether to push to the Hub what was saved.
            *args: as in transformers.
            head_only: True to write the head and the reference to its backbone, False to write all weights. None for
                the head alone if the backbone is, unchanged, the one that the configuration refers to.
            **kwargs: as in transformers. With `distributed_checkpoint=True` all processes write to one directory, in
                place.

        Raises:
            OSError: if the directory cannot be written to, or its disk is full; what was there is as it was.
            ValueError: for `head_only=True` where the backbone's weights are not those of its reference, for
                `head_only=False` where there is no backbone, and for a model with adapters of PEFT.
        """
        if os.path.isfile(save_directory):  # of which transformers would say so in its log, and return
            raise NotADirectoryError(f"{save_directory} is a file; expected a directory to save to.")
        config = self.config
        if self._has_adapters:
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
            with contextlib.nullcontext(save_directory) if in_place else replacing(save_directory) as folder:
                # transformers takes weights out of the dictionary as it writes them.
                weights = {**state_dict} if push_to_hub and state_dict else state_dict
                super().save_pretrained(folder, is_main_process, weights, False, *args, **kwargs)
            if push_to_hub:
                kwargs.setdefault("repo_id", Path(save_directory).name)
                with tempfile.TemporaryDirectory() as folder:
                    super().save_pretrained(folder, is_main_process, state_dict, True, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{save_directory} could not be written: {error}. What was there is as it was.") from error
        finally:
            self._refer_to_backbone(refers)

    def _refer_to_backbone(self, refers: bool) -> None:
        # Whether the backbone is left out when the model is saved, because the configuration says where to get it.
        self.config.head_only = refers
        left_out = self.backbone.state_dict() if refers and self.backbone is not None else ()
        # Trainer, too, goes by this list: it then expects a checkpoint without these weights.
        self._keys_to_ignore_on_save = {f"backbone.{key}" for key in left_out}

    def names_of_frozen_backbone(self) -> list[str]:
        """Parameters and buffers that no training changes, as the configuration says where to get them."""
        if self.backbone is None or not (self.config.head_only and self.config.freeze_backbone):
            return []
        tensors = (*self.backbone.named_parameters(), *self.backbone.named_buffers())
        return [f"backbone.{name}" for name, tensor in tensors if not tensor.requires_grad]
