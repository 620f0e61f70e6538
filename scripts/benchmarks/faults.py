"""Inject faults: kill training, fill its disk, flip bytes of what it wrote, and mutate the files that it reads.

    python scripts/benchmarks/faults.py --seed 1

Each trial is right where it ends as it does without the fault: with the same weights to the bit, or a value of each
file. It is refused where it ends in one sentence. All else is wrong. The script prints a table by kind of fault, and
each trial that was wrong with how to repeat it. It ends with status 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
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
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # forked processes

import datasets
import numpy as np
import torch
import transformers
from PIL import Image
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
from capsule_heads.data.state_file import UnfinishedStates
from capsule_heads.data.tokenization import tokenize
from capsule_heads.files import read_json
from capsule_heads.hub.results import read_runs
from capsule_heads.training.checkpoints import FILES, UNFINISHED, resolve_checkpoint

MOMENTS = ("cache", "step", "evaluation", "checkpoint")
SECONDS = 120  # after which a process, or the reading of a file, is said to hang
WORDS = ("fine", "good", "great", "awful", "bad", "dull")
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
        append = UnfinishedStates.append

        def counted(*args: Any) -> None:
            self.count("cache")
            append(*args)

        UnfinishedStates.append = counted  # type: ignore[method-assign]  # in a process that ends soon
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

    That is "right", or "refused", or what was wrong.

    Args:
        folder: for all files.
    """

    def __init__(self, folder: Path) -> None:
        self.run, self.complete = Run(folder), folder / "complete"
        status, output, found = in_a_process(lambda: self._train_counting(self.complete))
        assert status == 0, output
        self.weights, self.counts = found
        self.read = _readers(folder, self.run)
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
            (cache / "states.f16").rename(cache / "states.f16.part")
        file = rng.choice(sorted(path for path in cache.iterdir() if path.name != "lock"))
        position = _flip(rng, file)
        is_kept = rng.random() < 0.5
        try:
            cached = self.run.cache(folder)
            found = [np.asarray(row["hidden_states"]) for row in (cached.to("cpu") if is_kept else cached)]
        except ValueError as error:
            if str(cache) in str(error) and "\n" not in str(error):
                return "refused"
            return f"byte {position} of {file.name}: {error}"
        return (
            "right" if all(map(np.array_equal, found, expected)) else f"byte {position} of {file.name} went unnoticed"
        )

    def mutated_files(self, rng: random.Random, folder: Path) -> tuple[str, str]:
        """Read a file of some kind that was cut, or has bytes that were changed, put in or repeated."""
        kind = rng.choice(sorted(self.read))
        content, read = self.read[kind]
        folder.mkdir()
        how, mutated = _mutate(rng, content)
        self.ran.clear()
        ended = _outcome(lambda: read(folder, mutated), str(folder))
        return kind, f"it ran {self.ran[0]}" if self.ran else ended if ended in (
            "right",
            "refused",
        ) else f"{how}: {ended}"


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


def _outcome(read: Callable[[], Any], folder: str) -> str:
    """Return what reading a file in a folder ends in."""

    def hang(*_: Any) -> None:
        raise RuntimeError(f"reading took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            read()
        return "right"
    except SystemExit as error:
        lines = errors.getvalue().splitlines()
        return "refused" if error.code == 2 and len(lines) == 1 else f"status {error.code}: {errors.getvalue()[-300:]}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        is_sentence = isinstance(error, OSError | TypeError | ValueError) and "\n" not in str(error)
        if is_sentence and (where.startswith(OURS) or folder in str(error)):
            return "refused"
        return f"{type(error).__name__} of {Path(where).name}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)


def _readers(folder: Path, run: Run) -> dict[str, tuple[bytes, Callable[[Path, bytes], Any]]]:
    """Return, by kind of file, one that is right, and how it is read from a folder, given its content."""
    run.model().save_pretrained(folder / "model")
    results = {"task": "sst2", "seed": 0, "steps": 8, "trained_parameters": 100, "training_seconds": 1.5}
    results |= {"dataset": {"name": "a treebank"}, "backbone": "bert", "validation_accuracy": 0.5, "test_accuracy": 0.5}
    rows = "".join(f'a text of {word}, and\ta "second"\t{i % 2}\n' for i, word in enumerate(WORDS))
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(picture, "png")
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.arange(400, dtype="<i2").tobytes())

    def reader(name: str, read: Callable[[Path], Any]) -> Callable[[Path, bytes], Any]:
        def write_and_read(folder: Path, content: bytes) -> Any:
            (folder / name).write_bytes(content)
            return read(folder / name)

        return write_and_read

    def read_model(path: Path) -> Any:
        shutil.copy(folder / "model" / "model.safetensors", path.parent)
        return CapsuleHeadForSequenceClassification.from_pretrained(path.parent)

    def read_tsv(path: Path) -> Any:
        (path.parent / "dev.tsv").write_text(f"sentence\tlabel\n{rows.replace(chr(9) + 'a ', ' ')}")
        return load_glue("sst2", path.parent)

    config = (folder / "model" / "config.json").read_bytes()
    table = f"sentence\tlabel\n{rows.replace(chr(9) + 'a ', ' ')}".encode()
    yaml = b'task: sst2\nlayers: [0, -1]\nlearning_rate: 5e-4\nlr_scheduler_kwargs: {a: 1}\nrun_name: "a"\n'
    return {
        "config.json": (config, reader("config.json", read_model)),
        "results.json": (json.dumps(results).encode(), reader("results.json", lambda path: read_runs([path]))),
        "TSV": (table, reader("train.tsv", read_tsv)),
        "YAML": (yaml, reader("own.yaml", lambda path: read_config(str(path)))),
        "PNG": (picture.getvalue(), reader("a.png", open_image)),
        "WAV": (sound.getvalue(), reader("a.wav", lambda path: open_audio(path, 16000))),
    }


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
            found.setdefault(kind, Counter())[ended if ended in ("right", "refused") else "wrong"] += 1
            if ended not in ("right", "refused"):
                wrong.append(f"{kind}, trial {name}: {ended}")
    print("| fault | trials | right | refused | wrong |\n| --- | --- | --- | --- | --- |")
    for kind, ends in found.items():
        print(f"| {kind} | {ends.total()} | {ends['right']} | {ends['refused']} | {ends['wrong']} |")
    print(*wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
