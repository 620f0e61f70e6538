"""Explanations: the tokens and layers that a score came from, as numbers, pictures and a page.

| what | compute | draw |
| --- | --- | --- |
| attributions to tokens, patches, parts | `explain` | `pictures.draw_explanation`, `draw_parts` |
| two models on one text | `compare` | |
| explanations on one page of HTML | `explain` | `report.render_report`, a `str` |
| explanations in a file | `save_explanations` | `load_explanations`, for any of these |
| how faithful explanations are | `faithfulness.compare_methods` | `pictures.draw_deletion` |

Drawing needs `pip install "capsule-heads[pictures]"`. The functions return a `matplotlib.figure.Figure`
(`figure.savefig(path)`) and do not change pyplot or its settings.
"""

from .attributions import Explanation, Word, explain
from .comparison import Comparison, compare
from .credits import Credits, compute_credits
from .export import load_explanations, save_explanations

__all__ = [
    "Comparison",
    "Credits",
    "Explanation",
    "Word",
    "compare",
    "compute_credits",
    "explain",
    "load_explanations",
    "save_explanations",
]
