"""Many heads at once: every combination of settings, from several seeds, in one pass over cached hidden states."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging as transformers_logging

from ..data.state_folder import gigabytes
from ..files import read_json, write_json
from ..heads import get_head
from ..metrics import metric_names
from ..models.ensembles import make_ensemble
from ..tasks import Task
from .arguments import CapsuleTrainingArguments, word_of
from .capsule_model import settle_problem_type
from .checkpoints import LAST, UNFINISHED, delete, finish, locked, resolve_checkpoint, rotate, writing
from .crews import Batches, Crew, Tell, crews, file_of, number_of_processes
from .graphs import BRANCHES
from .members import Combination, Member, make_member
from .metrics import default_metric
from .recipe import settle_arguments
from .regression import Solutions
from .resume import describe_run
from .run import DataArguments, ModelArguments, TrainingRun
from .sweep_results import RESULTS, save

logger = logging.getLogger(__name__)

# What a grid may hold, beside the options of heads.
SETTINGS = ("learning_rate", "weight_decay", "label_smoothing_factor", "mixup_alpha")
LESS_IS_BETTER = ("loss", "mean_squared_error", "mean_absolute_error")
RUNGS = (0.25, 0.5)  # fractions of the steps after which halving keeps the better half of the combinations
SECONDS_BETWEEN_CHECKPOINTS = 300
EVALUATIONS = 0.1  # largest fraction of the time for evaluations during training, which show the best head so far
COPIES = 5  # numbers in memory for a weight: itself, its gradient, two moments, and a copy in the main process
STEPS_AT_A_TIME = 10  # steps that crews take before the progress is shown
BEST, ENSEMBLE = "best", "ensemble"  # folders of runs, in the sweep's folder
PLAN = "plan.json"  # in a checkpoint


@dataclass
class SweepArguments:
    """Options of a sweep: what it tries, and what it writes."""

    grid: dict[str, list[Any]] = field(
        default_factory=dict,
        metadata={"help": "Values to try of an option of the heads, or of " + ", ".join(SETTINGS) + "."},
    )
    heads: list[str] | None = field(
        default=None, metadata={"help": "Names of the heads to try, with commas between. Default: head_type."}
    )
    seeds: int = field(default=1, metadata={"help": "Number of random seeds of each combination, counted from seed."})
    halving: bool = field(
        default=False,
        metadata={
            "help": "Stop the worse half of the combinations after a quarter of the steps, and half of the rest after "
            "half of the steps (successive halving). Not for published results: it favours heads that learn fast."
        },
    )
    ensemble: int | None = field(
        default=None,
        metadata={"help": "Number of the best heads to save as one model too, which averages their probabilities."},
    )
    test_all: bool = field(
        default=False, metadata={"help": "Evaluate all heads on the test split, not only the one that is chosen."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume an interrupted sweep in output_dir."})

    def __post_init__(self) -> None:
        for name, value, least in (("seeds", self.seeds, 1), ("ensemble", self.ensemble, 2)):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more.")
        for name, values in self.grid.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"grid has {name}={values}; expected one value or more, each of them once.")


def combine(plan: SweepArguments, head_type: str, options: Mapping[str, Any]) -> list[Combination]:
    """Return every combination of a sweep: for each head, all values of the settings and of the options that it has.

    Args:
        plan: what to try.
        head_type: the head, if the plan names no heads.
        options: options of heads for all combinations whose head has them.

    Raises:
        ValueError: If a head is not registered, or a name in the grid is neither a head's option nor a setting.
    """
    heads = list(dict.fromkeys(plan.heads or [head_type]))
    known = {name: get_head(name).Options.names() for name in heads}
    for name in (*plan.grid, *options):
        if name not in SETTINGS and not any(name in names for names in known.values()):
            expected = sorted({*SETTINGS, *itertools.chain.from_iterable(known.values())})
            raise ValueError(f"{name} is no option of {', '.join(heads)}; expected one of {', '.join(expected)}.")
    combinations = []
    for head, names in known.items():
        axes = {name: values for name, values in plan.grid.items() if name in SETTINGS or name in names}
        common = {name: value for name, value in options.items() if name in names}
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            settings = {name: chosen.pop(name) for name in SETTINGS if name in chosen}
            get_head(head).make_options({**common, **chosen})  # refuses what does not fit, before anything is loaded
            combinations.append(Combination(head, {**common, **chosen}, settings))
    return combinations


class Sweep:
    """Train every combination of settings from several seeds, in one pass over the cached hidden states of texts.

    A process reads each batch once, for all its heads. On a CPU there is one process for each thread that torch uses. A
    head ends with the weights that `CapsuleTrainer` gives with its settings, its `seed`, and the `data_seed` of all.

    Memory: `members * 5 * parameters * 4` bytes for weights, gradients, two moments, and a copy of the weights in this
    process. Each process, or branch of a CUDA graph, needs twice what a forward pass of the longest batch keeps. The
    sum is checked before training.

    Args:
        plan: what to try.
        data: options of the data.
        model: options of the model.
        head_options: options of heads, for each head that has them.
        arguments: transformers' training arguments, for all heads.
        task: of data that is loaded already, as in `TrainingRun`.
        combinations: what to try, instead of the plan's heads and grid.

    Attributes:
        members: the heads, in order of combination and seed.
        split: name of the validation split (the first of several).
        metric: metric on that split by which the best head is chosen.
        n_steps: number of training steps, once training has begun.
        seconds: seconds that training took.

    Raises:
        ValueError: If an option does not fit the others, the data or the backbone, or there is no validation split.
        TypeError: If a head has no such option.
        OSError: If the data or the backbone is not found.
        ImportError: If a package that the backbone or the optimizer needs is not installed.
    """

    def __init__(
        self,
        plan: SweepArguments,
        data: DataArguments,
        model: ModelArguments,
        head_options: Mapping[str, Any],
        arguments: CapsuleTrainingArguments,
        task: Task | None = None,
        combinations: Sequence[Combination] | None = None,
    ) -> None:
        _refuse(data, model, arguments)
        self.plan, self.data, self.model_arguments, self.arguments = plan, data, model, arguments
        self.combinations = combinations or combine(plan, model.head_type, head_options)
        self.output_dir = Path(str(arguments.output_dir))
        base_head = self._base_head()
        own = get_head(base_head).Options.names()
        run = TrainingRun(
            dataclasses.replace(data, cache_hidden_states=True, cache_on_device=False),
            dataclasses.replace(model, head_type=base_head),
            {name: value for name, value in head_options.items() if name in own},
            arguments,
            task,
        )
        if not run.validation:
            raise ValueError("There is no validation split to choose by; expected one: give it with --validation.")
        self.run = run
        self.split = next(iter(run.validation))
        self.caches = {
            name: run.cached(split)
            for name, split in {**run.validation, **(run.tests if plan.test_all else {})}.items()
        }
        self.members = self._make_members()
        self.metric, self.greater_is_better = self._choose_metric()
        self.n_steps = self._step = 0
        self.seconds = 0.0
        self._saved = self._evaluated = time.monotonic()  # time of the last checkpoint and evaluation
        self._evaluation_seconds = 0.0
        self._check_memory()

    def _base_head(self) -> str:
        """Return the head of the run whose hidden states are cached: one that takes all layers, if there is one."""
        heads = list(dict.fromkeys(x.head_type for x in self.combinations))
        return next((name for name in heads if not get_head(name).takes_one_layer), heads[0])

    def _make_members(self) -> list[Member]:
        run, plan = self.run, self.plan
        labels = run.collator([run.train_data[0]])["labels"]
        members, solutions = [], Solutions()
        with _said_once():
            settle_arguments(run.trainer, run.model)
            for combination, seed in itertools.product(self.combinations, range(plan.seeds)):
                member = make_member(
                    combination,
                    self.arguments.seed + seed,
                    self.arguments,
                    run.model,
                    self.model_arguments.layers,
                    run.collator,
                    train_dataset=run.train_data,
                    processing_class=run.processor,
                    compute_metrics=run.compute_metrics,
                )
                settle_problem_type(member.model, labels)
                member.trainer.settle(solutions=solutions)
                members.append(member)
        return members

    def _choose_metric(self) -> tuple[str, bool]:
        """Return the metric by which the best head is chosen, and whether a greater value is better."""
        args, config = self.arguments, self.members[0].model.config
        named = args.metric_for_best_model
        if named is not None:
            name = named.removeprefix("eval_")
            better = args.greater_is_better
            return name, name not in LESS_IS_BETTER if better is None else better
        metric = default_metric(config) if self.run.task.is_own_data else self.run.task.metric
        return ("loss", False) if metric is None else (metric_names(metric)[0], True)

    def _check_memory(self) -> None:
        """Refuse a sweep that does not fit in memory, and say how many heads would fit.

        Raises:
            ValueError: If the sweep does not fit.
        """
        device = self.arguments.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        weights = [4 * COPIES * sum(x.numel() for x in member.model.parameters()) for member in self.members]
        batch = self._longest_batch()
        of_each = {str(member.combination): member for member in self.members}  # all seeds take the same memory
        kept = max(self._kept_by_a_pass(member, batch) for member in of_each.values())
        n_at_once = min(BRANCHES, len(self.members)) if device.type == "cuda" else self._n_processes()
        of_passes = 2 * kept * n_at_once  # as much again for gradients
        if sum(weights) + of_passes > free:
            fitting = max(0, int((free - of_passes) / max(weights)))
            raise ValueError(
                f"The sweep has {len(self.members)} heads and takes {gigabytes(sum(weights) + of_passes)} of memory, "
                f"and {gigabytes(free)} are free; expected at most {fitting} heads: fewer values, heads or seeds."
            )

    def _longest_batch(self) -> dict[str, Any]:
        run = self.run
        longest = np.argsort(run.train_data[self.arguments.length_column_name])[-self.arguments.train_batch_size :]
        return run.trainer._prepare_inputs(run.collator([run.train_data[row] for row in longest.tolist()]))

    def _kept_by_a_pass(self, member: Member, batch: Mapping[str, Any]) -> int:
        """Return the bytes that a forward pass of a batch keeps for the backward pass.

        Both passes are run, so that kernels are compiled here, once for all processes.
        """
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        state = torch.get_rng_state()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss: Any = member.trainer.compute_loss(member.model.train(), member.select(batch))
        loss.backward()
        member.model.zero_grad()
        torch.set_rng_state(state)
        return sum(kept.values())

    def _n_processes(self) -> int:
        return number_of_processes(len(self.members), self.arguments.device)

    def train(self) -> None:
        """Train all heads, from the beginning or, with `resume` in the plan, from the last checkpoint.

        Raises:
            ValueError: If the checkpoint is of another sweep.
            OSError: If files cannot be written, another process trains in the folder, or a process of the sweep was
                killed.
            FloatingPointError: If no head was trained to the end.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        lead = self.run.trainer
        loader: Any = lead.get_train_dataloader()
        _, steps_in_epoch, *_, self.n_steps = lead.set_initial_training_values(lead.args, loader)
        for member in self.members:
            member.prepare(self.n_steps)
        with locked(self.output_dir):
            self._resume()
            start = time.monotonic()
            batches = Batches(lead, loader, steps_in_epoch, self.caches)
            bar: Any = transformers_logging.tqdm(
                desc="Training", total=self.n_steps, initial=self._step, disable=self.arguments.disable_tqdm
            )
            with crews(self.members, self._n_processes(), batches, self._step) as tell, bar:
                while self._step < self.n_steps and self.living():
                    self._advance(tell, steps_in_epoch, bar)
                checkpoint = self._save(tell)
                self._evaluate(tell)
            for place, member in enumerate(self.members):
                member.model.load_state_dict(torch.load(file_of(checkpoint, place), weights_only=True)["model"])
            self.seconds = time.monotonic() - start
        if not self.living():
            raise FloatingPointError(f"No head was trained to the end; the first: {self.members[0].fault}.")

    def _advance(self, tell: Tell, steps_in_epoch: int, bar: Any) -> None:
        """Take some steps, then halve, save and evaluate if it is time to; see `EVALUATIONS`."""
        epoch_end = self._step - self._step % steps_in_epoch + steps_in_epoch
        rungs = [rung for rung in self._rungs() if rung > self._step]
        until = min(self._step + STEPS_AT_A_TIME, epoch_end, self.n_steps, *rungs)
        tell(Crew.advance, until)
        bar.update(until - self._step)
        self._step = until
        if until in self._rungs():
            self._halve(tell)
        if time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS:
            self._save(tell)
        start = time.monotonic()
        if until == epoch_end < self.n_steps and self._evaluation_seconds <= EVALUATIONS * (start - self._evaluated):
            self._evaluate(tell)
            self._evaluated = time.monotonic()
            self._evaluation_seconds = self._evaluated - start
            bar.set_postfix_str(self._best_so_far())

    def _rungs(self) -> list[int]:
        return [round(part * self.n_steps) for part in RUNGS] if self.plan.halving else []

    def execute(self) -> dict[str, Any]:
        """Train all heads, write the table, and save the best head as a run of its own.

        Returns:
            The content of `sweep.json`: see `sweep_results.describe`.

        Raises:
            As `train` does.
        """
        self.train()
        found = save(self, self.output_dir)
        found |= {"best": self.save_best(), "saved": str(self.output_dir / BEST)}
        if self.plan.ensemble is not None:
            found["ensemble"] = self.save_ensemble(self.plan.ensemble)
        write_json(self.output_dir / RESULTS, found)
        delete(self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self._step}")  # it is not needed any more
        shutil.rmtree(self.output_dir / UNFINISHED, ignore_errors=True)
        return found

    def save_best(self) -> dict[str, Any]:
        """Save the best head as a run in the folder `best`, and return its results, those of the test split too.

        Raises:
            OSError: If files cannot be written.
        """
        run = self._run_of(self.ranked()[0], self.output_dir / BEST)
        run.finish()
        return run.evaluate(self.seconds)

    def save_ensemble(self, n_heads: int) -> dict[str, Any]:
        """Save the best heads as one model, a run in the folder `ensemble`, and return its results.

        Args:
            n_heads: number of heads; all heads, if there are fewer.

        Raises:
            OSError: If files cannot be written.
        """
        best, *others = self.ranked()[:n_heads]
        run = self._run_of(best, self.output_dir / ENSEMBLE)
        for member in others:
            member.model.config.head_only = run.model.config.head_only
        ensemble = make_ensemble([run.model, *(member.model for member in others)])
        run.replace_model(ensemble, ensemble.config.head_type, f"{1 + len(others)} heads")
        run.finish()
        return run.evaluate(self.seconds)

    def _run_of(self, member: Member, folder: Path) -> TrainingRun:
        """Return the run that would have trained a member, with the member's weights."""
        combination, model = member.combination, member.model
        run = TrainingRun(
            self.data.without_cache(),
            dataclasses.replace(
                self.model_arguments,
                head_type=combination.head_type,
                mixup_alpha=model.config.mixup_alpha,
                layers=combination.settings.get("layers", self.model_arguments.layers),
            ),
            combination.options,
            dataclasses.replace(member.args, output_dir=str(folder)),
            self.run.task,
        )
        run.model.config.problem_type = model.config.problem_type
        run.model.config.class_weights = model.config.class_weights
        if model.linear_term is not None:
            run.model.add_linear_term()
        unexpected = run.model.load_state_dict(member.weights(), strict=False).unexpected_keys
        assert not unexpected, unexpected
        run.trainer.state.global_step = member.steps
        return run

    def _halve(self, tell: Tell) -> None:
        """Stop the worse half of the combinations that still train, by the mean score over their seeds."""
        self._evaluate(tell)
        scores: dict[str, list[float]] = {}
        for member in self.living():
            scores.setdefault(str(member.combination), []).append(self.score(member))
        means = {name: statistics.fmean(values) for name, values in scores.items()}
        ranked = sorted(means, key=means.__getitem__, reverse=self.greater_is_better)
        worse = ranked[math.ceil(len(ranked) / 2) :]
        why = f"stopped after step {self._step}: among the worse half"
        living = ((place, member) for place, member in enumerate(self.members) if member.fault is None)
        tell(Crew.stop, {place: why for place, member in living if str(member.combination) in worse})

    def _evaluate(self, tell: Tell) -> None:
        """Evaluate all members on the splits whose hidden states are cached; see `Member.found`."""
        tell(Crew.evaluate)

    def score(self, member: Member) -> float:
        """Return a member's score, the metric on the (first) validation split, as it was last measured."""
        return float(member.found[self.split][self.metric])

    def ranked(self) -> list[Member]:
        """Return the members that are trained to the end, the best first; among equals, the one with the lower loss."""
        sign = -1 if self.greater_is_better else 1
        return sorted(self.living(), key=lambda x: (sign * self.score(x), x.found[self.split]["loss"]))

    def _best_so_far(self) -> str:
        best = self.ranked()[:1]
        return f"best {self.metric} {self.score(best[0]):.4f}: {best[0].combination}" if best else ""

    def _describe(self) -> dict[str, Any]:
        """Return the settings that a resumed sweep shares with the sweep that was interrupted."""
        names = ("num_train_epochs", "max_steps", "warmup_steps", "max_grad_norm", "learning_rate", "weight_decay")
        run = describe_run(self.run.trainer, self.run.model)
        return {
            **{name: run[name] for name in ("backbone", "classes", "training data", "examples in a step", "data_seed")},
            **{name: getattr(self.arguments, name) for name in names},
            "members": [f"{member.combination}, seed={member.seed}" for member in self.members],
        }

    def _save(self, tell: Tell) -> Path:
        """Write a checkpoint of all members, delete the previous one, and return its folder."""
        checkpoint = self.output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self._step}"
        unfinished = self.output_dir / UNFINISHED / checkpoint.name
        shutil.rmtree(unfinished.parent, ignore_errors=True)  # of a sweep that was killed
        with writing(checkpoint):
            unfinished.mkdir(parents=True)
            tell(Crew.save, unfinished)
            write_json(unfinished / PLAN, {"step": self._step, **self._describe()})
            finish(unfinished, checkpoint)
        self._saved = time.monotonic()
        rotate(checkpoint, 1, None)
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        return checkpoint

    def _resume(self) -> None:
        checkpoint = resolve_checkpoint(LAST if self.plan.resume else None, self.output_dir)
        if checkpoint is None:
            return
        before = read_json(Path(checkpoint, PLAN))
        step = before.pop("step")
        for name, value in self._describe().items():
            if before.get(name) != value:
                raise ValueError(
                    f"{checkpoint} is of another sweep: its {name} is {before.get(name)}, and this one has {value}; "
                    "resume with the settings of the checkpoint, or start in another output_dir."
                )
        for place, member in enumerate(self.members):
            member.load_state_dict(torch.load(file_of(Path(checkpoint), place), weights_only=True))
        self._step = step

    def living(self) -> list[Member]:
        """Return the members that still train, or have trained to the end."""
        return [member for member in self.members if member.fault is None]


