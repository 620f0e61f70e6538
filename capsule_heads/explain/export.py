"""Explanations as a JSON file, for other programs and for pages that are rendered later.

    {"version": 1, "explanations": [{"labels": [...], "logits": [...], "credits": [[[...]]], ...}]}

Each explanation has the attributes of `Explanation` by name, tensors as nested lists. An image is `{"png": ...}`, or
`{"npy": ...}` for an array, in base64. Numbers have all digits of float32.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import read_json, write_text
from .attributions import Explanation

VERSION = 1
TENSORS = [field.name for field in dataclasses.fields(Explanation) if field.type in ("Tensor", "Tensor | None")]


def save_explanations(path: str | Path, explanations: Sequence[Explanation]) -> None:
    """Write explanations as JSON.

    Raises:
        OSError: If the file cannot be written.
    """
    names = [field.name for field in dataclasses.fields(Explanation)]
    rows = [{name: _plain(getattr(x, name)) for name in names if name != "image"} for x in explanations]
    for row, explanation in zip(rows, explanations):
        row["image"] = _encoded(explanation.image)
    write_text(path, json.dumps({"version": VERSION, "explanations": rows}, ensure_ascii=False) + "\n")


def load_explanations(path: str | Path) -> list[Explanation]:
    """Read explanations that `save_explanations` wrote, for `report.render_report` for example.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file holds something else, or has another version.
    """
    content = read_json(path)
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}; expected {VERSION}, as save_explanations of this version "
            "of capsule_heads writes it."
        )
    try:
        return [_explanation(row) for row in content["explanations"]]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no explanations ({error}); expected a file that save_explanations wrote."
        ) from None


def _plain(value: Any) -> Any:
    """Return a value of an explanation in the form that JSON takes."""
    if isinstance(value, Tensor):
        # Nine digits identify a float32 number.
        return [float(f"{x:.9g}") for x in value.tolist()] if value.ndim == 1 else [_plain(x) for x in value]
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _explanation(row: dict[str, Any]) -> Explanation:
    """Return the explanation in a row of the file."""
    n_classes = len(row["labels"])
    fields = {name: _tuples(value) for name, value in row.items()}
    for name in TENSORS:
        fields[name] = None if row[name] is None else torch.tensor(row[name])
    fields["parts"] = fields["parts"].reshape(-1, n_classes)  # there may be no parts
    fields["credits"] = tuple(torch.tensor(x).reshape(-1, n_classes) for x in row["credits"])
    fields["image"] = _decoded(row["image"])
    return Explanation(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value


def _encoded(image: Any) -> dict[str, str] | None:
    """Encode an image as text: an image of Pillow as PNG, an array in NumPy's format."""
    if image is None:
        return None
    buffer = io.BytesIO()
    kind = "npy" if isinstance(image, Tensor | np.ndarray) else "png"
    if kind == "npy":
        np.save(buffer, np.asarray(image), allow_pickle=False)
    else:
        image.save(buffer, format="PNG")
    return {kind: base64.b64encode(buffer.getvalue()).decode()}


def _decoded(encoded: dict[str, str] | None) -> Any:
    """Invert `_encoded`; a tensor comes back as an array."""
    if encoded is None:
        return None
    ((kind, text),) = encoded.items()
    buffer = io.BytesIO(base64.b64decode(text))
    if kind == "npy":
        return np.load(buffer, allow_pickle=False)
    from PIL import Image  # installed by the extra for images

    image = Image.open(buffer)
    image.load()
    return image
