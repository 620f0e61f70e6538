"""Hidden states by a Ray cluster, whose actors hold the backbone and write shards themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.computing_states import BackboneStates, ShardComputer, progress_bar, texts_of
from ..data.state_folder import StateFolder
from .ray import Actors, run_on_ray

if TYPE_CHECKING:
    import datasets


class Written(NamedTuple):
    """An actor's report of a shard that it has written. The states themselves are not sent back.

    Attributes:
        shard: number of the shard.
        texts: number of its texts.
        tokens: number of its tokens.
    """

    shard: int
    texts: int
    tokens: int


def compute_on_ray(
    folder: StateFolder,
    texts: datasets.Dataset,
    source: BackboneStates,
    batch_tokens: int,
    actors: Actors,
) -> None:
    """Compute the missing shards of a folder, by the actors of a Ray cluster.

    Shards hold the same bits as those of one process. An actor that dies is restarted with its shard. A run that was
    stopped resumes with the missing shards.

    Args:
        folder: the folder of the states, in a place that all actors reach under the same name.
        texts: the folder's texts, in its order.
        source: the backbone, which is sent to each actor.
        batch_tokens: number of tokens, with padding, in one forward pass of the backbone.
        actors: the number of actors, and their GPUs.

    Raises:
        ImportError: If Ray is not installed.
        OSError: If there is no cluster or not enough disk space, or actors write elsewhere.
        ValueError: If states exceed the encoding.
    """
    folder.begin()
    missing = folder.missing()

    def pieces() -> Iterator[tuple[int, Any]]:
        for shard in missing:
            yield shard, texts_of(folder, shard, texts).with_format("arrow")[:]

    with progress_bar(folder, missing) as progress:
        for written in run_on_ray(_MakeWorker(folder, source, batch_tokens), pieces(), actors):
            progress.update(written.tokens)
    lost = folder.missing()
    if lost:
        raise OSError(
            f"{len(lost)} of {folder.n_shards} shards are not in {folder.place}, though actors have written them, so "
            "they do not share that folder; expected a cache_dir that all machines reach, such as s3://bucket/folder."
        )


@dataclass(frozen=True)
class _MakeWorker:
    """Makes the function by which an actor computes a shard from its texts."""

    folder: StateFolder
    source: BackboneStates
    batch_tokens: int

    def __call__(self) -> Any:
        import torch
        from datasets import Dataset

        if torch.accelerator.is_available():  # PreTrainedModel.to has no type
            torch.nn.Module.to(self.source.model.eval(), torch.accelerator.current_accelerator())
        computer = ShardComputer(self.folder, self.source, self.batch_tokens)

        def work(piece: tuple[int, Any]) -> Written:
            shard, table = piece
            with self.folder.claim(shard, wait=True) as is_ours:  # an actor that died may have written it
                if is_ours:
                    computer.compute(shard, Dataset(table))
            return Written(shard, len(table), self.folder.n_tokens([shard]))

        return work
