"""A classifier of texts with scikit-learn's interface."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from .data.inputs import list_inputs
from .files import read_json, write_json

if TYPE_CHECKING:
    from sklearn.utils import Tags

    from .data import OwnData
    from .models import CapsuleHeadClassifier

FILE = "estimator.json"
OWN = ("backbone", "batch_size", "random_state", "verbose")
# Options of a training run that an estimator sets itself, or that would have no effect.
NOT_OPTIONS = (
    *("data", "text", "label", "validation", "test", "data_config", "data_split", "problem_type", "task", "source"),
    *("phrases", "early_stopping_patience", "backbone", "seed", "output_dir", "disable_tqdm", "do_eval", "do_predict"),
    *("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "push_to_hub"),
    "per_device_eval_batch_size",
)


class HeadClassifier(ClassifierMixin, BaseEstimator):
    """Classify texts by a capsule head on a backbone, with the interface of scikit-learn.

    It works in a `Pipeline`, in `cross_val_score` and in `GridSearchCV`. Texts are strings, or tuples of two for pairs.
    Classes may be words, numbers or truth values, and predictions have the same type.

    Args:
        backbone: as for `capsule-heads train`: a model on the Hub, a directory, or package:NAME/FOLDER.
        batch_size: number of texts that are predicted at once.
        random_state: random seed of the training.
        verbose: whether to show progress bars.
        **options: of the head (`n_parts=16`), the model (`head_type="linear"`, `layers=[-1]`), the preparation of texts
            (`max_length=64`) and the training (`learning_rate=2e-3`), by their names in `capsule-heads train`.

    Attributes:
        classes_: `[n_classes]`, the classes in order.
        model_: the trained model, as `from_pretrained` returns it.
        tokenizer_: its tokenizer.

    Example:
        >>> classifier = HeadClassifier("sentence-transformers/all-MiniLM-L6-v2")
        >>> classifier.fit(texts, labels).predict(["Worth every minute of the queue."])
    """

    classes_: np.ndarray
    model_: CapsuleHeadClassifier
    tokenizer_: Any

    def __init__(
        self, backbone: str = "", *, batch_size: int = 32, random_state: int = 0, verbose: bool = False, **options: Any
    ) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose
        self.__dict__.update(options)  # as if they stood in the signature

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return all arguments by name, and all options that are set."""
        # A name that ends with "_" belongs to a fitted attribute, and one that begins with it to scikit-learn.
        return {name: value for name, value in vars(self).items() if not name.startswith("_") and name[-1] != "_"}

    @property
    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in self.get_params().items() if name not in OWN}

    def set_params(self, **params: Any) -> Self:
        """Set arguments by name.

        Raises:
            ValueError: If there is no option of that name.
        """
        _check_names(set(params) - {*OWN})
        self.__dict__.update(params)
        return self

    def __sklearn_tags__(self) -> Tags:
        """Return scikit-learn's tags: inputs are texts, and labels are needed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.non_deterministic = False
        return tags

    def fit(self, X: Any, y: Any) -> Self:  # scikit-learn's names
        """Train a new head.

        Args:
            X: `[n]` texts, or tuples of two.
            y: `[n]` classes.

        Returns:
            The classifier itself.

        Raises:
            ValueError: If the numbers of texts and classes differ, there are fewer than two classes, an option is
                unknown or does not fit, or an entry of X is not a text.
            OSError: If the backbone is not found.
        """
        from transformers import PrinterCallback

        from .cli.options.quiet import without_data_bars
        from .tasks import own_task
        from .training import CapsuleTrainingArguments
        from .training.run import DataArguments, ModelArguments, TrainingRun

        if not self.backbone:
            raise ValueError("backbone is not given; expected the name of a model on the Hub, or a directory.")
        _check_names(set(self._options))
        texts, classes = _check_texts(X), _check_classes(y)
        if len(texts) != len(classes):
            raise ValueError(f"X has {len(texts)} texts and y {len(classes)} classes; expected a class for each text.")
        self.classes_, numbers = np.unique(classes, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has {len(self.classes_)} class; expected two classes or more.")
        groups = {cls: _options_of(cls, self._options) for cls in (DataArguments, ModelArguments)}
        training = _options_of(CapsuleTrainingArguments, self._options)
        taken = {*groups[DataArguments], *groups[ModelArguments], *training}
        quiet = contextlib.nullcontext() if self.verbose else without_data_bars()
        with quiet, tempfile.TemporaryDirectory() as folder:
            run = TrainingRun(
                DataArguments(**groups[DataArguments]),
                ModelArguments(backbone=self.backbone, **groups[ModelArguments]),
                {name: value for name, value in self._options.items() if name not in taken},
                CapsuleTrainingArguments(
                    folder,
                    **{"save_strategy": "no", "report_to": "none", **training},
                    seed=self.random_state,
                    disable_tqdm=not self.verbose,
                ),
                own_task(_as_data(texts, numbers, self.classes_)),
            )
            run.trainer.remove_callback(PrinterCallback)  # it is added if there is no progress bar
            run.trainer.train()
        self.model_, self.tokenizer_ = run.model.cpu().eval(), run.processor
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, `[n, n_classes]`, in the order of `classes_`.

        Args:
            X: `[n]` texts, or tuples of two.

        Raises:
            NotFittedError: If the classifier was not trained.
            ValueError: If an entry of X is not a text.
        """
        from .predicting import Scorer

        check_is_fitted(self, "model_")
        texts = _check_texts(X)
        found = Scorer(self.model_, self.tokenizer_, self.batch_size)(texts)
        for row, error in found.faults.items():
            raise ValueError(f"Row {row} of X is {texts[row]!r:.80}, which has no score: {error}.")
        return found.scores.double().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each text, `[n]`.

        Args:
            X: `[n]` texts, or tuples of two.

        Raises:
            NotFittedError: If the classifier was not trained.
            ValueError: If an entry of X is not a text.
        """
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def save(self, folder: str | Path) -> None:
        """Save the classifier as a run that `from_pretrained`, `capsule-heads predict` and `load` can read.

        Args:
            folder: folder to write to; created if it does not exist.

        Raises:
            NotFittedError: If the classifier was not trained.
            OSError: If files cannot be written.
            TypeError: If an option cannot be written as JSON.
        """
        check_is_fitted(self, "model_")
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(folder)
        classes = {"classes": self.classes_.tolist(), "dtype": str(self.classes_.dtype)}
        write_json(Path(folder, FILE), {"params": self.get_params(), **classes})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load a classifier that `save` wrote.

        Raises:
            OSError: If the folder does not hold a classifier.
            ValueError: If its files are damaged.
        """
        from .models.processors import processor_of
        from .tasks import load_classifier

        saved = read_json(Path(folder, FILE))
        classifier = cls(**saved["params"])
        classifier.classes_ = np.array(saved["classes"], dtype=saved["dtype"])
        classifier.model_ = load_classifier(str(folder))
        classifier.tokenizer_ = processor_of(classifier.model_)
        return classifier


