"""Hidden states that other programs computed: vLLM, or any that writes arrays. See docs/reference/cache_format.md."""

from __future__ import annotations

import abc
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import read_json
from .computing_states import BackboneStates

if TYPE_CHECKING:
    import datasets

    from ..models.base import CapsuleHeadPreTrainedModel

STATES, TOKENS = "hidden_states", "token_ids"  # tensors of vLLM's files
MANIFEST = "arrays.json"  # of arrays
N_CHECKED = 16  # texts whose states are compared with the backbone's own
MOST_DIFFERENT = 0.1  # the norm of the difference by that of the states: half precision is below, other layers above


class StatesOfTokens(abc.ABC):
    """Hidden states in files, found by the tokens of their text.

    Attributes:
        place: the folder, for messages.
    """

    place: str

    @abc.abstractmethod
    def tokens(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield where each text is, and its tokens."""

    @abc.abstractmethod
    def read(self, where: Any) -> Tensor:
        """Return the states of a text, `[tokens, layers, hidden_size]`."""

    @functools.cached_property
    def index(self) -> Mapping[bytes, Any]:
        """Where each text is, by its tokens."""
        return {np.asarray(tokens, np.int64).tobytes(): where for where, tokens in self.tokens()}

    def of(self, tokens: list[int]) -> Tensor:
        """Return the states of a text by its tokens.

        Raises:
            ValueError: If there are none.
        """
        where = self.index.get(np.asarray(tokens, np.int64).tobytes())
        if where is None:
            raise ValueError(
                f"{self.place} has no hidden states of a text with the tokens {tokens!s:.60}...; expected those of "
                "all texts, cut to the same length and with the same special tokens."
            )
        return self.read(where)


class FilesOfVllm(StatesOfTokens):
    """A folder where vLLM's extraction of hidden states has left a safetensors file for each text."""

    def __init__(self, folder: Path) -> None:
        self.place, self.paths = str(folder), sorted(folder.rglob("*.safetensors"))

    def tokens(self) -> Iterator[tuple[Path, np.ndarray]]:
        """See `StatesOfTokens.tokens`."""
        for path in self.paths:
            yield path, self._get(path, TOKENS).numpy()

    def read(self, where: Path) -> Tensor:
        """See `StatesOfTokens.read`."""
        return self._get(where, STATES)

    def _get(self, path: Path, name: str) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read ({error}); expected a file of vLLM, with {STATES} and {TOKENS}."
            ) from None


