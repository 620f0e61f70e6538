"""Pictures, each a function that computes and one that draws; drawing needs `pip install "capsule-heads[pictures]"`.

| picture | compute | draw |
| --- | --- | --- |
| how an activated capsule's pose moves | `select_sequence`, `activated_poses`, `pose_trajectory` | `draw_trajectory` |
| accuracy against parameters, or year | `capsule_heads.results.collect_results` | `draw_results` |
| credits of tokens, of patches, of parts | `model.explain` | `draw_tokens`, `draw_patches`, `draw_parts` |
| explanations on one page of HTML | `model.explain` | `render_report`, a `str` |
| how faithful explanations are | `capsule_heads.explain.faithfulness.compare_methods` | `draw_deletion` |

Drawing returns a `matplotlib.figure.Figure` (`figure.savefig(path)`) and leaves pyplot and its settings alone.
"""

from ..explain.pictures import draw_deletion, draw_parts, draw_patches, draw_tokens
from ..explain.report import render_report, render_words
from ..paper.trajectory import (
    PoseTrajectory,
    activated_poses,
    compute_capsules,
    draw_trajectory,
    pose_trajectory,
    select_sequence,
)
from .accuracy import draw_results

__all__ = [
    "PoseTrajectory",
    "activated_poses",
    "compute_capsules",
    "draw_deletion",
    "draw_parts",
    "draw_patches",
    "draw_results",
    "draw_tokens",
    "draw_trajectory",
    "pose_trajectory",
    "render_report",
    "render_words",
    "select_sequence",
]
