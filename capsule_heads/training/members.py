"""The heads of a sweep. All get the same batches, and each has its own weights, optimizer, schedule and draws."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, set_seed

from ..mixup import draw_mixup
from .arguments import CapsuleTrainingArguments
from .trainer import CapsuleTrainer

if TYPE_CHECKING:
    from ..models.modeling_capsule_head import CapsuleHeadClassifier


@dataclass(frozen=True)
class Combination:
    """One setting of a sweep: a head, its options, and what differs in its training.

    Attributes:
        head_type: name of the head.
        options: options of the head that were given.
        settings: training arguments, and `mixup_alpha` and `layers` of the model, by name.
    """

    head_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = {**self.options, **self.settings}
        return ", ".join([self.head_type, *(f"{name}={value}" for name, value in values.items())])


@dataclass(frozen=True)
class Gradients:
    """The results of a member's forward and backward pass.

    Attributes:
        gradients: clipped gradient of each trainable parameter; None where the loss does not depend on it.
        check: a number that is finite if loss and gradients are.
    """

    gradients: Sequence[Tensor | None]
    check: Tensor


class Member:
    """One head of a sweep, and the state of its training.

    It ends with the weights that `CapsuleTrainer` gives with the same arguments. Its loss, optimizer, schedule and
    settings are those of its own `CapsuleTrainer`, and it draws random numbers in the same way.

    Args:
        combination: its head, options and settings.
        model: a classifier without a backbone, made with the member's seed.
        trainer: new trainer of the model.
        places: indices of the model's hidden states among the cached ones; None for all of them.

    Attributes:
        seed: random seed of its initial weights and of its draws.
        fault: why its training has ended, in words; None while it trains.
        steps: number of steps that it has taken.
        seconds: seconds that its steps took, if they were taken one by one.
        found: its metrics by split, as last measured.
        outputs: logits `[batch, num_labels]` and loss of each batch that was predicted since the last clearing.
    """

    def __init__(
        self,
        combination: Combination,
        model: CapsuleHeadClassifier,
        trainer: CapsuleTrainer,
        places: Sequence[int] | None = None,
    ) -> None:
        self.combination, self.model, self.trainer = combination, model, trainer
        self.args: Any = trainer.args
        self.seed: int = self.args.seed
        self.fault: str | None = None
        self.steps = 0
        self.seconds = 0.0
        self.found: dict[str, dict[str, float]] = {}
        self.outputs: list[tuple[Tensor, float]] = []
        self._generator_state = torch.get_rng_state()  # transformers' Trainer has just seeded it
        self._draws = True  # until a step shows that it does not
        self._places = places
        self._parameters: list[nn.Parameter] = []

    def prepare(self, n_steps: int) -> None:
        """Make the optimizer and the schedule.

        Args:
            n_steps: number of steps of the training.
        """
        self.trainer.create_optimizer_and_scheduler(n_steps)
        self._parameters = [x for x in self.model.parameters() if x.requires_grad]
        self.model.train()

    def start_epoch(self) -> None:
        """Draw what a data loader draws at the beginning of an epoch: the seed of its workers."""
        with self._own_generator():
            torch.empty((), dtype=torch.int64).random_()

    def select(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with the hidden states of this member's layers alone."""
        return _take(batch, self._places)

    def step(self, batch: Mapping[str, Any]) -> None:
        """Take a step of training.

        Args:
            batch: `hidden_states` `[batch, tokens, layers, hidden_size]`, `attention_mask` and `labels`.
        """
        start = time.perf_counter()
        with self._own_generator() if self._draws else contextlib.nullcontext():
            found = self.differentiate(batch)
        gradients = found.gradients
        if not found.check.isfinite():
            if self.args.on_nonfinite == "stop":
                self.fault = f"step {self.steps + 1}: not finite"
                return
            gradients = [None] * len(gradients)
        self.update(gradients)
        self.seconds += time.perf_counter() - start

    def differentiate(self, batch: Mapping[str, Any], draws: tuple[Tensor, Tensor] | None = None) -> Gradients:
        """Compute the gradients of a batch's loss, without waiting for the device.

        Args:
            batch: see `step`.
            draws: random numbers of mixup, from `draw_mixup`; None to draw them here.
        """
        trainer = self.trainer
        self.model.mixup_draws = draws
        try:
            with trainer.compute_loss_context_manager():
                loss: Any = trainer.compute_loss(self.model, self.select(batch))
        finally:
            self.model.mixup_draws = None
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        norm = torch.nn.utils.get_total_norm([x for x in gradients if x is not None])
        if self.args.max_grad_norm:
            self._set_gradients(gradients)
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.args.max_grad_norm, norm)
            self._set_gradients([None] * len(gradients))
        return Gradients(gradients, norm + loss.detach() * 0)

    def draw_mixup(self, n_samples: int) -> tuple[Tensor, Tensor]:
        """Draw mixup's random numbers for a batch, as a step draws them."""
        with self._own_generator():
            return draw_mixup(n_samples, self.model.config.mixup_alpha, self.args.device)

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """Let the optimizer and the schedule take a step.

        Args:
            gradients: one for each trainable parameter; None for a parameter that stays as it is.
        """
        optimizer, schedule = self.trainer.optimizer, self.trainer.lr_scheduler
        assert optimizer is not None and schedule is not None  # prepare has made them
        self._set_gradients(gradients)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        self.steps += 1

    def _set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> None:
        """Keep the model's logits and loss of a batch, for `measure`."""
        with self.trainer.compute_loss_context_manager():
            output = self.model.eval()(**self.select(batch))
        self.outputs.append((output.logits.float().cpu(), float(output.loss)))
        self.model.train()

    def measure(self, labels: np.ndarray) -> dict[str, float]:
        """Return the loss and the metrics of the batches that `predict` has kept."""
        sizes = [len(logits) for logits, _ in self.outputs]
        loss = float(np.average([loss for _, loss in self.outputs], weights=sizes))
        logits = torch.cat([logits for logits, _ in self.outputs]).numpy()
        compute = self.trainer.compute_metrics
        return {"loss": loss, **(compute(EvalPrediction(logits, labels)) if compute is not None else {})}

    @contextlib.contextmanager
    def _own_generator(self) -> Iterator[None]:
        """Draw from torch's generator as if this member were alone, and find out whether it draws at all."""
        before = self._generator_state
        torch.set_rng_state(before)
        yield
        self._generator_state = torch.get_rng_state()
        self._draws = self.steps == 0 or not torch.equal(before, self._generator_state)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the classifier, which has no backbone."""
        return {name: x.detach().cpu() for name, x in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a member can resume."""
        optimizer, schedule = self.trainer.optimizer, self.trainer.lr_scheduler
        assert optimizer is not None and schedule is not None
        return {
            "model": self.weights(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "generator": self._generator_state,
            "steps": self.steps,
            "seconds": self.seconds,
            "fault": self.fault,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a member of the same sweep."""
        optimizer, schedule = self.trainer.optimizer, self.trainer.lr_scheduler
        assert optimizer is not None and schedule is not None
        self.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        self._generator_state, self.fault = state["generator"], state["fault"]
        self.steps, self.seconds = state["steps"], state["seconds"]


def _take(batch: Mapping[str, Any], places: Sequence[int] | None) -> dict[str, Any]:
    return dict(batch) if places is None else {**batch, "hidden_states": batch["hidden_states"][:, :, places]}


class CollatorOfLayers:
    """Makes batches of some of the cached layers.

    Args:
        collator: makes batches of all cached layers.
        places: indices of the layers among the cached ones.
    """

    def __init__(self, collator: Callable[[list], Mapping[str, Any]], places: Sequence[int]) -> None:
        self.collator, self.places = collator, places

    def __call__(self, features: list) -> dict[str, Any]:
        """Return a batch."""
        return _take(self.collator(features), self.places)


def make_member(
    combination: Combination,
    seed: int,
    arguments: CapsuleTrainingArguments,
    base: CapsuleHeadClassifier,
    layers: Sequence[int] | None,
    data_collator: Callable[[list], Mapping[str, Any]],
    **of_trainer: Any,
) -> Member:
    """Make a member of a sweep, with the head that a separate run would make.

    Args:
        combination: its head, options and settings.
        seed: random seed of its initial weights and of its draws.
        arguments: training arguments of all members, before the settings and the seed of this one.
        base: a classifier for the same data and all cached hidden states; its head may be another.
        layers: the layers that were asked for; None for all layers, or for the last if the head takes one layer.
        data_collator: makes batches of all cached hidden states.
        **of_trainer: other arguments of `CapsuleTrainer`.

    Raises:
        ValueError: If a value is not what its option expects.
        TypeError: If the head has no such option.
    """
    config = base.config.to_dict()
    for name in base.config.head_options.names():
        config.pop(name, None)
    settings = dict(combination.settings)
    config |= {"mixup_alpha": settings.pop("mixup_alpha", base.config.mixup_alpha), "linear_term": None}
    layers = settings.pop("layers", layers)
    config |= {"head_type": combination.head_type, "layers": layers, **combination.options}
    set_seed(seed)
    model = type(base)(type(base.config).from_dict(config), build=False)
    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    own = dataclasses.replace(arguments, **settings, seed=seed, data_seed=data_seed)
    places: list[int] | None = [base.config.layers.index(layer) for layer in model.config.layers]
    if places == list(range(len(base.config.layers))):
        places = None
    collator = data_collator if places is None else CollatorOfLayers(data_collator, places)
    return Member(combination, model, CapsuleTrainer(model, own, data_collator=collator, **of_trainer), places)