class Arrays(StatesOfTokens):
    """A folder of NumPy arrays, mapped into memory, with a file that names them."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        about = read_json(folder / MANIFEST)
        names = ("states", "tokens", "lengths")
        for name in names:
            if not isinstance(about.get(name), str):
                raise ValueError(
                    f"{folder / MANIFEST} has {name} {about.get(name)!r}; expected the name of a .npy file."
                )
        self._states, self._tokens, lengths = (np.load(folder / about[name], mmap_mode="r") for name in names)
        self.ends = np.cumsum(lengths)
        n = int(self.ends[-1]) if len(lengths) else 0
        if self._states.ndim != 3 or len(self._states) != n or self._tokens.shape != (n,):
            raise ValueError(
                f"{folder} has states {list(self._states.shape)} and tokens {list(self._tokens.shape)} of texts with "
                f"{n:,} tokens together; expected [tokens, layers, hidden_size] and [tokens]."
            )

    def tokens(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        """See `StatesOfTokens.tokens`."""
        start = 0
        for end in self.ends.tolist():
            yield (start, end), self._tokens[start:end]
            start = end

    def read(self, where: tuple[int, int]) -> Tensor:
        """See `StatesOfTokens.read`."""
        return torch.tensor(self._states[slice(*where)])


class ImportedStates:
    """The hidden states of texts from files, which were compared with the backbone's own on some of the texts.

    Args:
        folder: of files of vLLM, or of arrays.
        model: with the backbone. The states have its layers in use, in order.
        own: the backbone's own states.
        texts: those that are wanted.

    Attributes:
        is_normalized: whether the states of the last layer were normalised before they were written. vLLM's are not:
            the backbone's own norm is applied to them.

    Raises:
        OSError: If there is no such folder.
        ValueError: If states are missing, of another shape, or differ from the backbone's own.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: CapsuleHeadPreTrainedModel,
        own: BackboneStates,
        texts: datasets.Dataset,
    ) -> None:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"There is no folder {path} of hidden states to import.")
        self._files = Arrays(path) if (path / MANIFEST).exists() else FilesOfVllm(path)
        self._shape = len(model.config.layers), model.config.hidden_sizes[model.config.layers[0]]
        self._norm: nn.Module | None = None
        self._check(model, own, texts)

    @property
    def is_normalized(self) -> bool:
        """Whether the states of the last layer need no norm."""
        return self._norm is None

    @torch.inference_mode()
    def __call__(self, texts: Mapping[str, list], n_tokens: int) -> Tensor:
        """Return the states of texts, one after another, `[tokens, layers, hidden_size]`.

        Raises:
            ValueError: If a text has none, or they have another shape.
        """
        masks = texts.get("attention_mask") or [[1] * len(ids) for ids in texts["input_ids"]]
        found = []
        for ids, mask in zip(texts["input_ids"], masks):
            tokens = [token for token, is_there in zip(ids, mask) if is_there]
            states = self._files.of(tokens).float()
            if states.shape != (len(tokens), *self._shape):
                raise ValueError(
                    f"{self._files.place} has states {list(states.shape)} of a text; expected "
                    f"{[len(tokens), *self._shape]}: its tokens, the layers in use, and the hidden size. Choose the "
                    "layers that were written with --layers."
                )
            found.append(states)
        packed = torch.cat(found)
        if self._norm is not None:
            packed[:, -1] = _normalize(self._norm, packed[:, -1])
        return packed

    def _check(self, model: CapsuleHeadPreTrainedModel, own: BackboneStates, texts: datasets.Dataset) -> None:
        """Compare the states of some texts, from the first to the last, with the backbone's own."""
        rows = np.unique(np.linspace(0, len(texts) - 1, min(N_CHECKED, len(texts))).astype(int))
        batches = [texts[int(row) : int(row) + 1] for row in rows]
        n_tokens = [sum(x["attention_mask"][0]) if "attention_mask" in x else len(x["input_ids"][0]) for x in batches]
        expected = torch.cat([own(*x).float().cpu() for x in zip(batches, n_tokens)])
        found = torch.cat([self(*x) for x in zip(batches, n_tokens)])
        differences = _differences(found, expected)
        if differences[-1] > MOST_DIFFERENT and max(differences[:-1], default=0.0) <= MOST_DIFFERENT:
            assert model.backbone is not None  # it has made `expected`
            self._norm = _find_norm(model.backbone, found[:, -1], expected[:, -1])
            if self._norm is not None:
                return
        for layer, difference in zip(model.config.layers, differences):
            if not difference <= MOST_DIFFERENT:
                raise ValueError(
                    f"The states in {self._files.place} differ from the backbone's own at layer {layer}, by "
                    f"{difference:.0%} in {len(rows)} texts; expected {MOST_DIFFERENT:.0%} at most: they are of other "
                    "layers, in another order, or of another backbone."
                )


def _differences(found: Tensor, expected: Tensor) -> list[float]:
    """Return, for each layer, the norm of the difference by that of the states."""
    return [float((x - y).norm() / y.norm()) for x, y in zip(found.unbind(1), expected.unbind(1))]


def _find_norm(backbone: nn.Module, found: Tensor, expected: Tensor) -> nn.Module | None:
    """Return the norm of a backbone that makes the expected states of its last layer from those found."""
    for name, module in reversed(list(backbone.named_modules())):
        is_of_all_layers = not any(part.isdecimal() for part in name.split("."))
        is_of_size = all(x.shape == found.shape[-1:] for x in module.parameters())  # a norm may have none
        if "norm" in type(module).__name__.lower() and is_of_all_layers and is_of_size:
            (difference,) = _differences(_normalize(module, found)[:, None], expected[:, None])
            if difference <= MOST_DIFFERENT:
                return module
    return None


@torch.inference_mode()
def _normalize(norm: nn.Module, states: Tensor) -> Tensor:
    """Apply a norm to states on the CPU, with the dtype and on the device of its weights, if it has any."""
    return norm(states.to(next(norm.parameters(), states))).float().cpu()
