"""scripts/benchmarks/training.py on a few phrases, and what times its training steps, on the CPU."""

import argparse
import importlib.util
import itertools
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "training.py"

TREE = "(3 (2 it) (4 (2 was) (3 good)))\n(1 (2 the) (1 (2 food) (0 bad)))\n(2 (2 a) (2 film))\n"
SMALL = ("--epochs", 1, "--batch_size", 4, "--seeds", 0, 1, "--memory_sizes", 2, 16, 3, 64)


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees_of_benchmark")
    for name in ("train", "dev", "test"):
        (folder / f"{name}.txt").write_text(TREE)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_it_times_both_ways_and_writes_everything(call, backbone, trees, tmp_path):
    options = ("--backbone", backbone, "--max_phrases", 8, "--scratch", tmp_path, "--json", tmp_path / "times.json")
    status, out, err = call("benchmarks/training.py", "--source", trees, *SMALL, *options)
    assert status == 0, err
    written = json.loads((tmp_path / "times.json").read_text())
    kinds = [(row["kind"], row["seed"]) for row in written["runs"]]
    assert kinds == [("straightforward", 0), ("ours", 0), ("ours", 1), ("straightforward", 1)]
    for row in written["runs"]:
        assert row["steps"] == 2
        assert 0 <= row["seconds_of_cache"] < row["seconds"]
        assert 0 <= row["validation_accuracy"] <= 1 and 0 <= row["test_accuracy"] <= 1
    assert [row["kind"] for row in written["memory"]] == ["straightforward", "ours", "ours, from the cache"]
    assert [row["states"] for row in written["memory"]] == [2 * 16 * 3 * 64 * size for size in (4, 4, 2)]
    assert "x less time (" in out
    assert "Measured on 8 of 13 phrases, drawn at random." in out
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]  # the caches are gone


def test_without_a_source(call):
    status, _, err = call("benchmarks/training.py")
    assert status == 2
    assert "--source is missing: the directory of the trees" in err


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("training_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_steps_are_timed_in_rounds(benchmark, monkeypatch, backbone, tmp_path, capsys, device):
    for name, value in {"N_WARM_UP": 1, "N_STEPS": 2, "N_ROUNDS": 2}.items():
        monkeypatch.setattr(benchmark, name, value)
    if device == "cpu":  # where compiling takes longer than all else
        monkeypatch.setattr(benchmark, "CONTESTANTS", [x for x in benchmark.CONTESTANTS if not x.compiled])
    options = {"device": device, "backbone": backbone, "batch_size": 4, "source": None, "scratch": tmp_path}
    benchmark.report_steps(argparse.Namespace(**options, json=tmp_path / "steps.json"))
    written = json.loads((tmp_path / "steps.json").read_text())
    assert [(row["name"], row["precision"]) for row in written["steps"]] == [
        (contestant.name, contestant.precision) for contestant in benchmark.CONTESTANTS
    ]
    for row in written["steps"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["reads"] is None if device == "cpu" else row["reads"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert "texts random token ids" in lines[0]
    table = lines[-len(benchmark.CONTESTANTS) :]
    times = r"[\d.]+ \([\d.]+ - [\d.]+\)"
    assert re.fullmatch(rf"\| plain Trainer, linear head \| float32 \| {times} \| 1\.00 \| [-\d.]+ \|", table[0])
    assert [path.name for path in tmp_path.iterdir()] == ["steps.json"]


def test_all_contestants_train_the_head_alone(benchmark, backbone):
    for contestant in benchmark.CONTESTANTS[:4]:
        model = benchmark.build_contestant(contestant, backbone)
        trained = [name for name, x in model.named_parameters() if x.requires_grad]
        assert trained and all(name.startswith(("classifier.", "head.")) for name in trained)


def test_batches_are_of_like_length_and_come_at_random(benchmark):
    texts = benchmark.texts_of_random_tokens(40, 10)
    assert texts["length"][:] == [len(ids) for ids in texts["input_ids"]]
    ordered = benchmark.in_batches_of_like_length(texts, 4)["length"][:]
    assert sorted(ordered) == sorted(texts["length"][:])
    batches = [ordered[i : i + 4] for i in range(0, 40, 4)]
    by_length = sorted(batches)
    assert all(max(short) <= min(long) for short, long in itertools.pairwise(by_length))
    assert batches != by_length


def test_a_step_is_the_window_by_its_steps(benchmark, monkeypatch):
    times = iter([10.0, 60.0])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(times))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        window = benchmark.Window("cpu", caught)
        for step in range(1, 121):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
            window.on_step_end(None, argparse.Namespace(global_step=step), None)
    assert window.a_step() == (0.5, 1.0)


def test_the_table_of_steps(benchmark):
    fields = {"precision": "bf16", "reads": None}
    rows = [{"name": "plain", "fields": None, "seconds": [0.010, 0.020, 0.010], **fields}]
    rows += [{"name": "capsules", "fields": {}, "seconds": [0.020, 0.030, 0.020], **fields, "reads": 2.0}]
    assert benchmark.table_of_steps(rows).splitlines()[2:] == [
        "| plain | bf16 | 10.0 (10.0 - 20.0) | 1.00 | - |",
        "| capsules | bf16 | 20.0 (20.0 - 30.0) | 2.00 | 2.0 |",
    ]


def test_a_device_that_is_not_there(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = fails("benchmarks/training.py", "--device", "cuda")
    assert error == (
        "error: --device cuda was asked for, and torch finds no CUDA device on this machine; use --device cpu."
    )
