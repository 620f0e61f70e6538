"""Labelled audio files, and what a model takes of them."""

from __future__ import annotations

import bisect
import functools
import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from torch import Tensor

from .folders import SPLIT_NAMES
from .inputs import AUDIO_SUFFIXES, count_kinds, download, is_address
from .splits import made_when_read, with_validation

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..models import CapsuleHeadClassifier

OPEN_END = 0x7FFFF000  # bytes of samples that WAV files announce, or more, whose end was not known when they began
LONGEST_FRAME = 1  # seconds: no backbone's frame is longer
LAYOUT = "train/CLASS/*.wav and the like"
# Whole numbers that stand for audio: what is silence, and what is 1.
SCALES = {np.dtype("uint8"): (128, 128), np.dtype("int16"): (0, 2**15), np.dtype("int32"): (0, 2**31)}


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
        ValueError: If there is no source, no training split or fewer than two classes, a file is in no class's folder
            or has a name that is not UTF-8, or a class has a single training file and there is no validation split.
        FileNotFoundError: If the source does not exist.
    """
    import datasets

    if source is None:
        raise ValueError(f"audio_folder needs a source: a directory with {LAYOUT}.")
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"No audio at {source}: there is no such directory.")
    kinds = count_kinds(root)
    if not kinds["audio"] and kinds["image"]:
        raise ValueError(f"{source} has {kinds['image']} images and no audio files; use the task image_folder.")
    files = {split: _find_files(root, folders) for split, folders in SPLIT_NAMES.items()}
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
            if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith("."):
                continue
            if len(path.relative_to(root).parts) != 3:
                raise ValueError(f"{path} is not in the folder of a class; expected {LAYOUT}.")
            found.append(path)
    return found


def as_audio(given: Any, sampling_rate: int, name: str = "The audio") -> np.ndarray:
    """Return audio as a feature extractor gets it: in training, prediction, explanations and the demo.

    Audio at another sampling rate is resampled. Whole numbers, such as int16, are scaled to -1 to 1, as those of a file
    are. A pipeline of transformers leaves them as they are, so pass it what this function returns.

    Args:
        given: A path or an address; the bytes of a file; a mapping with `sampling_rate` and `array` or `raw`, or with
            the `bytes` or `path` of a file; a decoder of torchcodec, which `datasets` returns; or an array or tensor
            `[samples]` at the sampling rate that is returned.
        sampling_rate: Samples per second to return: the backbone's, `feature_extractor.sampling_rate`.
        name: Of the audio, for messages; that of a file is its path.

    Returns:
        `[samples]`, float32, from -1 to 1.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If it is something else, or no numbers.
        ValueError: If it cannot be read, is empty, has several channels, no sampling rate or values that are not
            finite.
        ImportError: If a file is given, and the package soundfile is not installed.
    """
    found_rate: Any = sampling_rate
    if isinstance(given, Mapping) and ("array" in given or "raw" in given):
        if "sampling_rate" not in given:
            raise ValueError(f"{name} has no sampling_rate; expected one beside {' and '.join(given)}.")
        found_rate, given = given["sampling_rate"], given["raw"] if given.get("raw") is not None else given["array"]
    elif isinstance(given, Mapping):
        path, content = given.get("path"), given.get("bytes")
        given, name = (path, name) if content is None else (content, path or name)
    if isinstance(given, str | os.PathLike | bytes):
        samples, found_rate = _read_file(given, name)
    elif hasattr(given, "get_all_samples"):
        decoded = given.get_all_samples()
        samples, found_rate = decoded.data.mean(0).numpy(), decoded.sample_rate
    else:
        samples = _read_samples(given, name)
    if isinstance(found_rate, bool) or not isinstance(found_rate, int | np.integer) or found_rate < 1:
        raise ValueError(f"{name} has the sampling_rate {found_rate!r}; expected a whole number of samples per second.")
    return _resample(samples, int(found_rate), sampling_rate)


def open_audio(path: str | os.PathLike[str], sampling_rate: int) -> np.ndarray:
    """Read an audio file, and resample it, as `as_audio` does.

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
    return as_audio(path, sampling_rate)


def _read_file(given: str | os.PathLike[str] | bytes, name: str) -> tuple[np.ndarray, int]:
    """Return the samples of a file, of its channels' mean, and their rate."""
    if not isinstance(given, bytes):
        name = os.fspath(given)
        if is_address(name):
            given = download(name)
        elif not os.path.isfile(name):
            raise FileNotFoundError(f"{name:.200} is not a file; expected an audio file.")
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            'To read audio files, soundfile is needed, which is not installed: pip install "capsule-heads[audio]".'
        ) from error
    try:
        with io.BytesIO(given) if isinstance(given, bytes) else open(given, "rb") as content:
            n_missing = _missing_from_wav(content)
        file = io.BytesIO(given) if isinstance(given, bytes) else given
        with soundfile.SoundFile(file) as opened:
            samples, rate = opened.read(dtype="float32", always_2d=True), opened.samplerate
            n_frames = opened.frames
    except (OSError, soundfile.SoundFileError, TypeError) as error:  # TypeError for a file of samples alone
        reason = getattr(error, "error_string", error)
        raise ValueError(f"{name} is not an audio file that can be read: {reason}") from None
    if n_missing:
        raise ValueError(
            f"{name} is cut short: its header announces {n_missing} bytes more than there are; fetch it again."
        )
    if len(samples) < n_frames:
        raise ValueError(
            f"{name} is cut short: its header announces {n_frames} samples, and {len(samples)} are there; fetch it "
            "again."
        )
    return _checked(samples.mean(axis=1), name), rate


