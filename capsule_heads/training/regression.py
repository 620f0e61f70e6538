"""The linear term of a classifier, solved for before training: a regression on the pooled hidden states of its data."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..data.splits import read_columns
from ..heads.linear_term import LinearTerm
from ..models.losses import infer_problem_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..models.modeling_capsule_head import CapsuleHeadClassifier
    from .trainer import CapsuleTrainer

# Features have a mean squared norm of 1. On cr and trec with 8, 64 and all rows of a class, this value was within 0.6
# points of the best value from 1 to 1,000, on validation.
C = 10.0
MOST_ITERATIONS = 100
ALPHAS = tuple(10.0**power for power in range(-4, 3))  # strengths of a ridge regression's penalty, per example
MOST_ROWS = 20_000  # more rows do not change the solution measurably
MOST_NUMBERS = 2**27  # of pooled states, 512 MiB in float32
MOST_PRODUCTS = 10**10  # of a pass over the rows: with more, solving would take minutes
LEAST_PER_CLASS = 4  # rows, if not all can be taken: with fewer, there is no linear term

logger = logging.getLogger(__name__)


def lacks_linear_term(model: CapsuleHeadClassifier) -> bool:
    """Return whether a model has no linear term, or one that is not solved for yet."""
    return model.linear_term is None or not any(x.count_nonzero() for x in model.linear_term.parameters())


def can_have_linear_term(trainer: CapsuleTrainer, model: CapsuleHeadClassifier) -> bool:
    """Return whether a model may start from a regression: a user allows it, and the backbone is frozen and complete."""
    in_one_piece = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.model_init is not None)
    return in_one_piece and not model.backbone_trains and model.config.linear_term is not False


class Solution(NamedTuple):
    """Weights `[outputs, features]` and biases `[outputs]` of a linear term, and the number of fitted rows."""

    weight: NDArray
    bias: NDArray
    n_rows: int


# Solutions by layers and class weights, on one training set. The models of a sweep share them.
Solutions = dict[tuple, Solution | None]


def fit_linear_term(trainer: CapsuleTrainer, model: CapsuleHeadClassifier, solutions: Solutions | None = None) -> str:
    """Solve for a linear term on the training data, and give it to a model whose head has scores of 0.

    Args:
        trainer: the trainer with the training data.
        model: the model that it trains.
        solutions: solutions of other models on the same data. This one is looked up there, or added.

    Returns:
        What was done, in words; "" if nothing was done, as the head's scores are not 0 or the data allows no term.
    """
    start = time.perf_counter()
    solutions = {} if solutions is None else solutions
    rows = _draw_rows(trainer, model)
    if rows is None or not _starts_at_zero(trainer, model, rows):
        return ""
    key = (*model.config.layers, None, *(model.config.class_weights or ()))
    if key not in solutions:
        solutions[key] = _fit(trainer, model, rows)
    solution = solutions[key]
    if solution is None:
        return ""
    _write(model.add_linear_term(), solution)
    if model.regressor is not None:
        torch.nn.init.zeros_(model.regressor.weight)  # its values then start at 0, as scores of classes do
    return (
        f"the model starts as a regression on the means of its tokens at {len(model.config.layers)} layers, fitted to "
        f"{solution.n_rows:,} examples ({time.perf_counter() - start:.1f} s)"
    )


def _fit(trainer: CapsuleTrainer, model: CapsuleHeadClassifier, rows: Sequence[int]) -> Solution | None:
    gathered = _gather(trainer, model, rows)
    if gathered is None:
        return None
    features, labels = gathered
    mean, scale = features.mean(0), features.std(0)
    scale[scale < 1e-6 * scale.max()] = np.inf  # a feature that does not change says nothing
    scale *= math.sqrt(np.isfinite(scale).sum())
    solution = _solve(model, (features - mean) / scale, labels)
    if solution is None:
        return None
    weight, bias = solution
    weight = weight / scale
    return Solution(weight, bias - weight @ mean, len(labels))


@torch.no_grad()
def _write(term: LinearTerm, solution: Solution) -> None:
    term.affine.weight.copy_(torch.from_numpy(np.ascontiguousarray(solution.weight)))
    term.affine.bias.copy_(torch.from_numpy(np.ascontiguousarray(solution.bias)))


def _draw_rows(trainer: CapsuleTrainer, model: CapsuleHeadClassifier) -> Sequence[int] | None:
    """Return all training rows, or some drawn by the order's seed; None for a stream, or if too few can be taken."""
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__len__"):  # a stream
        return None
    n_features, n_out = sum(model.head.hidden_sizes), model.config.num_labels or 2
    most = min(MOST_ROWS, MOST_NUMBERS // n_features, MOST_PRODUCTS // (n_features * n_out))
    if len(dataset) <= most:
        return range(len(dataset))
    if most < LEAST_PER_CLASS * n_out:
        return None
    seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
    return np.sort(np.random.default_rng(seed).choice(len(dataset), most, replace=False)).tolist()


def _starts_at_zero(trainer: CapsuleTrainer, model: CapsuleHeadClassifier, rows: Sequence[int]) -> bool:
    """Return whether a head's scores are 0: it is not trained yet, and its initial scores are 0."""
    for states, masks, _ in _compute(trainer, model, rows[: trainer.args.eval_batch_size]):
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return not model.head(states, masks).a_out.count_nonzero()
    return False


def _gather(
    trainer: CapsuleTrainer, model: CapsuleHeadClassifier, rows: Sequence[int]
) -> tuple[NDArray, NDArray] | None:
    """Return pooled states `[rows, features]` and labels; None if there are no labels, or a state is not finite."""
    pool = LinearTerm(model.head.hidden_sizes, 1).to(model.device).pool
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for states, masks, target in _compute(trainer, model, rows):
        if target is None:
            return None
        features.append(pool(states, masks).float().cpu())
        labels.append(target.cpu())
    x, y = torch.cat(features), torch.cat(labels)
    if not x.isfinite().all():  # training reports where it is not
        return None
    return x.numpy(), y.numpy()


def _compute(
    trainer: CapsuleTrainer, model: CapsuleHeadClassifier, rows: Sequence[int]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]]:
    """Yield hidden states, masks and labels of batches of rows, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(trainer, trainer.train_dataset, rows):
            inputs = trainer._prepare_inputs(batch)
            target = inputs.pop("labels", None)
            with torch.no_grad(), trainer.compute_loss_context_manager():  # in the precision of training
                states, masks = model.compute_hidden_states(**inputs)
            yield states, masks, target
    finally:
        model.train(was_training)


def _batches(trainer: CapsuleTrainer, dataset: Any, rows: Sequence[int]) -> DataLoader:
    """Return batches of rows, grouped by length, without a draw from torch's global generator."""
    import datasets

    args, collator = trainer.args, trainer.data_collator
    lengths = read_columns(dataset, [args.length_column_name]).get(args.length_column_name)
    if lengths is not None:
        rows = sorted(rows, key=lengths.__getitem__)
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="Training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="Training")
    return DataLoader(
        Subset(dataset, rows),
        batch_size=args.eval_batch_size,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),
    )