def _known_options() -> set[str]:
    from .models.configuration_capsule_head import option_names
    from .training import CapsuleTrainingArguments
    from .training.run import DataArguments, ModelArguments

    classes = (DataArguments, ModelArguments, CapsuleTrainingArguments)
    return ({x.name for cls in classes for x in dataclasses.fields(cls)} | option_names()) - {*NOT_OPTIONS}


def _check_names(names: set[str]) -> None:
    known = _known_options() if names else set()
    for name in sorted(names - known):
        close = difflib.get_close_matches(name, known | {*OWN}, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ValueError(
            f"Invalid parameter {name!r} of HeadClassifier; expected an option of capsule-heads train for texts, the "
            f"model or its training{hint}"
        )


def _options_of(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    return {x.name: options[x.name] for x in dataclasses.fields(cls) if x.name in options}


def _check_texts(given: Any) -> list[Any]:
    """Return a user's texts, and tuples of two texts, as a list."""
    if isinstance(given, str):
        raise ValueError("X is one text; expected a list of texts.")
    texts = [_as_text(x) for x in list_inputs(given, "text")]
    for row, text in enumerate(texts):
        parts = text if isinstance(text, tuple) else (text,)
        if len(parts) > 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"Row {row} of X is {text!r:.80}; expected a text, or a tuple of two for a pair.")
    if len({isinstance(text, tuple) for text in texts}) > 1:
        raise ValueError("X has single texts and pairs; expected one of them.")
    return texts


def _as_text(value: Any) -> Any:
    value = tuple(value) if isinstance(value, list | np.ndarray) else value  # a row of a table
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _check_classes(given: Any) -> np.ndarray:
    if given is None:
        raise ValueError(
            "HeadClassifier requires y to be passed, but the target y is None; expected a class for each text."
        )
    classes = np.asarray(given)
    if classes.ndim == 2 and classes.shape[1] == 1:
        classes = classes[:, 0]
    if classes.ndim != 1:
        raise ValueError(
            f"y has the shape {list(classes.shape)}; expected one class for each text: capsule-heads train accepts "
            "several."
        )
    if classes.dtype.kind == "f" and not (np.isfinite(classes).all() and (classes == np.floor(classes)).all()):
        raise ValueError("Unknown label type: y holds numbers that are not whole; expected classes, not a regression.")
    if classes.dtype.kind == "O" and any(x is None or x != x for x in classes):
        raise ValueError("y has a row without a class; expected a class in every row.")
    return classes


def _as_data(texts: list[Any], numbers: np.ndarray, classes: np.ndarray) -> OwnData:
    """Return training data, with names of classes in the order of their numbers."""
    from datasets import ClassLabel, Dataset, Features, Value

    from .data import OwnData

    columns = list(zip(*texts)) if isinstance(texts[0], tuple) else [texts]
    names = [str(name) for name in classes]
    rows = {**dict(zip(("text", "text_pair"), map(list, columns))), "label": numbers.tolist()}
    features = {name: Value("string") for name in rows} | {"label": ClassLabel(names=names)}
    data = OwnData(train=Dataset.from_dict(rows, features=Features(features)))
    data.modality, data.problem_type, data.class_names = "text", "single_label_classification", names
    data.inputs_from, data.labels_from = ["X"], ["y"]
    return data
