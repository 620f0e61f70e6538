"""Predictions for a file of rows, or a folder of files: streamed, and resumed where they were stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.images import warn_of_scaled
from ..data.writing import writer_for
from ..engines import Actors, run_on_ray
from ..files import holding, read_json, write_json, writing
from ..hub.results import columns_of_training
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..models.processors import modality_of, processor_of
from ..version import __version__
from ..weights import digest_weights
from .answers import Answer, Answers
from .rows import FolderRows, TableRows
from .scoring import Scored, Scorer, tokens_at_most

logger = logging.getLogger(__name__)

CHUNK = 1024  # rows that are read, scored and kept at once
STATE, LOCK = "state.json", "lock"
SECONDS_TO_LOCK = 1.0
ON_A_FULL_DISK = "make room, and the same command resumes"


@dataclass
class Tally:
    """Counts over all rows."""

    rows: int = 0
    chunks: int = 0
    unanswered: int = 0
    abstained: int = 0
    texts: int = 0
    cut: int = 0
    longest: int = 0  # number of tokens in the longest text
    scaled: int = 0
    first_fault: str = ""  # why a file cannot be read


@dataclass(frozen=True)
class Prediction:
    """What to predict, and where to write it.

    Attributes:
        source: a table of texts, or a folder of images or audio.
        output: the file to write: .csv, .jsonl or .parquet.
        text: names of the columns of texts; None for the columns of training, or those with usual names.
        top_k: number of the most probable classes to give, instead of all.
        abstain_below: no label is given if the best probability is below this number.
        batch_size: number of inputs that are scored at once.
        hidden_states: folders to read the hidden states of texts from, instead of computing them.
        actors: actors of a Ray cluster that score the inputs; None to score them in this process.
    """

    source: Path
    output: Path
    text: Sequence[str] | None = None
    top_k: int | None = None
    abstain_below: float | None = None
    batch_size: int = 32
    hidden_states: Sequence[str] = ()
    actors: Actors | None = None

    def check(self) -> None:
        """Check source and output, before a model is loaded.

        Raises:
            OSError: If the source does not exist, or the output cannot be written.
            ValueError: If the output has another suffix, or is the source.
        """
        writer_for(self.output)
        if not self.source.exists():
            raise FileNotFoundError(f"There is no file or folder {self.source}.")
        if self.output.is_dir() or not self.output.parent.is_dir():
            raise FileNotFoundError(f"{self.output} cannot be written; expected a file in a folder that exists.")
        if self.output.exists() and self.output.samefile(self.source):
            raise ValueError(f"The output is the input, {self.source}; expected another file.")

    @property
    def unfinished(self) -> Path:
        """The folder of the parts that are done, until all are."""
        return self.output.with_name(f"{self.output.name}.part")


def unfinished_rows(prediction: Prediction) -> int:
    """Return the number of rows that an interrupted prediction has done."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(read_json(prediction.unfinished / STATE)["tally"]["rows"])
    return 0


def predict_file(model: CapsuleHeadClassifier, prediction: Prediction, processor: Any = None) -> None:
    """Write a file with all rows and columns of another, in order, and the model's answers beside them.

    Parts that are done stay in a folder beside the output, `OUTPUT.part`. When all are done, the output gets its name.
    The same call resumes there if source, model and options are the same, and restarts otherwise. Memory does not grow
    with the number of rows. The log counts inputs without an answer, texts that are cut, and images that are scaled.

    Args:
        model: the classifier.
        prediction: what to predict.
        processor: the model's processor; None to load it.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If source, output and model do not fit each other, or a row is not as expected.
    """
    prediction.check()
    run = _Run(model, prediction)
    with _locked(prediction.unfinished):
        run.resume()
        run.predict(processor)
        run.finish()
    shutil.rmtree(prediction.unfinished, ignore_errors=True)


