"""The Hub: pushing models with a model card and, on request, the code that runs them without this package."""

from .code import write_code
from .model_card import model_card, write_model_card
from .push import check_backbone_is_shared, push_folder, push_run

__all__ = ["check_backbone_is_shared", "model_card", "push_folder", "push_run", "write_code", "write_model_card"]
