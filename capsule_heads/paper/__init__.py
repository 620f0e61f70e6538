"""What the paper's own experiments need: its stereo network and data, published checkpoints and figures.

Only the registry of tasks and the command that converts published checkpoints import it, when they are asked for it.
"""

# What the paper has, where the defaults are other: from_backbone(name, **PAPER).
PAPER = {"mixup_alpha": 0.2}
