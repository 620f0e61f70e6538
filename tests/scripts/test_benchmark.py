"""scripts/benchmark.py on a case that takes no time."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from capsule_heads.ops import STRATEGIES

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, with one small case."""
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = (
        "a small case",
        module.routing_case((2,), 50, 4, 4, 4, n_out=6),
        module.LITERAL,
        ("moments", "votes", "numba"),
    )
    monkeypatch.setattr(module, "CASES", {"small": case})
    monkeypatch.setattr(module, "machine", lambda device: {"device": device})
    monkeypatch.setitem(STRATEGIES, "original", None)  # what the script sets there is taken away again
    return module


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--cases", "small", *arguments])
    benchmark.main()


def test_it_times_every_strategy_and_writes_every_time(benchmark, monkeypatch, tmp_path, capsys):
    run(benchmark, monkeypatch, "--repeats", "2", "--json", str(tmp_path / "times.json"))
    written = json.loads((tmp_path / "times.json").read_text())
    runs = {row["strategy"]: row for row in written["runs"]}
    assert list(runs) == ["original", "reference", "moments", "votes", "numba"]
    for row in runs.values():
        assert len(row["forward"]) == len(row["forward_backward"]) == 2
        assert all(seconds > 0 for seconds in row["forward"] + row["forward_backward"])
    table = capsys.readouterr().out
    assert all(f"| a small case | `{strategy}` |" in table for strategy in runs)


def test_it_reports_nothing_of_a_strategy_that_is_wrong(benchmark, monkeypatch, capsys):
    right = STRATEGIES["votes"]

    def wrong(*tensors, **options):
        a_out, *others = right(*tensors, **options)
        return 1.001 * a_out, *others

    monkeypatch.setitem(STRATEGIES, "votes", wrong)
    with pytest.raises(SystemExit, match=r"small: votes errs by \d\.\de-03.*nothing is reported"):
        run(benchmark, monkeypatch, "--repeats", "1")
    assert "`votes`" not in capsys.readouterr().out


def test_it_profiles(benchmark, monkeypatch, capsys):
    run(benchmark, monkeypatch, "--profile")
    profile = capsys.readouterr().out
    assert "| a small case | `moments` |" in profile
    assert re.search(
        r"\| a small case \| `numba` \| [\d,]+ \| [\d,]+ \| \d+\.\d \| [\d,]+ \| [\d,]+ \| [\d,]+ \|", profile
    )


def test_the_products_of_numba(benchmark):
    """Of 2 x 50 inputs of 4x4 to 6: votes twice in each of two forward and two backward passes, and gradients."""
    run, _ = benchmark.CASES["small"][1]("numba", "cpu")
    assert benchmark.numba_product_flops(*run.args) == 2 * (4 + 4 + 2 + 2) * (100 * 6 * 16) * 4
    run, _ = benchmark.routing_case((), 10, 1, 64, 2)("numba", "cpu")
    assert benchmark.numba_product_flops(*run.args) == 2 * 4 * (10 * 64 * 2) * 64


def test_memory_that_cannot_be_measured_has_no_ratio(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "peak_memory", lambda function, device: None)
    run(benchmark, monkeypatch, "--repeats", "1")
    table = capsys.readouterr().out
    assert "1/" not in table
    assert re.search(r"`votes` .* \| - \| [\d.]+x / [\d.]+x \| - \|", table)


def test_a_device_that_is_not_there(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda was asked for, and torch finds no CUDA device"):
        run(benchmark, monkeypatch, "--device", "cuda")
