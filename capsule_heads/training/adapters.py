"""`adapt`: train adapters (LoRA) in a backbone that does not know a task, before the head is trained.

The loss is the supervised contrastive loss (Khosla et al., 2020) of the means of the tokens' hidden states: examples
of one class become alike, and unlike all others. The adapters are then added to the backbone's weights, and the head is
trained on the frozen backbone as usual.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_cosine_schedule_with_warmup
from transformers.trainer_utils import RemoveColumnsCollator

from ..backbones.adapters import Adapters, linear_layers, training_in
from ..backbones.loading import is_quantised
from ..data.splits import read_columns
from ..heads.linear import pool_tokens
from ..models.losses import infer_problem_type, problem_targets
from ..models.modeling_capsule_head import CapsuleHeadClassifier

LORA = "lora"
METHODS = (LORA,)

# Chosen on all-MiniLM-L6-v2 with 8 and 64 examples of each class; scripts/benchmarks/own_data.py measures them.
RANK = 16
LEARNING_RATE = 2e-3  # for `LEAST_STEPS`; for n steps, times the root of `LEAST_STEPS / n`
WARMUP = 0.1  # fraction of the steps
MAX_NORM = 1.0  # of the gradients
TEMPERATURE = 0.1
CHUNK = 16  # examples in a forward pass; their lengths are similar, so there is little padding
LEAST, MOST = CHUNK, 64  # examples in a step, which are compared with each other
MOST_TOKENS = 8192  # about, in a step: all of them are in memory at once
LEAST_STEPS, STEPS, MOST_STEPS = 12, 2.0, 400  # `STEPS` times the root of the number of examples, within two limits

logger = logging.getLogger(__name__)


class Examples(NamedTuple):
    """The examples that a backbone is adapted to.

    Attributes:
        size: number of examples in a step.
        rows: a dataset with a model's inputs and labels.
        collate: makes a batch of its rows.
        groups: indices of the rows by class; all in one group where a row may have several labels.
        lengths: length of each row, by which the rows of a step are sorted; all 0 if the dataset has no lengths.
    """

    size: int
    rows: Any
    collate: Callable[[list], Any]
    groups: list[list[int]]
    lengths: Sequence[int]

    @property
    def n_steps(self) -> int:
        """The number of steps: more passes over few examples than over many."""
        return min(max(LEAST_STEPS, round(STEPS * len(self.lengths) ** 0.5)), MOST_STEPS)

    def steps(self, seed: int) -> Iterator[list[int]]:
        """Yield the rows of each step, shortest first."""
        drawn = self._draw(random.Random(seed))
        for _ in range(self.n_steps):
            yield sorted(itertools.islice(drawn, self.size), key=self.lengths.__getitem__)

    def _draw(self, rng: random.Random) -> Iterator[int]:
        """Yield rows without end, two of each class in turn, so that rows of a rare class come again sooner."""
        left: list[list[int]] = [[] for _ in self.groups]
        while True:
            for index in rng.sample(range(len(left)), len(left)):
                for _ in range(2):
                    left[index] = left[index] or rng.sample(self.groups[index], len(self.groups[index]))
                    yield left[index].pop()


def adapt(
    model: CapsuleHeadClassifier,
    dataset: Any,
    collator: Callable[[list], Any] | None = None,
    *,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> None:
    """Adapt a model's frozen backbone to labelled examples, before the head is trained.

    Adapters of rank `RANK` are trained in all linear layers of the backbone, and added to their weights. If the
    backbone has a name, the saved model is the head and the adapters, a few megabytes; `from_pretrained` adds the
    adapters again. The log says in one line what was done.

    Args:
        model: the model, on the device to train on; its head is untouched.
        dataset: training data as a `CapsuleTrainer` takes it: prepared, with `labels`.
        collator: makes batches, as in a Trainer.
        seed: random seed of the order of the examples and of the adapters' initial matrices.
        checkpoint: checkpoint of a run that is resumed. Its adapters are loaded, and nothing is trained.

    Raises:
        ValueError: If the model has no backbone, or one that is trained, quantised or without linear layers; if the
            checkpoint has no adapters.
        FloatingPointError: If the loss is not finite.

    Example:
        >>> adapt(model, data["train"], CapsuleCollator(tokenizer))
        >>> CapsuleTrainer(model, arguments, train_dataset=data["train"], processing_class=tokenizer).train()
    """
    _check(model)
    if checkpoint is not None:
        _take_adapters(model, checkpoint)
        return
    start = time.perf_counter()
    examples = _examples(model, dataset, collator)
    adapters = _train(model, examples, seed).to(model.device)
    if dist.is_available() and dist.is_initialized():  # they train alike, up to the order of sums on a GPU
        for x in adapters.buffers():
            dist.broadcast(x, 0)
    model.add_adapters(adapters)
    logger.warning(
        "Adapted the backbone in %d steps of %d examples, and %.0f s: %d LoRA adapters of rank %d, %s numbers.",
        examples.n_steps,
        examples.size,
        time.perf_counter() - start,
        len(adapters.shapes),
        RANK,
        f"{sum(x.numel() for x in adapters.buffers()):,}",
    )


def _check(model: CapsuleHeadClassifier) -> None:
    backbone = model.backbone
    if backbone is None:
        raise ValueError("There is no backbone to adapt: load the model with load_backbone=True.")
    if not model.config.freeze_backbone:
        raise ValueError(
            "freeze_backbone is false, and adapters are for a backbone that is frozen; leave adapt out to train all of "
            "its weights, or set freeze_backbone to true."
        )
    if is_quantised(backbone):
        raise ValueError(
            "The backbone is quantised, and adapters cannot be added to its weights; load it without "
            "quantization_config, or put adapters of PEFT in it."
        )
    if model.config.problem_type == "regression":
        raise ValueError("adapt is for classes, and the labels are numbers; leave adapt out.")
    if not linear_layers(backbone):
        raise ValueError(_none_to_adapt(model))


def _none_to_adapt(model: CapsuleHeadClassifier) -> str:
    return (
        f"The {model.config.backbone.config.model_type} backbone has no linear layers on the way to its hidden states, "
        "where adapters would be added; leave adapt out, or train the backbone (freeze_backbone: false)."
    )


def _examples(model: CapsuleHeadClassifier, dataset: Any, collator: Callable[[list], Any] | None) -> Examples:
    columns = read_columns(dataset, ("labels", "length"))
    labels = columns["labels"]
    groups: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label if isinstance(label, int) else None, []).append(row)
    names = [*inspect.signature(model.forward).parameters, "labels"]
    collate = RemoveColumnsCollator(collator or default_data_collator, names)
    lengths = columns.get("length", [0] * len(labels))
    middle = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
    with torch.no_grad():
        states, _ = _run(model, collate([dataset[middle]]))
    most = min(MOST, max(LEAST, MOST_TOKENS // states[-1].shape[1]))
    return Examples(min(most, len(labels)), dataset, collate, list(groups.values()), lengths)


def _take_adapters(model: CapsuleHeadClassifier, checkpoint: str | os.PathLike[str]) -> None:
    """Add a checkpoint's adapters to a model. A complete checkpoint has none: Trainer loads its backbone."""
    saved = type(model).from_pretrained(checkpoint, load_backbone=False)
    if saved.adapters is not None:
        model.add_adapters(saved.adapters)
    elif saved.config.head_only:
        raise ValueError(f"adapt is {LORA}, and the backbone of {checkpoint} was not adapted; leave adapt out.")


