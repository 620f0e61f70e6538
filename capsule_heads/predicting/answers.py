"""Answers from a model's scores: columns beside those of a file, or the keys of a line of JSON."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor

from ..models.configuration_capsule_head import CapsuleHeadConfig

TEXT, NUMBER, TEXTS = "text", "number", "texts"  # kinds of columns


class Answer(NamedTuple):
    """The prediction for an input.

    Attributes:
        labels: the predicted classes: one, or an empty list if the model abstains. A multi-label model predicts any
            number of them.
        best: all classes and their probabilities, the most probable first; for a regression its values, in order.
    """

    labels: list[str]
    best: list[tuple[str, float]]


class Answers:
    """Makes answers from scores.

    Args:
        config: the model's configuration.
        top_k: number of the most probable classes to give, instead of all.
        abstain_below: no label is given if the best probability is below this number.
        taken: names of columns that the file has already.

    Attributes:
        columns: the kind of each column, by its name. If one of the names is taken, all get a number at their end.
        is_renamed: whether the names have got a number.

    Raises:
        ValueError: If `top_k` exceeds the number of classes, or an option has no effect on this kind of model.
    """

    def __init__(
        self,
        config: CapsuleHeadConfig,
        top_k: int | None = None,
        abstain_below: float | None = None,
        taken: Collection[str] = (),
    ) -> None:
        self.config, self.top_k, self.abstain_below = config, top_k, abstain_below
        self.is_regression = config.problem_type == "regression"
        self.is_multi_label = config.problem_type == "multi_label_classification"
        self._check()
        usual = self._columns()
        self.columns, number = usual, 2
        while set(self.columns) & set(taken):
            self.columns = {f"{name}_{number}": kind for name, kind in usual.items()}
            number += 1
        self.is_renamed = number > 2

    def _check(self) -> None:
        names = self.config.class_names
        for name, value in (("top_k", self.top_k), ("abstain_below", self.abstain_below)):
            if value is not None and self.is_regression:
                raise ValueError(f"{name} is {value}, and the model is a regression without classes; leave it out.")
        if self.top_k is not None and self.top_k > len(names):
            raise ValueError(
                f"top_k is {self.top_k}, and the model has {len(names)} classes; expected {len(names)} or less."
            )
        if self.abstain_below is not None and self.is_multi_label:
            raise ValueError(
                f"abstain_below is {self.abstain_below}, which is for models that give an input one class, and this "
                "one gives any number of labels; leave it out."
            )

    def _columns(self) -> dict[str, str]:
        names = self.config.class_names
        if self.is_regression:
            return {"predicted_value": NUMBER} if len(names) == 1 else {f"predicted_{x}": NUMBER for x in names}
        found = {"predicted_labels": TEXTS} if self.is_multi_label else {"predicted_label": TEXT, "probability": NUMBER}
        if self.top_k is None:
            return found | {f"probability_{name}": NUMBER for name in names}
        for place in range(1, self.top_k + 1):
            found |= {f"top_{place}_label": TEXT, f"top_{place}_probability": NUMBER}
        return found

    def answer(self, scores: Tensor) -> Answer:
        """Return the prediction from the scores of one input, `[num_labels]`."""
        pairs = list(zip(self.config.class_names, scores.tolist()))
        if self.is_regression:
            return Answer([], pairs)
        best = sorted(pairs, key=lambda pair: -pair[1])
        if self.is_multi_label:
            thresholds = dict(zip(self.config.class_names, self.config.label_thresholds))
            return Answer([name for name, p in best if p > thresholds[name]], best)
        is_sure = self.abstain_below is None or best[0][1] >= self.abstain_below
        return Answer([best[0][0]] if is_sure else [], best)

    def row(self, answer: Answer | None) -> list[Any]:
        """Return the values of the columns; None in each where there is no answer."""
        if answer is None:
            return [None] * len(self.columns)
        labels, best = answer
        if self.is_regression:
            return [value for _, value in best]
        label = labels[0] if labels else None
        found: list[Any] = [labels] if self.is_multi_label else [label, best[0][1]]
        if self.top_k is None:
            by_name = dict(best)
            return found + [by_name[name] for name in self.config.class_names]
        return found + [x for pair in best[: self.top_k] for x in pair]

    def line(self, answer: Answer) -> dict[str, Any]:
        """Return the keys and values of a line of JSON."""
        labels, best = answer
        if self.is_regression:
            return {"value": best[0][1]} if len(best) == 1 else {"values": dict(best)}
        of_best = {"scores": dict(best[: self.top_k])}
        if self.is_multi_label:
            return {"labels": labels, **of_best}
        found = {"label": labels[0] if labels else None, "score": best[0][1]}
        return found if self.top_k is None else found | of_best
