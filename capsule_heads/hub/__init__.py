"""The Hub: pushing checkpoints with a model card and, on request, the code that runs them without this package.

Everything here works on directories. Names are imported when they are first used: configurations and models import
this package, and most of them are never pushed.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .auto_class import refuse_auto_class
    from .card import model_card, write_model_card
    from .code import write_code
    from .push import check_backbone_is_shared, push_folder, push_run

__all__ = [
    "check_backbone_is_shared",
    "model_card",
    "push_folder",
    "push_run",
    "refuse_auto_class",
    "write_code",
    "write_model_card",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "check_backbone_is_shared": "push",
        "model_card": "card",
        "push_folder": "push",
        "push_run": "push",
        "refuse_auto_class": "auto_class",
        "write_code": "code",
        "write_model_card": "card",
    },
)