def _train(model: CapsuleHeadClassifier, examples: Examples, seed: int) -> Adapters:
    """Train adapters on examples, and return them."""
    n_steps = examples.n_steps
    assert model.backbone is not None  # `_check` refuses others
    model.eval()
    with training_in(model.backbone, RANK, seed) as trained:
        parameters = [x for adapter in trained.values() for x in adapter.parameters()]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE * (LEAST_STEPS / n_steps) ** 0.5, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * n_steps), n_steps)
        for rows in examples.steps(seed):
            chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            loader = DataLoader(examples.rows, batch_sampler=chunks, collate_fn=examples.collate)
            means, targets = zip(*(_means(model, batch) for batch in loader))
            loss = contrastive_loss(torch.cat(means), torch.cat(targets))
            if not loss.requires_grad:
                raise ValueError(_none_to_adapt(model))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            if not math.isfinite(norm):
                raise FloatingPointError(
                    f"The loss is {loss.item():.3g}, and its gradients have the norm {norm:.3g}; leave adapt out."
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        changed = {name: (x.up, x.down) for name, x in trained.items() if x.up.count_nonzero()}
    return Adapters.of(changed)


def _means(model: CapsuleHeadClassifier, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return for each example the means of its tokens at the layers in use, scaled to length 1, and its targets."""
    labels = batch["labels"].to(model.device)
    means = [F.normalize(pool_tokens(x.float(), mask, "mean"), dim=-1) for x, mask in zip(*_run(model, batch))]
    return torch.cat(means, -1), problem_targets(model.config, infer_problem_type(model.config, labels), labels)


def _run(model: CapsuleHeadClassifier, batch: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    inputs = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    return model.compute_hidden_states(**{name: x for name, x in inputs.items() if name != "labels"})


def contrastive_loss(x: Tensor, targets: Tensor) -> Tensor:
    """Return the supervised contrastive loss: `-log` of the softmax over similarities, averaged over alike examples.

    Args:
        x: `[examples, features]`.
        targets: `[examples, labels]`, 0 or 1. Two examples are as alike as the cosine of their targets.
    """
    x, targets = F.normalize(x, dim=-1), F.normalize(targets, dim=-1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    log_shares = (x @ x.T / TEMPERATURE).masked_fill(itself, -1e9).log_softmax(-1)
    alike = (targets @ targets.T).masked_fill(itself, 0.0)
    total = alike.sum(-1)
    losses = -(alike * log_shares).sum(-1) / total.clamp_min(torch.finfo(total.dtype).tiny)
    return losses.sum() / total.count_nonzero().clamp_min(1)
