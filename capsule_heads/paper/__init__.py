"""Code for the paper's own experiments: its stereo network and data, published checkpoints and figures.

Only the registry of tasks and the command that converts published checkpoints import this package, when needed.
"""

from typing import Any

# The paper's settings that differ from the defaults: from_backbone(name, **PAPER).
PAPER: dict[str, Any] = {"mixup_alpha": 0.2}
