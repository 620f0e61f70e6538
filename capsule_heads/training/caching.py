"""Hidden states of all splits of a dataset, computed by one process or several, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ..data.computing_states import BackboneStates, compute
from ..data.imported_states import ImportedStates
from ..data.state_folder import StateFolder
from ..data.state_keys import find_folder
from ..engines import Actors
from ..engines.states import compute_on_ray
from .arguments import CapsuleTrainingArguments
from .run import DataArguments, ModelArguments, TrainingRun


class CachedSplit(NamedTuple):
    """A split whose hidden states are cached.

    Attributes:
        name: the split's name.
        folder: the folder with its states.
        missing: number of shards that are left to other processes.
    """

    name: str
    folder: StateFolder
    missing: int


def cache_states(
    data: DataArguments,
    model: ModelArguments,
    head_options: Mapping[str, Any],
    arguments: CapsuleTrainingArguments,
    part: tuple[int, int] | None = None,
    batch_tokens: int = 2048,
    actors: Actors | None = None,
    import_states: str | None = None,
) -> list[CachedSplit]:
    """Compute the hidden states of all splits, for training with the same options.

    Args:
        data: options of the data, and of where and how the states are kept.
        model: options of the model.
        head_options: options of the head.
        arguments: transformers' training arguments. Under `accelerate launch` each process takes its part.
        part: number of this process, from 0 on, and number of all processes, if they are not launched together. This
            process does not wait for the others.
        batch_tokens: number of tokens, with padding, in one forward pass of the backbone.
        actors: actors of a Ray cluster that compute the states; None to compute them in this process.
        import_states: folder of hidden states that another program has computed, to keep instead of computing any; see
            `ImportedStates`.

    Raises:
        ValueError: If options do not fit the data, or the states cannot be cached.
        TypeError: If the head has no such option.
        OSError: If data or backbone is not found, or the disk has too little space.
        ImportError: If a package that the backbone needs is not installed.
    """
    if model.adapt is not None:
        raise ValueError(
            f"adapt is {model.adapt}, which trains the backbone, so that each run has its own states; leave it out."
        )
    run = TrainingRun(data.without_cache(), model, head_options, arguments)
    if run.task.modality != "text":
        raise ValueError(
            f"{run.task.name} is of {run.task.data.noun}; expected texts, as only their states are cached."
        )
    # PreTrainedModel.to has no type. Actors put the model on a device themselves.
    nn.Module.to(run.model, arguments.device if actors is None else "cpu")
    mine = part or (arguments.process_index, arguments.world_size)
    found = []
    for name, split in {"train": run.train_data, **run.validation, **run.tests}.items():
        texts, folder = find_folder(split, run.model, run.processor, data.cache_dir, data.states_dtype)
        if not folder.is_complete():
            rows = texts.select(split, run.processor)
            own = BackboneStates(run.model, run.collator)
            if actors is not None:
                compute_on_ray(folder, rows, own, batch_tokens, actors)
            else:
                source = own if import_states is None else ImportedStates(import_states, run.model, own, rows)
                compute(folder, rows, source, batch_tokens, mine, wait=part is None)
        found.append(CachedSplit(name, folder, len(folder.missing())))
    return found
