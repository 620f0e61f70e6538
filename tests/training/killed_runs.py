"""Runs that are killed, and run again: `python killed_runs.py BACKBONE DATA FOLDER` writes what became of them.

All is imported once, and each run is a fork of that.
"""

import fnmatch
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from processes import fork_processes
from transformers import AutoTokenizer, TrainerCallback

from capsule_heads import CapsuleHeadForSequenceClassification, CapsuleTrainer, CapsuleTrainingArguments
from capsule_heads.data.hidden_states import CapsuleCollator, HiddenStateCache
from capsule_heads.paper import PAPER

SAVE_STEPS = 3  # there are 4 in each of 2 epochs: checkpoints 3 and 6 are within one, 8 is the last


class Fault(TrainerCallback):
    """Notes where the run began, and brings a fault about once it has made so many steps."""

    def __init__(self, step, fault):
        self.step, self.fault, self.began_at = step, fault, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began_at = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.fault and state.global_step == self.step:
            self.fault()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(folder, pattern):
    """Just before the first change to a folder that the pattern names, such as "open /unfinished/*/files.json"."""

    def hook(event, arguments):
        if event == "open" and (not isinstance(arguments[1], str) or not set(arguments[1]) & set("wax+")):
            return  # for reading
        change = f"{event} {str(arguments[0]).removeprefix(str(folder))}" if arguments else event
        if fnmatch.fnmatch(change, pattern):
            kill()

    sys.addaudithook(hook)


def kill_when_a_file_has(n_bytes):
    """In the midst of a write, by whatever library."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def fail_when_a_file_has(n_bytes):
    """As on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def make_read_only(folder):
    """For root too."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)


def train(folder, fault=None, step=0, **fields):
    """Trains, from the last checkpoint if there is one. Writes where it began and what it ended with."""
    if fault and step == 0:
        fault()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    model = CapsuleHeadForSequenceClassification.from_backbone(
        BACKBONE, **{"d_inp": 8, "n_parts": 4, **PAPER, **fields}
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = CapsuleTrainingArguments(
        str(folder),
        recipe="paper",
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=20 // world_size,
        learning_rate=0.01,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        disable_tqdm=True,
        report_to=[],
    )
    data = load_from_disk(DATA)
    if model.config.freeze_backbone:
        data = HiddenStateCache(data, model, tokenizer, folder / "cache")
    callback = Fault(step, fault)
    collator = CapsuleCollator(tokenizer)
    trainer = CapsuleTrainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[callback])
    trainer.train("last")
    trained = {name: x.tolist() for name, x in model.named_parameters() if x.requires_grad}
    end = {"began_at": callback.began_at, "weights": trained}
    Path(folder, f"end_{arguments.process_index}.json").write_text(json.dumps(end))


def run(folder, *, n_processes=1, faulty=0, fault=None, **options):
    """Trains in some processes, one of which is faulty.

    Returns:
        What the processes ended with, or None; and the status and the error of the faulty one.
    """
    folder.mkdir(exist_ok=True)
    with open(FOLDER / "error.txt", "w+") as errors:

        def target(rank):
            try:
                train(folder, fault if rank == faulty else None, **options)
            except OSError as error:
                print(error, file=errors, flush=True)
                raise

        status = fork_processes(n_processes, target)[faulty]
        errors.seek(0)
        error = errors.read()
    folder.chmod(0o755)
    files = [folder / f"end_{rank}.json" for rank in range(n_processes)]
    return [json.loads(file.read_text()) for file in files] if all(map(Path.exists, files)) else None, status, error


def run_twice(make_fault, **options):
    """A run with a fault, and then again without one."""
    folder = FOLDER / "run"
    ends, status, error = run(folder, fault=make_fault(folder), **options)
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(("checkpoint", "unfinished")))
    again, *_ = run(folder, **{name: options[name] for name in options if name not in ("step", "faulty")})
    shutil.rmtree(folder)
    return {"ends": ends, "status": status, "error": error, "left": left, "again": again}


TWO = {"n_processes": 2, "freeze_backbone": False}
RUNS = {
    "killed at byte 30,000 of the cache": (lambda folder: lambda: kill_when_a_file_has(30_000), {}),
    "killed before the first step": (lambda folder: kill, {}),
    **{f"killed at step {step}": (lambda folder: kill, {"step": step}) for step in (1, 5, 7)},
    **{
        f"killed before {pattern}": (lambda folder, pattern=pattern: lambda: kill_before(folder, pattern), {})
        for pattern in (
            "os.rename /cache/*",
            "open /unfinished/checkpoint-3/trainer_state.json",
            "open /unfinished/checkpoint-6/unfinished-model/config.json",
            "open /unfinished/checkpoint-6/files.json",
            "os.rename /unfinished/checkpoint-6",
            "os.rename /checkpoint-3",
            "os.remove optimizer.pt",
        )
    },
    **{
        f"killed at byte {n:,} of a file": (lambda folder, n=n: lambda: kill_when_a_file_has(n), {"step": 4})
        for n in (1_000, 2_300, 10_000)
    },
    **{
        f"no room beyond {n:,} bytes": (lambda folder, n=n: lambda: fail_when_a_file_has(n), {"step": 4})
        for n in (1_000, 2_300, 10_000)
    },
    "read-only": (lambda folder: lambda: make_read_only(folder), {"step": 4}),
    "one of two killed at step 7": (lambda folder: kill, {"step": 7, "faulty": 1, **TWO}),
    "one of two killed before open /unfinished/checkpoint-8/files.json": (
        lambda folder: lambda: kill_before(folder, "open /unfinished/checkpoint-8/files.json"),
        {"step": 1, **TWO},
    ),
}

if __name__ == "__main__":
    BACKBONE, DATA, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    results = {"whole": run(FOLDER / "whole")[0], "whole of two": run(FOLDER / "whole of two", **TWO)[0]}
    for name, (make_fault, options) in RUNS.items():
        results[name] = run_twice(make_fault, **options)
    (FOLDER / "results.json").write_text(json.dumps(results))
