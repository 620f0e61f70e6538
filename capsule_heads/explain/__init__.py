"""Explanations: which tokens and layers a score came from, as numbers, pictures and a page.

| what | compute | draw |
| --- | --- | --- |
| attributions to tokens, patches, parts | `explain` | `pictures.draw_explanation`, `draw_parts` |
| explanations on one page of HTML | `explain` | `report.render_report`, a `str` |
| how faithful explanations are | `faithfulness.compare_methods` | `pictures.draw_deletion` |

Drawing needs `pip install "capsule-heads[pictures]"`. It returns a `matplotlib.figure.Figure` (`figure.savefig(path)`)
and leaves pyplot and its settings alone.
"""

from .attributions import Credits, Explanation, Word, compute_credits, explain

__all__ = ["Credits", "Explanation", "Word", "compute_credits", "explain"]