def _solve(model: CapsuleHeadClassifier, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray] | None:
    """Return weights `[classes, features]` and biases `[classes]`; None if all labels are of one class."""
    config = model.config
    n_out = config.num_labels or 2
    problem_type = infer_problem_type(config, torch.from_numpy(y))
    if problem_type == "regression":
        return _solve_ridge(x, (y.reshape(len(y), -1).astype(np.float64) - config.label_mean) / config.label_std)
    if problem_type == "multi_label_classification":
        solutions = [_solve_logistic(x, column > 0.5, 2, None) for column in y.T]
        # The difference of two scores is the log of the odds, which is the score of a label.
        return np.stack([w[1] - w[0] for w, _ in solutions]), np.stack([b[1] - b[0] for _, b in solutions])
    weights: Any = config.class_weights
    return None if len(np.unique(y)) < 2 else _solve_logistic(x, y, n_out, weights)


def _solve_logistic(
    x: NDArray, y: NDArray, n_out: int, class_weights: Sequence[float] | None
) -> tuple[NDArray, NDArray]:
    """Return the solution of a logistic regression; a class without rows gets the score of a rare class."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((n_out, x.shape[1])), np.full(n_out, -math.log(2 * len(y)))
    present = np.unique(y).astype(int)
    if len(present) == 1:  # a label that all rows have, or no row has
        bias[present] = 0.0
        return weight, bias
    by_class = None if class_weights is None else {label: class_weights[label] for label in present}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = LogisticRegression(C=C, max_iter=MOST_ITERATIONS, class_weight=by_class).fit(x, y.astype(int))
    coefficients, intercepts = found.coef_, found.intercept_
    if len(present) == 2:  # they are of the second class against the first
        coefficients, intercepts = np.outer([-0.5, 0.5], coefficients), np.outer([-0.5, 0.5], intercepts)[:, 0]
    weight[present], bias[present] = coefficients, intercepts
    return weight, bias


def _solve_ridge(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Return the solution of a ridge regression, with the best penalty of `ALPHAS` by leave-one-out validation."""
    from sklearn.linear_model import RidgeCV

    found = RidgeCV(alphas=[alpha * len(x) for alpha in ALPHAS]).fit(x.astype(np.float64), y)
    return found.coef_.reshape(y.shape[1], -1), np.asarray(found.intercept_).reshape(-1)
