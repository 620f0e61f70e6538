"""Draw texts with coloured words: what speaks for the predicted class is blue, what speaks against it red.

For example:

    capsule-heads train --config sst2_minilm --output_dir runs/sst2_minilm
    python scripts/benchmarks/draw_words.py runs/sst2_minilm "The plot is thin ." --output words.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capsule_heads.cli.options import OneLineParser, fail
from capsule_heads.explain import Explanation, explain
from capsule_heads.explain.pictures import BLUE, RED, lead_per_credit, new_figure, percent, shade
from capsule_heads.tasks import load_classifier

WIDTH, LINE, MARGIN = 8.0, 0.34, 0.25  # inches


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or name on the Hub of a trained model")
    parser.add_argument("texts", nargs="+", help="texts to explain")
    parser.add_argument("--output", type=Path, required=True, help="path of the picture")
    options = parser.parse_args()
    try:
        explanations = explain(load_classifier(options.model), options.texts)
        draw(explanations).savefig(options.output)
    except (ImportError, OSError, ValueError) as error:
        fail(error)
    print(options.output)


def draw(explanations: list[Explanation]) -> Figure:
    """Return a figure with one paragraph for each text, headed by the predicted class and its probability."""
    figure = new_figure(WIDTH, 2 * LINE * len(explanations) + 2 * MARGIN)
    renderer, dpi, height = FigureCanvasAgg(figure).get_renderer(), figure.dpi, figure.get_figheight()
    line = height - MARGIN - 0.5 * LINE
    for explanation in explanations:
        target = int(explanation.logits.argmax())
        words = explanation.by_word()
        shares = explanation.against_others(torch.stack([word.credit for word in words]))[:, target]
        shares = (shares * lead_per_credit(explanation, target)).tolist()
        heading = f"{explanation.labels[target]}, {percent(float(explanation.probabilities[target]))}"
        figure.text(MARGIN / WIDTH, line / height, heading, size=10, va="center", color="#555555")
        line, left = line - LINE, MARGIN
        for word, share in zip(words, shares):
            box = {"facecolor": BLUE if share > 0 else RED, "alpha": 0.7 * shade(share), "edgecolor": "none", "pad": 3}
            at = left / WIDTH, line / height
            drawn = figure.text(*at, word.text, size=14, va="center", bbox=box)
            left += drawn.get_window_extent(renderer).width / dpi + 0.11
        line -= LINE
    return figure


if __name__ == "__main__":
    main()
