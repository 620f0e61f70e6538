"""Export to ONNX: one file with backbone and head, which is compared with the model before it is kept."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedTokenizerFast, default_data_collator

from ..files import write_json
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..models.processors import modality_of
from ..predicting.scoring import in_batches, tokens_at_most
from . import QUANTIZATIONS

MODEL, LABELS, SERVE = "model.onnx", "labels.json", "serve.py"
MOST_BYTES = 2**31 - 2**20  # of weights in one file: protocol buffers hold 2 GiB, and the graph needs some of them
TOLERANCE = 1e-3  # of a regression's value, in standard deviations of the training labels
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True)
class Check:
    """A comparison of an exported model with the model itself, on some examples.

    Attributes:
        expected: `[n, num_labels]`, the model's logits, or the values of a regression.
        found: `[n, num_labels]`, the same of the exported model.
        n_equal: number of examples with the same predicted labels, or values that differ by less than `TOLERANCE`.
    """

    expected: np.ndarray
    found: np.ndarray
    n_equal: int

    @property
    def largest(self) -> float:
        """The largest difference between two logits, or between two values."""
        return float(np.abs(self.found - self.expected).max())


def export_onnx(
    model: CapsuleHeadClassifier,
    processor: Any,
    examples: Dataset,
    folder: Path,
    collator: Collator | None = None,
    quantize: str | None = None,
    batch_size: int = 32,
) -> Check:
    """Write a classifier as `model.onnx`, with its processor, its labels, and for texts a script that serves it.

    The program takes any batch size, and texts of any length. Its one output, `logits`, `[batch, num_labels]`, holds
    the values if the model is a regression. Weights beyond 2 GiB are in a second file, `model.onnx.data`.

    Args:
        model: the classifier. It is put in evaluation mode, and moved to the CPU, in float32.
        processor: the model's processor.
        examples: two rows or more, prepared for the model by `Task.prepare`. All are compared.
        folder: folder to write to. Files of an earlier export are replaced.
        collator: makes batches; None for transformers' default.
        quantize: "int8" to keep weights, also of embeddings, as 8-bit integers with a scale for each channel.
        batch_size: number of examples that are compared at once.

    Returns:
        The comparison.

    Raises:
        ImportError: If a package of the extra `onnx` is not installed.
        OSError: If the folder cannot be written to.
        ValueError: If `quantize` is something else, there are fewer than two examples, torch cannot export the model,
            or the exported model, not quantized, predicts other labels.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize is {quantize!r}; expected {' or '.join(QUANTIZATIONS)}, or None to keep float32.")
    _check_packages()
    if len(examples) < 2:
        raise ValueError(f"There is {len(examples)} example to export with; expected two or more.")
    model = nn.Module.to(model.eval(), "cpu", torch.float32)
    collate = collator or default_data_collator
    names = [name for name in examples.column_names if name != "length"]
    rows = examples.select_columns(names)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name, MODEL)
        _write(model, _inputs(collate([rows[0], rows[1]])), path)
        if quantize is not None:
            path = _quantize(path, Path(name, quantize, MODEL))
        check = _compare(model, path, (_inputs(collate(batch)) for batch in in_batches(rows, batch_size)))
        if quantize is None and check.n_equal < len(rows):
            raise ValueError(
                f"The exported model predicts other labels than the model for {len(rows) - check.n_equal} of "
                f"{len(rows)} examples (logits differ by {check.largest:.1e} at most), so it was not kept."
            )
        (folder / f"{MODEL}.data").unlink(missing_ok=True)
        for file in path.parent.glob(f"{MODEL}*"):
            shutil.move(file, folder / file.name)
    _write_beside(model, processor, folder)
    return check


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401  # torch and onnxruntime import it where it is needed
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'Export needs {error.name}: pip install "capsule-heads[onnx]".') from None


def _inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name != "labels"}


def _write(model: CapsuleHeadClassifier, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Write the model as a program for any batch size, and any length of texts, and of audio where it can have any."""
    length = {"text": {1: Dim.DYNAMIC}, "audio": {1: Dim.AUTO}, "image": {}}[modality_of(model)]
    dimensions = {0: Dim.DYNAMIC, **length}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (), dict(inputs), dynamic_shapes=dict.fromkeys(inputs, dimensions))
            torch.onnx.export(
                program, (), path, dynamo=True, verbose=False, external_data=model.get_memory_footprint() > MOST_BYTES,
                output_names=["logits"],
            )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        backbone = model.config.base_config.model_type
        raise ValueError(f"torch cannot export this model, with the backbone {backbone}: {reason}") from error


def _quantize(path: Path, target: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target.parent.mkdir()
    is_split = path.with_name(f"{MODEL}.data").exists()
    # A scale for each channel halves the error of one for each matrix.
    quantize_dynamic(path, target, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=is_split)
    return target


def _compare(model: CapsuleHeadClassifier, path: Path, batches: Iterator[dict[str, Tensor]]) -> Check:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    expected, found = [], []
    for inputs in batches:
        with torch.no_grad():
            expected.append(model(**inputs).logits.numpy())
        found += session.run(None, {x.name: inputs[x.name].numpy() for x in session.get_inputs()})
    ours, theirs = np.concatenate(expected), np.concatenate(found)
    return Check(ours, theirs, int(_are_equal(model, ours, theirs).sum()))


def _are_equal(model: CapsuleHeadClassifier, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return `[n]`, whether an example's predictions are the same."""
    config = model.config
    if config.problem_type == "regression":
        return (np.abs(ours - theirs) < TOLERANCE * config.label_std).all(-1)
    if config.problem_type == "multi_label_classification":
        return np.equal(*(expit(x) > np.array(config.label_thresholds) for x in (ours, theirs))).all(-1)
    return ours.argmax(-1) == theirs.argmax(-1)


def _write_beside(model: CapsuleHeadClassifier, processor: Any, folder: Path) -> None:
    """Write the labels, the processor, and the files that serve texts without torch."""
    config = model.config
    is_multi_label = config.problem_type == "multi_label_classification"
    labels = {"problem_type": config.problem_type, "labels": config.class_names}
    write_json(folder / LABELS, labels | ({"thresholds": config.label_thresholds} if is_multi_label else {}))
    processor.save_pretrained(folder)
    if not isinstance(processor, PreTrainedTokenizerFast):
        return
    tokenizer = Tokenizer.from_str(processor.backend_tokenizer.to_str())  # the processor's own stays as it is
    most = tokens_at_most(model, processor)
    if most is not None:
        tokenizer.enable_truncation(most)
    tokenizer.enable_padding(
        direction=processor.padding_side, pad_id=processor.pad_token_id, pad_token=processor.pad_token
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(Path(__file__).with_name(SERVE), folder / SERVE)
