"""Export of trained models to programs that run without this package."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .onnx import Check, export_onnx

QUANTIZATIONS = ("int8",)  # how an exported model can keep its weights

__all__ = ["QUANTIZATIONS", "Check", "export_onnx"]

__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(("Check", "export_onnx"), "onnx"))
