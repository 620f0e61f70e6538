"""Inject faults: kill training, fill its disk, flip bytes of what it wrote, and mutate the files that it reads.

    python scripts/benchmarks/faults.py --seed 1

A trial is right where it ends as it does without the fault: with the same weights to the bit, the same hidden states,
or the same value of a file. A mutated file is read as written where another reader finds the same other value in it: it
is then another file, as good as the first. A trial is refused where it ends in one sentence. All else is wrong. The
script prints a table by kind of fault, and each trial that was wrong with how to repeat it. It ends with status 1 if
there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # forked processes

import datasets
import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from scipy.signal import resample_poly
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast, TrainerCallback

import capsule_heads
from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.cli.options import OneLineParser, at_least, one_line_errors
from capsule_heads.cli.options.configs import read_config
from capsule_heads.data.audio import open_audio
from capsule_heads.data.glue import load_glue
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.data.images import open_image
from capsule_heads.data.state_folder import StateFolder
from capsule_heads.data.tokenization import tokenize
from capsule_heads.files import read_json
from capsule_heads.hub.results import read_runs
from capsule_heads.models.checkpoint import MismatchedShapes
from capsule_heads.training.checkpoints import FILES, UNFINISHED, resolve_checkpoint

MOMENTS = ("cache", "step", "evaluation", "checkpoint")
SECONDS = 120  # after which a process, or the reading of a file, is said to hang
WORDS = ("fine", "good", "great", "awful", "bad", "dull")
RIGHT, AS_WRITTEN, REFUSED = ENDS = ("right", "read as written", "refused")  # all else is wrong
TSV_COLUMNS = (("sentence", "content"), ("label",))  # names that each column may have
RUNNING = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}  # events that reading a file never causes
OURS = str(Path(capsule_heads.__file__).parent)


class Run:
    """A training of a tiny head on cached hidden states, that can be repeated in other processes and folders.

    Args:
        folder: for the backbone.
    """

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.backbone = str(folder / "backbone")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        AutoModel.from_config(BertConfig(vocab_size=8, max_position_embeddings=16, **sizes)).save_pretrained(
            self.backbone
        )
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", *WORDS])}, unk_token="[PAD]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=16)
        rng = random.Random(0)
        labels = [i % 2 for i in range(60)]
        rows = [" ".join(rng.choices(WORDS[3 * label :][:3], k=rng.randint(1, 12))) for label in labels]
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b"]))
        data = datasets.Dataset.from_dict({"text": rows, "label": labels}, features=features)
        self.data = tokenize(datasets.DatasetDict(train=data), self.tokenizer)["train"]

    def model(self) -> CapsuleHeadForSequenceClassification:
        torch.manual_seed(0)
        return CapsuleHeadForSequenceClassification.from_backbone(self.backbone, d_inp=8, n_parts=4)

    def cache(self, folder: Path) -> HiddenStateCache:
        return HiddenStateCache(self.data, self.model(), self.tokenizer, folder, batch_tokens=40)

    def train(self, folder: Path, *callbacks: TrainerCallback) -> str:
        """Train from the last checkpoint in a folder, save the model there, and return a digest of its weights."""
        model = self.model()
        arguments = CapsuleTrainingArguments(
            str(folder),
            recipe="paper",
            use_cpu=True,
            num_train_epochs=2,
            per_device_train_batch_size=15,
            learning_rate=0.01,
            eval_strategy="steps",
            eval_steps=3,
            save_steps=3,
            save_total_limit=2,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = CapsuleTrainer(
            model,
            arguments,
            train_dataset=self.cache(folder / "cache"),
            eval_dataset=self.data.select(range(20)),
            processing_class=self.tokenizer,
            data_collator=CapsuleCollator(self.tokenizer),
            callbacks=[*callbacks],
        )
        trainer.train("last")
        trainer.save_model()
        weights = b"".join(x.detach().numpy().tobytes() for x in model.head.parameters())
        return hashlib.sha256(weights).hexdigest()


class Moments(TrainerCallback):
    """Counts the moments of a training in a folder, by kind, and brings a fault about at one of them.

    Args:
        folder: of the training.
        at: kind and number of the moment.
        fault: is called then.
    """

    def __init__(self, folder: Path, at: tuple[str, int] | None = None, fault: Callable[[], None] = lambda: None):
        self.folder, self.at, self.fault, self.counts = str(folder), at, fault, Counter[str]()
        write = StateFolder.write

        def counted(*args: Any) -> None:
            self.count("cache")
            write(*args)

        StateFolder.write = counted  # type: ignore[method-assign]  # in a process that ends soon
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        """Count changes to checkpoints, by whatever library in Python."""
        is_change = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if event == "open" and isinstance(arguments[1], str):
            is_change = bool(set(arguments[1]) & set("wax+"))
        if is_change and str(arguments[0]).startswith((f"{self.folder}/{UNFINISHED}", f"{self.folder}/checkpoint")):
            self.count("checkpoint")

    def count(self, kind: str) -> None:
        if (kind, self.counts[kind]) == self.at:
            self.at = None
            self.fault()
        self.counts[kind] += 1

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.count("step")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.count("evaluation")


def in_a_process(target: Callable[[], Any]) -> tuple[int | None, str, Any]:
    """Call a function in a forked process, where mistakes end as in a command.

    Returns:
        The exit status, -N of a process that died of signal N, None of one that was killed because it hung; what it
        wrote; and what the function returned.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        status = 1
        try:
            with one_line_errors():
                os.write(writer, f"\0{json.dumps(target())}".encode())
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    output, deadline, is_open = b"", time.monotonic() + SECONDS, True
    while is_open and select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, 65536)
        output, is_open = output + chunk, bool(chunk)
    os.close(reader)
    if is_open:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text, _, returned = output.decode(errors="replace").partition("\0")
    return None if is_open else status, text, json.loads(returned) if returned else None


