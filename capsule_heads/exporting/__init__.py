"""Export of trained models to programs that run without this package."""

from .onnx import Check, export_onnx

__all__ = ["Check", "export_onnx"]