def _missing_from_wav(file: BinaryIO) -> int:
    """Return how many bytes of samples a WAV file lacks of those that its header announces; 0 for other files.

    The library that reads it takes what is there. Programs that write to a pipe announce as much as can be.
    """
    header = file.read(12)
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return 0
    while len(chunk := file.read(8)) == 8:
        size = int.from_bytes(chunk[4:], "little")
        if chunk[:4] == b"data":
            start = file.tell()
            return 0 if size >= OPEN_END else max(0, size - (file.seek(0, os.SEEK_END) - start))
        file.seek(size + size % 2, os.SEEK_CUR)
    return 0


def _read_samples(given: Any, name: str) -> np.ndarray:
    """Return the samples of an array, tensor or list, `[samples]`, in float32."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    samples = np.asarray(given)
    if samples.ndim == 0 or samples.dtype not in (*SCALES, np.float16, np.float32, np.float64):
        kind = type(given).__name__ if samples.ndim == 0 else f"{samples.dtype} array"
        raise TypeError(
            f"{name} is a {kind}; expected audio as an array [samples] of floats from -1 to 1 or of int16, the path of "
            "a file, or a mapping of array and sampling_rate."
        )
    if samples.ndim != 1:
        raise ValueError(
            f"{name} has the shape {list(samples.shape)}; expected [samples]: average the channels, as with "
            ".mean(axis=0) for [channels, samples]."
        )
    zero, most = SCALES.get(samples.dtype, (0, 1))
    return _checked((samples.astype(np.float32) - zero) / np.float32(most), name)


def _checked(samples: np.ndarray, name: str) -> np.ndarray:
    if not len(samples):
        raise ValueError(f"{name} has no samples; expected audio.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} has samples that are not finite; expected numbers from -1 to 1.")
    return samples


def _resample(samples: np.ndarray, found_rate: int, sampling_rate: int) -> np.ndarray:
    if found_rate == sampling_rate:
        return samples
    from scipy.signal import resample_poly

    divisor = math.gcd(found_rate, sampling_rate)
    return resample_poly(samples, sampling_rate // divisor, found_rate // divisor).astype(np.float32)


def audio_features(
    samples: np.ndarray, feature_extractor: FeatureExtractor, name: str = "The audio"
) -> dict[str, np.ndarray]:
    """Return what a model takes of one recording: its input and, if the feature extractor makes one, `attention_mask`.

    Args:
        samples: `[samples]`, at the feature extractor's sampling rate, from `as_audio`.
        feature_extractor: The backbone's.
        name: Of the audio, for messages.

    Raises:
        ValueError: If the feature extractor makes no input of an audio model, or nothing of so few samples.
    """
    from ..backbones.parts import NAMES

    input_name = _input_name(feature_extractor)
    try:
        made = feature_extractor(
            samples, sampling_rate=feature_extractor.sampling_rate, return_attention_mask=True, return_tensors="np"
        )
    except ValueError as error:  # fewer samples than a spectrum needs
        raise ValueError(
            f"{name} has {len(samples)} samples, of which {type(feature_extractor).__name__} makes nothing ({error}); "
            "expected a longer recording."
        ) from error
    found = {input_name: made[input_name][0]}
    for mask_name in NAMES["attention_mask"]:
        if mask_name in made:
            return {**found, "attention_mask": made[mask_name][0]}
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


def check_audio(
    splits: Mapping[str, Dataset], feature_extractor: FeatureExtractor, model: CapsuleHeadClassifier
) -> None:
    """Read all audio files, so that one that is damaged or too short is found before training.

    Args:
        splits: As `load_audio_folder` returns them.
        feature_extractor: The backbone's.
        model: The classifier, with its backbone.

    Raises:
        ValueError: If a file cannot be read, or makes no frame of the backbone; the message names it.
    """
    least = least_samples(feature_extractor, model)
    for split in splits.values():
        for path in split["audio"]:
            check_length(open_audio(path, feature_extractor.sampling_rate), least, path)


def check_length(samples: np.ndarray, least: int, name: str) -> None:
    """Check that there are as many samples as a frame of the backbone needs.

    Raises:
        ValueError: If there are fewer.
    """
    if len(samples) < least:
        raise ValueError(
            f"{name} has {len(samples)} samples at the backbone's sampling rate, too few for one frame; expected at "
            f"least {least}."
        )


def least_samples(feature_extractor: FeatureExtractor, model: CapsuleHeadClassifier) -> int:
    """Return the least number of samples that make a frame of a model's backbone; 1 if that does not say.

    Args:
        feature_extractor: The backbone's.
        model: The classifier; without its backbone it has no frames to count.
    """
    from ..backbones.running import check_frames

    backbone = model.backbone
    if backbone is None:
        return 1
    collate = AudioCollator(feature_extractor)

    def makes_a_frame(n_samples: int) -> bool:
        try:
            check_frames(collate([audio_features(np.zeros(n_samples, np.float32), feature_extractor)]), backbone)
        except ValueError:
            return False
        return True

    lengths = range(1, LONGEST_FRAME * feature_extractor.sampling_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of means of nothing
        return 1 + bisect.bisect_left(lengths, True, key=makes_a_frame)


def _features_of_files(feature_extractor: FeatureExtractor, paths: list[str]) -> dict[str, list[np.ndarray]]:
    rows = [audio_features(as_audio(x, feature_extractor.sampling_rate), feature_extractor, x) for x in paths]
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
