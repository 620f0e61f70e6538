"""An ensemble: one head that averages the probabilities of several trained heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import is_number, shown
from .base import Head, HeadOptions, HeadOutput, Mix, check_trainable, get_head, option, register
from .linear_term import LinearTerm
from .values import make_regressor, n_outputs, read_values

AVERAGES = ("classes", "labels", "values")
MADE_BY = "capsule_heads.make_ensemble"


@dataclass(frozen=True)
class EnsembleOptions(HeadOptions):
    """The options of `EnsembleHead`. `capsule_heads.make_ensemble` writes them."""

    members: Sequence[dict[str, Any]] | None = option(None, "Descriptions of the heads; see Member.", describes=False)
    averages: str = option("classes", "Outputs to average: classes, labels or values.", choices=AVERAGES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.members, list) or len(self.members) < 2:
            raise ValueError(
                f"members is {shown(self.members)}; expected the descriptions of two heads or more: {MADE_BY}(models) "
                "makes an ensemble from trained models."
            )
        for member in self.members:
            check_member(member)


class Member(nn.Module):
    """A head of an ensemble, with everything that its classifier had except the backbone.

    Its weights have the same names as in that classifier.

    Args:
        hidden_sizes: size of each hidden state of the ensemble.
        n_out: number of the ensemble's outputs.
        is_regression: whether the outputs are values of a regression.
        described: a mapping with five keys. `head_type` is the head's name in the registry, and `options` are its
            options. `layers` are the indices of the hidden states that the head takes, among the ensemble's.
            `linear_term` says whether a linear term stands beside the head. `calibration_temperature` divides the
            logits.
    """

    def __init__(
        self, hidden_sizes: Sequence[int], n_out: int, is_regression: bool, described: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.layers, self.temperature = described["layers"], described["calibration_temperature"]
        self.is_regression = is_regression
        make_head, sizes = get_head(described["head_type"]), [hidden_sizes[layer] for layer in self.layers]
        n_own = n_outputs(make_head, n_out, is_regression)
        self.head = make_head(hidden_sizes=sizes, n_out=n_own, **described["options"])
        self.regressor = make_regressor(self.head, n_out) if is_regression else None
        self.linear_term = LinearTerm(sizes, n_out) if described["linear_term"] else None

    def forward(self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None) -> Tensor:
        """Return the logits, or the values of a regression in its own unit, `[batch, n_out]`, in float32 or wider.

        Args:
            hidden_states: all hidden states of the ensemble, per layer `[batch, tokens, hidden_size]`.
            masks: per layer `[batch, tokens]`.
            mix: as in `Head.forward`.
        """
        states, masks = [hidden_states[layer] for layer in self.layers], [masks[layer] for layer in self.layers]
        linear = None if self.linear_term is None else self.linear_term(states, masks, mix)
        output = self.head(states, masks, mix=mix)
        return read_values(output, self.regressor, linear, self.is_regression) / self.temperature


@register("ensemble_of_heads")
class EnsembleHead(Head):
    """Several trained heads, with the means of their probabilities, or of the values of a regression.

    The scores are logits of the mean probabilities. For classes they are the logarithms of the mean probabilities, and
    a softmax of the scores returns these.

    Args:
        hidden_sizes: size of each hidden state that at least one of the heads takes.
        n_out: number of class scores, or of a regression's values.
        **options: fields of `EnsembleOptions`.
    """

    title = "An ensemble of heads"
    Options = EnsembleOptions
    made_by = MADE_BY
    options: EnsembleOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        is_regression = self.options.averages == "values"
        described = self.options.members or ()
        check_layers(described, len(self.hidden_sizes))
        self.members = nn.ModuleList(Member(self.hidden_sizes, n_out, is_regression, x) for x in described)

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Average the outputs of the heads; see `Head.score`.

        Raises:
            ValueError: In training mode.
        """
        if self.training:
            raise ValueError(
                f"An ensemble's heads are trained one by one, before {MADE_BY}(models); call eval() to score with it."
            )
        values = torch.stack([member(hidden_states, masks, mix) for member in self.members])
        if self.options.averages == "values":
            return HeadOutput(values.mean(0))
        if self.options.averages == "classes":
            return HeadOutput(log_mean(values.log_softmax(-1)))
        return HeadOutput(log_mean(F.logsigmoid(values)) - log_mean(F.logsigmoid(-values)))


def log_mean(logarithms: Tensor) -> Tensor:
    """Return the logarithm of a mean over the first dimension, from the logarithms of its terms."""
    return logarithms.logsumexp(0) - math.log(len(logarithms))


def check_member(member: object) -> None:
    """Check the description of a head of an ensemble.

    Raises:
        ValueError: If the description lacks a key, has an unknown key, or has a value that is not valid.
        TypeError: If an option of the head is unknown.
    """
    expected: dict[str, Callable[[Any], bool]] = {
        "head_type": lambda x: isinstance(x, str),
        "options": lambda x: isinstance(x, dict),
        "layers": lambda x: isinstance(x, list) and len(x) > 0 and all(type(i) is int and i >= 0 for i in x),
        "linear_term": lambda x: isinstance(x, bool),
        "calibration_temperature": lambda x: is_number(x) and x > 0,
    }
    if not isinstance(member, dict) or member.keys() != expected.keys():
        raise ValueError(f"A member of an ensemble is {shown(member)}; expected a dict of {', '.join(expected)}.")
    for key, is_right in expected.items():
        if not is_right(member[key]):
            raise ValueError(f"{key} of a member is {shown(member[key])}; expected what {MADE_BY} writes.")
    head = get_head(member["head_type"])
    check_trainable(head)
    head.make_options(member["options"])


def check_layers(members: Sequence[Mapping[str, Any]], n_layers: int) -> None:
    """Check that the heads of an ensemble take exactly the ensemble's hidden states.

    Raises:
        ValueError: If a head takes a hidden state that the ensemble lacks, or if no head takes one that it has.
    """
    taken = sorted({layer for member in members for layer in member["layers"]})
    if taken != list(range(n_layers)):
        raise ValueError(
            f"The heads of an ensemble take the hidden states {taken} of its own, and it has {n_layers}; expected the "
            f"layers that {MADE_BY} writes: leave layers as they are."
        )