class Faults:
    """The faults, each a method that runs one trial in a folder of its own and returns what it ended in.

    That is one of `ENDS`, or what was wrong.

    Args:
        folder: for all files.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.complete = Run(folder), folder / "complete"
        status, output, found = in_a_process(lambda: self._train_counting(self.complete))
        assert status == 0, output
        self.weights, self.counts = found
        self.read = _files(folder, self.run)
        self.ran: list[str] = []
        sys.addaudithook(lambda event, _: self.ran.append(event) if event in RUNNING else None)

    def _train_counting(self, folder: Path) -> tuple[str, dict[str, int]]:
        moments = Moments(folder)
        return self.run.train(folder, moments), moments.counts

    def _moment(self, rng: random.Random) -> tuple[str, int]:
        kind = rng.choice(MOMENTS)
        return kind, rng.randrange(self.counts[kind])

    def _ends_right(self, folder: Path) -> str:
        status, output, weights = in_a_process(lambda: self.run.train(folder))
        if status != 0:
            return f"resuming ended with status {status}: {output[-300:]}"
        return "right" if weights == self.weights else "resuming ended with other weights"

    def kills(self, rng: random.Random, folder: Path) -> str:
        """Kill a training once or twice, some milliseconds after a moment, and resume it."""
        for _ in range(rng.choice((1, 2))):
            at, delay = self._moment(rng), rng.choice((1e-6, rng.uniform(0, 0.03)))

            def fault(delay: float = delay) -> None:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, delay)

            status, output, _ = in_a_process(lambda x=(at, fault): self.run.train(folder, Moments(folder, *x)))
            if status not in (0, -signal.SIGALRM):
                return f"at {at} ended with status {status}: {output[-300:]}"
        return self._ends_right(folder)

    def full_disks(self, rng: random.Random, folder: Path) -> str:
        """Let no file grow beyond a size from a moment on, as a full disk does; then make room, and resume."""
        at = self._moment(rng)
        sizes = [path.stat().st_size for path in self.complete.rglob("*") if path.is_file()]
        room = rng.randrange(rng.choice(sizes) + 1)

        def fault() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        status, output, weights = in_a_process(lambda: self.run.train(folder, Moments(folder, at, fault)))
        if status == 0:
            return "right" if weights == self.weights else "ended with other weights"
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        if status != 2 or len(lines) != 1 or str(folder) not in lines[0]:
            return f"{room} bytes at {at}: ended with status {status}: {output[-300:]}"
        if list(folder.glob("unfinished*")):
            return f"{room} bytes at {at}: left what was unfinished"
        ended = self._ends_right(folder)
        return "refused" if ended == "right" else ended

    def flips_of_checkpoints(self, rng: random.Random, folder: Path) -> str:
        """Flip a bit in a file of the last checkpoint; the earlier one is resumed from, and this one refused."""
        shutil.copytree(self.complete, folder)
        earlier, last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        file = rng.choice(sorted(path for path in last.rglob("*") if path.is_file()))
        listed = read_json(last / FILES)
        position = _flip(rng, file)
        with contextlib.suppress(ValueError):
            if listed == read_json(last / FILES) and file.name == FILES:
                return "right"  # between two words
        found = resolve_checkpoint("last", folder)
        try:
            resolve_checkpoint(str(last), folder)
        except ValueError as error:
            is_named = file.name in str(error) and "\n" not in str(error)
            if found == str(earlier) and (is_named or file.name == FILES):
                return "right"
        return f"byte {position} of {file.relative_to(folder)}: {found} was taken"

    def flips_of_caches(self, rng: random.Random, folder: Path) -> str:
        """Flip a bit in a file of a cache, a finished or an unfinished one."""
        shutil.copytree(self.complete / "cache", folder)
        (cache,) = folder.iterdir()
        expected = [row["hidden_states"].copy() for row in self.run.cache(folder)]
        if rng.random() < 0.5:
            max(cache.glob("shard-*")).unlink()
        file = rng.choice(sorted(path for path in cache.iterdir() if path.is_file()))
        position = _flip(rng, file)
        is_kept = rng.random() < 0.5
        try:
            cached = self.run.cache(folder)
            found = [np.asarray(row["hidden_states"]) for row in (cached.to("cpu") if is_kept else cached)]
        except ValueError as error:
            if str(cache) in str(error) and "\n" not in str(error):
                return "refused"
            return f"byte {position} of {file.name}: {error}"
        is_same = len(found) == len(expected) and all(map(np.array_equal, found, expected))
        return "right" if is_same else f"byte {position} of {file.name} went unnoticed"

    def mutated_files(self, rng: random.Random, folder: Path) -> tuple[str, str]:
        """Read a file of some kind that was cut, or has bytes that were changed, put in or repeated."""
        kind = rng.choice(sorted(self.read))
        file = self.read[kind]
        folder.mkdir()
        how, mutated = _mutate(rng, file.content)
        self.ran.clear()
        ended = _outcome(file, folder, mutated)
        if self.ran:
            ended = f"it ran {self.ran[0]}"
        return kind, ended if ended in ENDS else f"{how}: {ended}"


def _flip(rng: random.Random, file: Path) -> int:
    content = bytearray(file.read_bytes())
    position = rng.randrange(len(content))
    content[position] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return position


def _mutate(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    how = rng.choice(("cut", "flipped", "put in", "repeated", "emptied"))
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    end = min(end, start + 64)
    changed = bytearray(content)
    if how == "flipped":
        for _ in range(rng.choice((1, 1, 8))):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    mutated = {
        "cut": content[:start],
        "flipped": bytes(changed),
        "put in": content[:start] + rng.randbytes(rng.randint(1, 8)) + content[start:],
        "repeated": content[:end] + content[start:],
        "emptied": b"",
    }
    return how, mutated[how]


class File(NamedTuple):
    """A kind of file.

    Attributes:
        name: of the file.
        content: of one that is right.
        read: returns the value of the file at a path, as the package reads it, of lists, keys, numbers and words.
        written: returns the value of a file's content, as another reader reads it. It raises a `ValueError` where a
            content has no value, and the package should have refused it.
    """

    name: str
    content: bytes
    read: Callable[[Path], Any]
    written: Callable[[bytes], Any]


def _outcome(file: File, folder: Path, content: bytes) -> str:
    """Return what reading a file of some content in a folder ends in."""

    def hang(*_: Any) -> None:
        raise RuntimeError(f"reading took more than {SECONDS} s")

    path = folder / file.name
    path.write_bytes(content)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            value = file.read(path)
    except SystemExit as error:
        lines = errors.getvalue().splitlines()
        return REFUSED if error.code == 2 and len(lines) == 1 else f"status {error.code}: {errors.getvalue()[-300:]}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        is_sentence = isinstance(error, MismatchedShapes | OSError | TypeError | ValueError) and "\n" not in str(error)
        if is_sentence and (where.startswith(OURS) or str(folder) in str(error)):
            return REFUSED
        return f"{type(error).__name__} of {Path(where).name}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)
    try:
        written = file.written(content)
    except ValueError as error:
        return f"it was read, and another reader says: {error}"
    if value != written:
        differs = [key for key in written if value.get(key) != written[key]] if isinstance(written, dict) else ""
        return f"another value was read than is written, {differs}"
    return RIGHT if value == file.written(file.content) else AS_WRITTEN


def _files(folder: Path, run: Run) -> dict[str, File]:
    """Return the kinds of files, by name, of a run whose model is written to a folder."""
    results = {"task": "sst2", "seed": 0, "steps": 8, "trained_parameters": 100, "training_seconds": 1.5}
    results |= {"dataset": {"name": "a treebank"}, "backbone": "bert", "validation_accuracy": 0.5, "test_accuracy": 0.5}
    yaml_text = b'task: sst2\nlayers: [0, -1]\nlearning_rate: 5e-4\nlr_scheduler_kwargs: {a: 1}\nrun_name: "a"\n'
    picture = io.BytesIO()
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(picture, "png")

    def image_of(path: Path) -> Any:
        return np.asarray(open_image(path)).tolist()

    files = (
        _config_file(folder / "model", run.model()),
        File("results.json", json.dumps(results).encode(), lambda path: read_runs([path])[0], json.loads),
        _tsv_file(),
        File("own.yaml", yaml_text, lambda path: read_config(str(path))[1], yaml.safe_load),
        File("a.png", picture.getvalue(), image_of, lambda _: pixels.tolist()),  # it has checksums
        _wav_file(),
    )
    return dict(zip(("config.json", "results.json", "TSV", "YAML", "PNG", "WAV"), files, strict=True))


def _config_file(folder: Path, model: CapsuleHeadForSequenceClassification) -> File:
    """Return the configuration of a model, whose value is all fields, and whether all weights are as they were."""
    model.save_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    meaningless = ("transformers_version", "_name_or_path")  # who wrote it, and from where

    def fields(config: Any) -> dict[str, Any]:
        return json.loads(config.to_json_string(use_diff=False))

    defaults = fields(type(model.config)())
    defaults_of_backbone = fields(type(model.config.base_config)())

    def without(config: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in config.items() if key not in meaningless}
        return kept | {"base_config": {key: x for key, x in kept["base_config"].items() if key not in meaningless}}

    def read(path: Path) -> Any:
        shutil.copy(folder / "model.safetensors", path.parent)
        found = CapsuleHeadForSequenceClassification.from_pretrained(path.parent)
        are_kept = all(torch.equal(x, weights[name]) for name, x in found.state_dict().items())
        return without(fields(found.config)) | {"weights": are_kept}

    def written(content: bytes) -> Any:
        config = json.loads(content)
        backbone = defaults_of_backbone | config["base_config"]
        return without(defaults | config | {"base_config": backbone}) | {"weights": True}

    return File("config.json", (folder / "config.json").read_bytes(), read, written)


def _tsv_file() -> File:
    rows = "".join(f'text of {word}, and\ta "second"\t{i % 2}\n' for i, word in enumerate(WORDS))
    table = f"sentence\tlabel\n{rows.replace(chr(9) + 'a ', ' ')}".encode()

    def read(path: Path) -> Any:
        (path.parent / "dev.tsv").write_bytes(table)
        return [[row["text"], row["label"]] for row in load_glue("sst2", path.parent)["train"]]

    def written(content: bytes) -> Any:
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
        header, *found = ([*line.removesuffix("\r").split("\t")] for line in lines)
        text, label = (next(header.index(name) for name in names if name in header) for names in TSV_COLUMNS)
        return [[row[text], int(row[label])] for row in found]

    return File("train.tsv", table, read, written)


def _wav_file() -> File:
    rate, sound = 16000, io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.arange(400, dtype="<i2").tobytes())

    def written(content: bytes) -> Any:
        try:
            with wave.open(io.BytesIO(content)) as file:
                n_channels, width, found_rate, n_frames, *_ = file.getparams()
                frames = file.readframes(n_frames)
        except (EOFError, wave.Error) as error:
            raise ValueError(str(error) or "cut short") from None
        if len(frames) != n_frames * n_channels * width:
            raise ValueError(f"{n_frames} frames, and {len(frames)} bytes of them")
        # Whole numbers of any width, the most significant byte last; those of one byte are from 0 to 255.
        numbers = np.frombuffer(frames, np.uint8).reshape(n_frames, n_channels, width).astype(np.int64)
        values = (numbers << 8 * np.arange(width)).sum(-1)
        half = 1 << 8 * width - 1
        values = values - half if width == 1 else (values + half) % (2 * half) - half
        samples = (values / half).astype(np.float32).mean(1)
        if found_rate != rate:
            divisor = math.gcd(found_rate, rate)
            samples = resample_poly(samples, rate // divisor, found_rate // divisor).astype(np.float32)
        return samples.tolist()

    return File("a.wav", sound.getvalue(), lambda path: open_audio(path, rate).tolist(), written)


def trials(faults: Faults, counts: dict[str, int], seed: int, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the kind of each trial, its name, and what it ended in."""
    for fault, n in counts.items():
        for number in range(n):
            name = f"{fault} {seed}/{number}"
            trial = folder / f"{fault}-{number}"
            ended = getattr(faults, fault)(random.Random(name), trial)
            kind, ended = ended if isinstance(ended, tuple) else (fault.replace("_", " "), ended)
            yield kind, name, ended
            shutil.rmtree(trial, ignore_errors=True)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed (default: %(default)s)")
    counts = {"kills": 20, "full_disks": 10, "flips_of_checkpoints": 100, "flips_of_caches": 100, "mutated_files": 500}
    for name, n in counts.items():
        words = f"number of trials (default: {n})"
        parser.add_argument(f"--{name}", type=at_least(0), default=n, metavar="N", help=words)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("capsule_heads").setLevel(logging.ERROR)  # what is passed over, and what a cache takes
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    found: dict[str, Counter[str]] = {}
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        counts = {name: getattr(options, name) for name in counts}
        for kind, name, ended in trials(faults, counts, options.seed, Path(folder)):
            found.setdefault(kind, Counter())[ended if ended in ENDS else "wrong"] += 1
            if ended not in ENDS:
                wrong.append(f"{kind}, trial {name}: {ended}")
    columns = (*ENDS, "wrong")
    print(f"| fault | trials | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for kind, ends in found.items():
        print(f"| {kind} | {ends.total()} | {' | '.join(str(ends[column]) for column in columns)} |")
    print(*wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