class _Run:
    """A prediction that is running."""

    def __init__(self, model: CapsuleHeadClassifier, prediction: Prediction) -> None:
        self.model, self.prediction, self.folder = model, prediction, prediction.unfinished
        self.rows = _open_rows(model, prediction)
        taken = self.rows.columns
        self.answers = Answers(model.config, prediction.top_k, prediction.abstain_below, taken)
        self.writer = writer_for(prediction.output)(self.rows.table, self.answers.columns)
        self.tally = Tally()
        self.most_tokens: int | None = None
        if self.answers.is_renamed:
            new = ", ".join(self.answers.columns)
            logger.warning("%s has columns named like answers, so new ones are called %s.", self.rows.path, new)

    def resume(self) -> None:
        """Find the parts that are done of this prediction, and delete those of another."""
        self.identity = self._identify()
        if (self.folder / STATE).exists():
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                state = read_json(self.folder / STATE)
                tally = Tally(**state["tally"])
                if state["identity"] == self.identity and all(self._part(n).is_file() for n in range(tally.chunks)):
                    self.tally = tally
                    logger.warning("Resumed: %d of %d %ss are done.", tally.rows, self.rows.n, self.rows.noun)
                    return
            logger.warning("%s is of another input, model or options; all rows are predicted again.", self.folder)
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()
        self._save()

    def _identify(self) -> dict[str, Any]:
        """Return what has to be the same for a prediction to be resumed."""
        return {
            "source": self.rows.digest(),
            "config": hashlib.sha256(self.model.config.to_json_string().encode()).hexdigest(),
            "weights": digest_weights(self.model),
            "texts": self.rows.texts,
            "columns": list(self.answers.columns),
            "abstain_below": self.prediction.abstain_below,
            "hidden_states": list(self.prediction.hidden_states),  # they may be rounded
            "chunk": CHUNK,
            "version": __version__,
        }

    def _save(self) -> None:
        write_json(self.folder / STATE, {"identity": self.identity, "tally": asdict(self.tally)})

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06}{self.prediction.output.suffix}"

    def predict(self, processor: Any) -> None:
        """Predict all rows that are not done, and keep each chunk."""
        from transformers.utils import logging as transformers_logging

        rows, tally = self.rows, self.tally
        processor = processor_of(self.model) if processor is None else processor
        self.most_tokens = tokens_at_most(self.model, processor)
        with transformers_logging.tqdm(
            desc="Predicting", total=rows.n, initial=tally.rows, unit=f" {rows.noun}s"
        ) as bar:
            for columns, inputs, scored in self._chunks(processor, bar.update):
                known = [row for row, given in enumerate(inputs) if given is not None]
                answers: list[Answer | None] = [None] * len(inputs)
                for place, row in enumerate(known):
                    if place not in scored.faults:
                        answers[row] = self.answers.answer(scored.scores[place])
                new = dict(zip(self.answers.columns, map(list, zip(*map(self.answers.row, answers)))))
                with writing(self._part(tally.chunks), ON_A_FULL_DISK):
                    self.writer.write_part(self._part(tally.chunks), {**columns, **new})
                self._count(scored, answers)
                self._save()

    def _chunks(
        self, processor: Any, show: Callable[[int], object]
    ) -> Iterator[tuple[Mapping[str, list], list[Any], Scored]]:
        """Yield the rows of each chunk that is not done, their inputs, and the scores of inputs that are not None."""
        given, done = self.prediction, self.tally.chunks
        make_scorer = functools.partial(
            Scorer, self.model, processor, given.batch_size, hidden_states=given.hidden_states
        )

        def chunks() -> Iterator[tuple[Mapping[str, list], list[Any]]]:
            return itertools.islice(self.rows.batches(CHUNK), done, None)

        if given.actors is None:
            score = make_scorer(show=show)
            for columns, inputs in chunks():
                known = _known(inputs)
                scored = score(known)
                show(len(inputs) - len(known) + len(scored.faults))
                yield columns, inputs, scored
            return
        # Actors get all inputs. The columns beside them are read again when answers come back.
        of_actors = run_on_ray(make_scorer, (_known(inputs) for _, inputs in chunks()), given.actors)
        for (columns, inputs), scored in zip(chunks(), of_actors, strict=True):
            show(len(inputs))
            yield columns, inputs, scored

    def _count(self, scored: Scored, answers: Sequence[Answer | None]) -> None:
        tally = self.tally
        tally.chunks += 1
        tally.rows += len(answers)
        tally.unanswered += answers.count(None)
        if self.prediction.abstain_below is not None:
            tally.abstained += sum(answer is not None and not answer.labels for answer in answers)
        tally.texts += len(scored.lengths)
        tally.cut += sum(length > (self.most_tokens or length) for length in scored.lengths)
        tally.longest = max([tally.longest, *scored.lengths])
        tally.scaled += scored.n_scaled
        tally.first_fault = tally.first_fault or next(map(str, scored.faults.values()), "")

    def finish(self) -> None:
        """Join all parts under the output's name, and log the counts."""
        tally, rows = self.tally, self.rows
        complete = self.folder / f"complete{self.prediction.output.suffix}"
        with writing(complete, ON_A_FULL_DISK):
            parts = (self._part(n) for n in range(tally.chunks))
            self.writer.join([*rows.columns, *self.answers.columns], parts, complete)
            complete.replace(self.prediction.output)
        if tally.unanswered:
            first = f"; the first: {tally.first_fault}" if rows.table is None else ""
            logger.warning(
                "No prediction for %d of %d %ss, %s%s.", tally.unanswered, rows.n, rows.noun, rows.lacks, first
            )
        if tally.abstained:
            logger.warning(
                "No label for %d of %d %ss, whose best probability is below %g.",
                tally.abstained,
                rows.n,
                rows.noun,
                self.prediction.abstain_below,
            )
        if tally.cut:
            logger.warning(
                "Cut to %d tokens: %d of %d texts, the longest of which has %d tokens.",
                self.most_tokens,
                tally.cut,
                tally.texts,
                tally.longest,
            )
        warn_of_scaled(tally.scaled)


def _known(inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs that are not None."""
    return [value for value in inputs if value is not None]


def _open_rows(model: CapsuleHeadClassifier, prediction: Prediction) -> TableRows | FolderRows:
    modality, source = modality_of(model), prediction.source
    if modality == "text":
        if source.is_dir():
            raise ValueError(f"{source} is a folder, and the model classifies texts; expected a table, such as a CSV.")
        return TableRows(source, prediction.text, columns_of_training(model.config.name_or_path or "")[0])
    if prediction.text is not None:
        raise ValueError(f"text is {','.join(prediction.text)}, and the model classifies {modality}; leave it out.")
    if not source.is_dir():
        raise ValueError(f"{source} is a file, and the model classifies {modality}; expected a folder of such files.")
    return FolderRows(source, modality)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder, which is created if it does not exist.

    Raises:
        OSError: If another process writes to the folder, it holds other files, or it cannot be written to.
    """
    is_ours = any((folder / name).exists() for name in (STATE, LOCK))
    if folder.exists() and not is_ours and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds other files, and a prediction keeps its finished parts there; move it, or choose another "
            "output."
        )
    folder.mkdir(exist_ok=True)
    otherwise = f"Another process writes to {folder}; wait until it has ended, or choose another output."
    with holding(folder / LOCK, SECONDS_TO_LOCK, otherwise):
        yield
