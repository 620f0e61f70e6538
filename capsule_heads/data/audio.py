"""Labelled audio files, and what a model takes of them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .splits import made_when_read, with_validation

if TYPE_CHECKING:
    from datasets import DatasetDict
    from torch import Tensor

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# Names of folders with a split's files, as `datasets` knows them for folders of images.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
LAYOUT = "train/CLASS/*.wav and the like"


class FeatureExtractor(Protocol):
    """A feature extractor of transformers for audio, such as `Wav2Vec2FeatureExtractor`.

    Attributes:
        sampling_rate: Samples per second that it takes.
        model_input_names: Names of what it makes.
    """

    sampling_rate: int
    model_input_names: list[str]

    def __call__(self, raw_speech: np.ndarray, **options: Any) -> Mapping[str, Any]:
        """Return what a model takes of one recording."""

    def pad(self, processed_features: list[dict[str, Any]], **options: Any) -> Mapping[str, Any]:
        """Return a padded batch."""


def load_audio_folder(source: str | os.PathLike[str] | None) -> DatasetDict:
    """Load labelled audio files from a directory with a folder per class, as `load_images("image_folder")` does images.

    Where there is no validation split, a tenth of the training files of each class are split off, always the same ones.

    Args:
        source: A directory with `train/CLASS/*.wav` and the like: WAV, FLAC, Ogg or MP3.

    Returns:
        The splits `train`, `validation` and, where there is one, `test`, with `audio`, the path of each file, and
        `label`. Files are not opened.

    Raises:
        ValueError: If there is no source, no training split or fewer than two classes, a file is in no class's folder,
            or a class has a single training file and there is no validation split.
        FileNotFoundError: If the source does not exist.
    """
    import datasets

    if source is None:
        raise ValueError(f"audio_folder needs a source: a directory with {LAYOUT}.")
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"No audio at {source}: there is no such directory.")
    files = {split: _find_files(root, folders) for split, folders in SPLIT_FOLDERS.items()}
    files = {split: found for split, found in files.items() if found}
    names = sorted({path.parent.name for found in files.values() for path in found})
    if len(names) < 2:
        raise ValueError(f"{source} has {len(names)} folders with audio; expected {LAYOUT} for two classes or more.")
    features = datasets.Features({"audio": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split, found in files.items():
        columns = {"audio": [str(path) for path in found], "label": [names.index(path.parent.name) for path in found]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return with_validation(datasets.DatasetDict(splits), str(source), "file")


def _find_files(root: Path, folders: Sequence[str]) -> list[Path]:
    """Return a split's audio files, in order."""
    found = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            if len(path.relative_to(root).parts) != 3:
                raise ValueError(f"{path} is not in the folder of a class; expected {LAYOUT}.")
            found.append(path)
    return found


def open_audio(path: str | os.PathLike[str], sampling_rate: int) -> np.ndarray:
    """Read an audio file, and resample it.

    Args:
        path: A WAV, FLAC, Ogg or MP3 file; its channels are averaged.
        sampling_rate: Samples per second to return: the backbone's, `feature_extractor.sampling_rate`.

    Returns:
        `[samples]`, float32, from -1 to 1.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not audio, damaged, or empty.
        ImportError: If the package soundfile is not installed.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file; expected an audio file.")
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            'To read audio files, soundfile is needed, which is not installed: pip install "capsule-heads[audio]".'
        ) from error
    from scipy.signal import resample_poly

    try:
        samples, found_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError for a file of samples alone
        raise ValueError(f"{path} is not an audio file that can be read: {error}") from None
    if not len(samples):
        raise ValueError(f"{path} has no samples; expected audio.")
    mono = samples.mean(axis=1)
    if found_rate == sampling_rate:
        return mono
    divisor = math.gcd(found_rate, sampling_rate)
    return resample_poly(mono, sampling_rate // divisor, found_rate // divisor).astype(np.float32)


def audio_features(samples: np.ndarray, feature_extractor: FeatureExtractor) -> dict[str, np.ndarray]:
    """Return what a model takes of one recording: its input and, if the feature extractor makes one, `attention_mask`.

    Args:
        samples: `[samples]`, at the feature extractor's sampling rate, from `open_audio`.
        feature_extractor: The backbone's.

    Raises:
        ValueError: If the feature extractor makes no input of an audio model.
    """
    from ..backbones.parts import NAMES

    input_name = _input_name(feature_extractor)
    made = feature_extractor(
        samples, sampling_rate=feature_extractor.sampling_rate, return_attention_mask=True, return_tensors="np"
    )
    found = {input_name: made[input_name][0]}
    for name in NAMES["attention_mask"]:
        if name in made:
            return {**found, "attention_mask": made[name][0]}
    return found


def _input_name(feature_extractor: FeatureExtractor) -> str:
    from ..backbones.parts import AUDIO_INPUTS

    for name in AUDIO_INPUTS:
        if name in feature_extractor.model_input_names:
            return name
    raise ValueError(
        f"{type(feature_extractor).__name__} makes {', '.join(feature_extractor.model_input_names)}; expected a "
        f"feature extractor that makes {' or '.join(AUDIO_INPUTS)}."
    )


def prepare_audio(splits: DatasetDict, feature_extractor: FeatureExtractor) -> DatasetDict:
    """Give audio the columns that a Trainer takes: the model's input and `labels`, made when they are read.

    A file that cannot be read then raises a `ValueError` that names it. `AudioCollator` makes batches of the rows.

    Args:
        splits: With `audio`, the path of each file, and `label`.
        feature_extractor: The backbone's.

    Raises:
        ValueError: If the feature extractor makes no input of an audio model.
    """
    import datasets

    name = _input_name(feature_extractor)
    make = functools.partial(_features_of_files, feature_extractor)
    return datasets.DatasetDict({split: made_when_read(rows, "audio", name, make) for split, rows in splits.items()})


def _features_of_files(feature_extractor: FeatureExtractor, paths: list[str]) -> dict[str, list[np.ndarray]]:
    rows = [audio_features(open_audio(path, feature_extractor.sampling_rate), feature_extractor) for path in paths]
    return {name: [row[name] for row in rows] for name in rows[0]}


@dataclass
class AudioCollator:
    """Pads a batch of audio to its longest, with the backbone's feature extractor.

    Args:
        feature_extractor: The backbone's.
    """

    feature_extractor: FeatureExtractor

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return what the model takes: its input, `attention_mask` where the rows have one, and `labels`.

        Args:
            features: Rows of `prepare_audio`, or what `audio_features` returns.
        """
        import torch

        names = [name for name in features[0] if name != "labels"]
        batch = self.feature_extractor.pad(
            [{name: row[name] for name in names} for row in features],
            return_attention_mask="attention_mask" in names,
            return_tensors="pt",
        )
        inputs = dict(batch)
        if "labels" in features[0]:
            inputs["labels"] = torch.tensor([row["labels"] for row in features])
        return inputs
