"""Draw how a trained head routes a sentence: the pictures of docs/concepts/routing.md.

    capsule-heads train --config quickstart --n_parts 8 --recipe paper --learning_rate 8e-3 --output_dir runs/routing
    python scripts/benchmarks/draw_routing.py runs/routing

Writes routing_overview.png (tokens to parts to classes), routing_parts.png (which tokens at which layers each part
takes), routing_iterations.png (how the votes for each class are weighted) and routing_padding.png (scores of a padded
sentence). It takes any run on texts with the head `token_depth`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.explain.pictures import new_figure
from capsule_heads.heads import TokenDepthHead
from capsule_heads.models import CapsuleHeadForSequenceClassification
from capsule_heads.models.processors import processor_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

DOCS = Path(__file__).resolve().parents[2] / "docs"
SENTENCE = "The room was clean and quiet, and breakfast was excellent."
WIDTH, DPI = 4.5, 200  # inches, and pixels an inch: 900 pixels, whose letters can be read at 380 too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")  # Okabe and Ito
MOST_PARTS = 8  # parts in a picture: those that take the most data
MOST_CLASSES = 3
N_ITERATIONS = 3
LEAST = 0.1  # fraction of a token that a part uses, for a line to be drawn
PADDING = range(0, 33, 4)


@dataclass(frozen=True)
class Routed:
    """A sentence that a head has routed, and the parts that pictures show.

    Attributes:
        model: the model.
        inputs: what the tokenizer made of the sentence.
        tokens: the tokens.
        classes: the names of the classes.
        parts: indices of the parts that are shown.
        scores: `[parts]`, scores of all parts, as logits.
        poses: `[parts, d_cov, d_cap]`, their poses.
        to_parts: `[tokens, layers, parts]`, the fraction of each input that each part uses.
    """

    model: CapsuleHeadForSequenceClassification
    inputs: dict[str, Tensor]
    tokens: list[str]
    classes: list[str]
    parts: list[int]
    scores: Tensor
    poses: Tensor
    to_parts: Tensor

    @torch.no_grad()
    def to_classes(self, n_iters: int) -> tuple[Tensor, ...]:
        """Return scores, poses, variances and the fractions `[parts, classes]` after some iterations."""
        routing = copy.deepcopy(self.model.head.routings[1])
        routing.n_iters = n_iters
        scores, poses, variances, R = routing(self.scores, self.poses, return_R=True)
        return scores, poses, variances, self.scores.sigmoid()[:, None] * R


@torch.no_grad()
def route(model: CapsuleHeadForSequenceClassification, tokenizer: PreTrainedTokenizerBase, text: str) -> Routed:
    """Route a sentence."""
    if not isinstance(model.head, TokenDepthHead) or len(model.head.routings) != 2:
        raise ValueError(f"The head is {model.config.head_type}; expected token_depth, whose routing is drawn here.")
    inputs = dict(tokenizer(text, return_tensors="pt"))
    a, mu = model.head.detect(*_states(model, inputs))
    scores, poses, _, R = model.head.routings[0](a, mu, return_R=True)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    used = (a.sigmoid()[..., None] * R)[0].unflatten(0, (len(tokens), -1))
    parts = sorted(used.sum((0, 1)).argsort(descending=True)[:MOST_PARTS].tolist())
    return Routed(model, inputs, tokens, model.config.class_names, parts, scores[0], poses[0], used)


def _states(
    model: CapsuleHeadForSequenceClassification, inputs: dict[str, Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return what the head takes: the hidden states, and a mask for each."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return states, [inputs["attention_mask"].float()] * len(states)


def draw_overview(routed: Routed) -> Figure:
    """Draw tokens at all layers, parts and classes, joined by lines as wide as the fraction that is routed."""
    n_tokens, n_layers = routed.to_parts.shape[:2]
    class_scores, _, _, to_classes = routed.to_classes(N_ITERATIONS)
    classes = class_scores.argsort(descending=True)[:MOST_CLASSES].sort().values.tolist()
    figure = new_figure(WIDTH, 0.6 + 0.22 * max(n_tokens, 12), DPI)
    axes = figure.add_subplot()
    heights = [-token for token in range(n_tokens)]
    at_parts = _spread(len(routed.parts), n_tokens)
    at_classes = _spread(len(classes), n_tokens)
    for token, y in enumerate(heights):
        axes.text(-0.6, y, _shown(routed.tokens[token]), ha="right", va="center", fontsize=9)
        axes.scatter(range(n_layers), [y] * n_layers, s=13, marker="s", color="#555555", linewidths=0)
        for place, part in enumerate(routed.parts):
            fraction = float(routed.to_parts[token, :, part].mean())
            if fraction >= LEAST:
                ends = [n_layers - 0.3, n_layers + 5.4], [y, at_parts[place]]
                axes.plot(*ends, color=COLOURS[place], lw=7 * fraction, alpha=0.7)
    for place, part in enumerate(routed.parts):
        for target, k in enumerate(classes):
            ends = [n_layers + 6.6, n_layers + 11.2], [at_parts[place], at_classes[target]]
            axes.plot(*ends, color=COLOURS[place], lw=5 * float(to_classes[part, k]), alpha=0.7)
        axes.text(n_layers + 6, at_parts[place], str(part), ha="center", va="center", fontsize=9, bbox=_box())
    for y, k in zip(at_classes, classes):
        text = f"{routed.classes[k]}\n{float(class_scores[k]):+.1f}"
        axes.text(n_layers + 11.4, y, text, ha="left", va="center", fontsize=9, bbox=_box())
    top = 1.3
    for x, text in ((-0.6, "tokens"), (n_layers / 2 - 0.5, "layers"), (n_layers + 6, "parts")):
        axes.text(x, top, text, ha="right" if x < 0 else "center", fontsize=9, fontweight="bold")
    axes.text(n_layers + 11.2, top, "classes", ha="left", fontsize=9, fontweight="bold")
    axes.set(xlim=(-6.2, n_layers + 16.5), ylim=(-n_tokens + 0.2, 2.2))
    axes.axis("off")
    return figure


def draw_parts(routed: Routed) -> Figure:
    """Draw for each part the fraction of each token at each layer that it uses."""
    n_tokens, n_layers = routed.to_parts.shape[:2]
    n_columns = min(4, len(routed.parts))
    n_rows = -(-len(routed.parts) // n_columns)
    figure = new_figure(WIDTH, 0.5 + n_rows * (0.35 + 0.15 * n_tokens), DPI)
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    most = float(routed.to_parts[..., routed.parts].max())
    for axes, part in zip(grid.flat, routed.parts):
        image = axes.imshow(routed.to_parts[..., part].numpy(), cmap="Blues", vmin=0, vmax=most, aspect="auto")
        axes.set_title(f"part {part}", fontsize=9)
        axes.set_yticks(range(n_tokens), [_shown(token) for token in routed.tokens], fontsize=8)
        layers = routed.model.config.layers
        axes.set_xticks([0, n_layers - 1], [str(layers[0]), str(layers[-1])], fontsize=8)
        axes.tick_params(length=0)
    for axes in list(grid.flat)[len(routed.parts) :]:
        axes.axis("off")
    figure.supxlabel("layer", fontsize=9)
    bar = figure.colorbar(image, ax=grid, location="top", shrink=0.5, aspect=25)
    bar.set_label("fraction of the input that the part uses", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


@torch.no_grad()
def draw_iterations(routed: Routed) -> Figure:
    """Draw the votes of all parts for each class, and mean and standard deviation of each class, by iteration."""
    from matplotlib.patches import Ellipse

    routing = routed.model.head.routings[1]
    if routed.poses.shape[1:] != (1, 2):
        raise ValueError(f"Poses are {tuple(routed.poses.shape[1:])}; expected (1, 2), which fit into a plane.")
    votes = torch.einsum("icd,ijdh->ijch", routed.poses, routing.W) + routing.B  # [parts, classes, 1, 2]
    classes = routed.to_classes(N_ITERATIONS)[0].argsort(descending=True)[:MOST_CLASSES].sort().values.tolist()
    figure = new_figure(WIDTH, 0.5 + 1.65 * len(classes), DPI)
    grid = figure.subplots(len(classes), N_ITERATIONS, sharex=True, sharey=True, squeeze=False)
    for row, k in zip(grid, classes):
        for iteration, axes in enumerate(row, start=1):
            scores, means, variances, used = routed.to_classes(iteration)
            colour = COLOURS[classes.index(k)]
            sizes = 4 + 110 * used[:, k]
            axes.scatter(*votes[:, k, 0].T.numpy(), s=sizes.numpy(), color=colour, alpha=0.65, linewidths=0)
            mean, deviation = means[k, 0].tolist(), variances[k, 0].sqrt().tolist()
            axes.add_patch(Ellipse(mean, 2 * deviation[0], 2 * deviation[1], fill=False, lw=1.3))
            axes.plot(*mean, "+", color="black", markersize=7)
            axes.text(0.5, 0.03, f"score {float(scores[k]):+.2f}", ha="center", fontsize=9, transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
            if k == classes[0]:
                axes.set_title(f"iteration {iteration}", fontsize=9)
        row[0].set_ylabel(f"votes for {routed.classes[k]}", fontsize=9)
    _leave_room(grid[0, 0], votes[:, classes, 0].flatten(0, 1))
    return figure


@torch.no_grad()
def draw_padding(routed: Routed, padding: int) -> Figure:
    """Draw the score of the predicted class of the sentence with more and more padding, with and without its mask.

    Args:
        routed: the sentence.
        padding: id of the token that pads.
    """
    predicted = int(routed.to_classes(N_ITERATIONS)[0].argmax())
    ids, mask = routed.inputs["input_ids"], routed.inputs["attention_mask"]
    scores: dict[int, list[float]] = {0: [], 1: []}
    for n in PADDING:
        padded = torch.cat([ids, ids.new_full((1, n), padding)], dim=1)
        for fill, found in scores.items():
            masked = torch.cat([mask, mask.new_full((1, n), fill)], dim=1)
            states = _states(routed.model, {"input_ids": padded, "attention_mask": masked})
            found.append(float(routed.model.head(*states).a_out[0, predicted]))
    figure = new_figure(WIDTH, 2.6, DPI)
    axes = figure.add_subplot()
    styles = {0: ("o-", COLOURS[0], "padding masked"), 1: ("s--", COLOURS[5], "padding not masked")}
    for fill, (style, colour, label) in styles.items():
        axes.plot(PADDING, scores[fill], style, color=colour, label=label, markersize=4)
    axes.set_xlabel("tokens of padding", fontsize=9)
    axes.set_ylabel(f"score of {routed.classes[predicted]}", fontsize=9)
    axes.set_xticks(PADDING[::2])
    axes.set_ylim(min(0.0, *scores[0], *scores[1]), 1.35 * max(*scores[0], *scores[1], 0.01))
    axes.tick_params(labelsize=9)
    axes.legend(fontsize=9, loc="upper right", frameon=False, ncols=2)
    axes.grid(color="0.92")
    change = max(abs(score - scores[0][0]) for score in scores[0])
    print(f"With the mask, the score changes by {change:.1e} at most.")
    return figure


def _spread(n: int, n_tokens: int) -> list[float]:
    """Return heights of `n` things beside `n_tokens` rows."""
    step = (n_tokens - 1) / max(n, 1)
    return [-(place + 0.5) * step for place in range(n)]


def _shown(token: str) -> str:
    return token if len(token) <= 10 else token[:9] + "…"


def _box() -> dict[str, object]:
    return {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#555555"}


def _leave_room(axes: Axes, points: Tensor) -> None:
    """Set square limits around points, with room for a line of text below."""
    middle, reach = (points.amin(0) + points.amax(0)) / 2, 0.62 * float((points.amax(0) - points.amin(0)).max())
    axes.set_xlim(float(middle[0]) - reach, float(middle[0]) + reach)
    axes.set_ylim(float(middle[1]) - 1.25 * reach, float(middle[1]) + 0.95 * reach)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of a model with the head token_depth")
    parser.add_argument("--text", default=SENTENCE, help="sentence to route (default %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=DOCS / "pictures", help="directory for the pictures")
    options = parser.parse_args()
    try:
        model = CapsuleHeadForSequenceClassification.from_pretrained(options.model)
        tokenizer = processor_of(model)
        routed = route(model, tokenizer, options.text)
        figures = {
            "overview": draw_overview(routed),
            "parts": draw_parts(routed),
            "iterations": draw_iterations(routed),
            "padding": draw_padding(routed, tokenizer.pad_token_id),
        }
        options.output_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            path = options.output_dir / f"routing_{name}.png"
            figure.savefig(path)
            print(path)
    except (ImportError, OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
