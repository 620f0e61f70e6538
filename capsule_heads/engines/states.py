"""Hidden states by a Ray cluster: actors hold the backbone, and write shards themselves."""

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
    """What an actor says of a shard that is written: the states themselves stay where they are.

    Attributes:
        shard: its number.
        texts: how many it has.
        tokens: how many they have.
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
    """Compute the shards of a folder that are not there yet, by the actors of a Ray cluster.

    Shards hold the same bits as those of one process. An actor that dies is started again, with the shard it had. A run
    that was stopped goes on with the shards that are missing.

    Args:
        folder: of the states, in a place that all actors reach under the same name.
        texts: the folder's, in its order.
        source: the backbone, which is sent to each actor.
        batch_tokens: tokens, with padding, to run the backbone on at once.
        actors: how many, and of what kind.

    Raises:
        ImportError: If Ray is not installed.
        OSError: If there is no cluster, not enough disk, or actors write elsewhere.
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
            f"{len(lost)} of {folder.n_shards} shards are not in {folder.place}, though actors have written them: they "
            "do not share that folder; expected a cache_dir that all machines reach, such as s3://bucket/folder."
        )


@dataclass(frozen=True)
class _MakeWorker:
    """Makes what an actor does with the texts of a shard."""

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
