"""Pictures, each a function that computes and one that draws; drawing needs `pip install "capsule-heads[pictures]"`.

| picture | compute | draw |
| --- | --- | --- |
| how an activated capsule's pose moves | `select_sequence`, `activated_poses`, `pose_trajectory` | `draw_trajectory` |
| accuracy against parameters, or year | `capsule_heads.results.collect_results` | `draw_results` |

Drawing returns a `matplotlib.figure.Figure` (`figure.savefig(path)`) and leaves pyplot and its settings alone.
"""

from .accuracy import draw_results
from .trajectory import (
    PoseTrajectory,
    activated_poses,
    compute_capsules,
    draw_trajectory,
    pose_trajectory,
    select_sequence,
)

__all__ = [
    "PoseTrajectory",
    "activated_poses",
    "compute_capsules",
    "draw_results",
    "draw_trajectory",
    "pose_trajectory",
    "select_sequence",
]