@contextmanager
def _said_once() -> Iterator[None]:
    """Log the same message of the recipe once, though each head has one."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        words = re.sub(r" \([\d.]+ s\)", "", record.getMessage())  # without the time it took
        is_known = words in said
        said.add(words)
        return not is_known

    log = logging.getLogger(f"{__package__}.recipe")
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


def _refuse(data: DataArguments, model: ModelArguments, arguments: CapsuleTrainingArguments) -> None:
    """Refuse options that a sweep cannot take.

    Raises:
        ValueError: If such an option is set. The message says why it is refused.
    """
    refused = {
        "freeze_backbone": (model.freeze_backbone is False, "a sweep trains heads on the states of a frozen backbone"),
        "adapt": (model.adapt is not None, "a sweep trains heads on the states of a frozen backbone"),
        "cache_hidden_states": (data.cache_hidden_states is False, "a sweep reads hidden states from a cache"),
        "cache_on_device": (data.cache_on_device, "a sweep reads each batch once, for all heads"),
        "early_stopping_patience": (data.early_stopping_patience is not None, "all heads take the same steps"),
        "load_best_model_at_end": (arguments.load_best_model_at_end, "all heads take the same steps"),
        "eval_strategy": (word_of(arguments.eval_strategy) != "no", "a sweep evaluates when it is done"),
        "gradient_accumulation_steps": (arguments.gradient_accumulation_steps != 1, "each batch is a step"),
        "fp16": (arguments.fp16, "losses are not scaled; bf16 works"),
        "torch_compile": (arguments.torch_compile, "heads are not compiled in a sweep"),
        "resume_from_checkpoint": (arguments.resume_from_checkpoint is not None, "the option resume resumes a sweep"),
        "push_to_hub": (arguments.push_to_hub, "push the best head when it is chosen, with capsule-heads push"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            value = getattr(data, name, getattr(model, name, getattr(arguments, name, None)))
            raise ValueError(f"{name} is {word_of(value)}, which a sweep does not take: {why}; leave it out.")
    if arguments.world_size > 1:
        raise ValueError(f"There are {arguments.world_size} processes; expected one: a sweep trains all heads in it.")
