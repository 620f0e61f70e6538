"""scripts/benchmarks/routing.py on a case that takes no time."""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from capsule_heads.ops import STRATEGIES

SCRIPT = Path(__file__).parents[3] / "scripts" / "benchmarks" / "routing.py"
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, with one small case."""
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks there for the names of types
    spec.loader.exec_module(module)
    case = module.routing_case("a small case", (2,), (50, 4, 4, 4), n_out=6, fast=module.NARROW)
    monkeypatch.setattr(module, "CASES", {"small": case})
    rates = {"float32_product_gflops": 100.0, "copy_gb_per_second": 10.0}
    monkeypatch.setattr(module, "machine", lambda device: {"device": device, **rates})
    monkeypatch.setitem(STRATEGIES, "original", None)  # what the script sets there is taken away again
    return module


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["routing.py", "--cases", "small", *arguments])
    benchmark.main()


def test_it_times_every_strategy_and_writes_every_time(benchmark, monkeypatch, tmp_path, capsys):
    run(benchmark, monkeypatch, "--repeats", "2", "--json", str(tmp_path / "times.json"))
    written = json.loads((tmp_path / "times.json").read_text())
    runs = {row["strategy"]: row for row in written["runs"]}
    assert list(runs) == ["original", "reference", "moments", "votes", "cpu"]
    for row in runs.values():
        assert len(row["forward"]) == len(row["forward_backward"]) == 2
        assert all(seconds > 0 for seconds in row["forward"] + row["forward_backward"])
    table = capsys.readouterr().out
    assert all(f"| a small case | `{strategy}` |" in table for strategy in runs)


def test_it_reports_nothing_of_a_strategy_that_is_wrong(benchmark, monkeypatch, capsys):
    right = STRATEGIES["votes"].route

    def wrong(*tensors, **options):
        a_out, *others = right(*tensors, **options)
        return 1.001 * a_out, *others

    monkeypatch.setattr(STRATEGIES["votes"], "route", wrong)
    with pytest.raises(SystemExit, match=r"small: votes errs by \d\.\de-03.*nothing is reported"):
        run(benchmark, monkeypatch, "--repeats", "1")
    assert "`votes`" not in capsys.readouterr().out


def test_it_profiles(benchmark, monkeypatch, capsys):
    run(benchmark, monkeypatch, "--profile")
    profile = capsys.readouterr().out
    assert "| a small case | `moments` |" in profile
    assert re.search(
        r"\| a small case \| `cpu` \| [\d,]+ \| [\d,]+ \| \d+\.\d \| [\d,]+ \| [\d,]+ \| [\d,]+ \|", profile
    )


def test_the_products_of_the_cpus_kernels(benchmark):
    """Of 2 x 50 inputs of 4x4 to 6: votes twice in each of two forward and two backward passes, and gradients."""
    run, _ = benchmark.CASES["small"].build("cpu", "cpu")
    assert benchmark.cpu_product_flops(*run.args) == 2 * (4 + 4 + 2 + 2) * (100 * 6 * 16) * 4
    run, _ = benchmark.routing_case("", (), (10, 1, 64, 2)).build("cpu", "cpu")
    assert benchmark.cpu_product_flops(*run.args) == 2 * 4 * (10 * 64 * 2) * 64


def test_the_bound_by_hand(benchmark):
    """2 x 50 inputs of 4x4 to 6 of 4x4: 9,600 numbers in all votes, and two iterations that need them."""
    work = benchmark.CASES["small"].work
    assert work["flops"] == 2 * 9_600 * (2 * 4 + 8 + 3 * 2 * 4 + 16)
    inputs = [torch.Size([2, 50]), (2, 50, 4, 4), (1, 6, 4, 4), (1, 6, 4, 4), (1, 6), (1, 6)]
    outputs = [(2, 6), (2, 6, 4, 4), (2, 6, 4, 4)]
    assert work["bytes"] == 4 * sum(torch.Size(shape).numel() for shape in [*inputs, *inputs, *outputs])
    tensors = benchmark.CASES["small"].build("reference", "cpu")[1]
    assert [tensor.shape for tensor in tensors] == inputs

    rates = {"float32_product_gflops": 1e-3, "copy_gb_per_second": 1e-3, "tf32_product_gflops": 6e-3}
    (bound,) = benchmark.bounds(["small"], rates).values()
    assert bound["arithmetic"] == bound["bound"] == pytest.approx(work["flops"] / 1e6)
    assert bound["as_three_tf32"] == pytest.approx(work["flops"] / 2e6)
    assert bound["copies"] == pytest.approx(work["bytes"] / 1e6)
    (bound,) = benchmark.bounds(["small"], {**rates, "float32_product_gflops": 1.0}).values()
    assert bound["bound"] == bound["copies"]


def test_a_head_has_no_bound(benchmark, monkeypatch):
    head = benchmark.Case("a head", None, None, (), ())
    monkeypatch.setitem(benchmark.CASES, "head", head)
    assert benchmark.bounds(["head"], {}) == {}


def some_events():
    """What a profile may have: a call on the host, two launches of one kernel and one copy, and a named range."""

    def event(name, device_type, microseconds, is_user_annotation=False):
        time_range = types.SimpleNamespace(elapsed_us=lambda: microseconds)
        return types.SimpleNamespace(
            name=name, device_type=device_type, time_range=time_range, is_user_annotation=is_user_annotation
        )

    return [
        event("cudaLaunchKernel", CPU, 5.0),
        event("product", CUDA, 30.0),
        event("product", CUDA, 10.0),
        event("Memcpy DtoD", CUDA, 2.0),
        event("a range", CUDA, 100.0, is_user_annotation=True),
    ]


def test_launches_are_what_runs_on_the_device(benchmark):
    events = benchmark.on_device(some_events())
    assert [event.name for event in events] == ["product", "product", "Memcpy DtoD"]
    assert benchmark.launches_and_busy(events) == {"launches": 3, "busy": pytest.approx(42e-6)}


def test_it_profiles_kernels(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "strategies_of", lambda name, device: ["votes"])
    small = benchmark.CASES["small"]
    on_cpu = benchmark.Case(small.title, lambda strategy, device: small.build(strategy, "cpu"), None, (), ())
    monkeypatch.setitem(benchmark.CASES, "small", on_cpu)
    monkeypatch.setattr(benchmark, "device_events", lambda function: benchmark.on_device(some_events()))
    assert benchmark.profile_on_cuda("small") == [
        "| a small case | `votes` | `product` | 2 | 0.040 |",
        "| a small case | `votes` | `Memcpy DtoD` | 1 | 0.002 |",
    ]


def test_both_ways_to_pool_by_attention_are_the_formula(benchmark):
    found = benchmark.CASES["small"].alternatives("cpu")
    assert list(found) == [
        "attention pooling, 64 queries (scaled_dot_product_attention)",
        "attention pooling, 64 queries (two products)",
    ]
    for run, (a_inp, mu_inp, queries) in found.values():
        with torch.no_grad():
            a_inp[0, 3] = -torch.inf
        x = mu_inp.detach().flatten(2)  # [bid]
        weights = a_inp.detach().sigmoid()[:, None] * (torch.einsum("qd,bid->bqi", queries, x) / 4.0).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        expected = torch.einsum("bqi,bid->bqd", weights, x)
        pooled, *gradients = benchmark.forward_backward(run, [a_inp, mu_inp, queries])
        torch.testing.assert_close(pooled, expected)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[1][0, 3].any()


def row(strategy, milliseconds, **fields):
    times = [milliseconds / 1e3] * 2
    return {"case": "small", "title": "a small case", "strategy": strategy, "forward": times} | {
        "forward_backward": times,
        "peak_memory": 2_000_000,
        **fields,
    }


def test_the_faster_way_to_pool_is_kept(benchmark):
    slow, fast = row(f"{benchmark.ATTENTION} (a)", 3.0), row(f"{benchmark.ATTENTION} (b)", 2.0)
    votes = row("votes", 1.0)
    assert benchmark.without_slower_pooling([votes, slow, fast]) == [votes, fast]


def test_the_table(benchmark):
    found = {"small": {"bound": 0.5e-3}}
    rows = [row("original", 20.0), row("reference", 10.0)]
    rows += [row("votes", 1.5, launches=1234, busy=0.0125, peak_memory=1_000_000)]
    rows += [row(benchmark.COMPILED, 5.0, forward=[]), row("attention pooling", 5.0)]
    *_, votes, compiled, pooling = benchmark.table(rows, found).splitlines()
    spread = "1.50 (1.50 - 1.50)"
    assert votes == (
        f"| a small case | `votes` | {spread} | {spread} | 1,234 | 12.5 | 1 | 3.0 | 13.3x / 6.7x | 1/2 / 1/2 |"
    )
    spread = "5.00 (5.00 - 5.00)"
    assert compiled == (
        f"| a small case | reference, compiled | - | {spread} | - | - | 2 | 10.0 | 4.0x / 2.0x | 1/1 / 1/1 |"
    )
    assert pooling == (
        f"| a small case | attention pooling | {spread} | {spread} | - | - | 2 | - | 4.0x / 2.0x | 1/1 / 1/1 |"
    )
    lines = benchmark.table(rows, {}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| - |  |  |")  # no bound, and no factor against itself


def test_the_table_of_bounds(benchmark):
    rates = {"float32_product_gflops": 50.0, "copy_gb_per_second": 100.0}
    lines = benchmark.table_of_bounds(benchmark.bounds(["small"], rates)).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1
    assert re.fullmatch(r"\| a small case \| [\d.]+ \| [\d.]+ \| - \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", lines[2])


def test_what_takes_too_long_to_compile_is_left_out(benchmark, monkeypatch, capsys):
    def compile_forever(run):
        def wait():
            while True:
                pass

        return wait

    monkeypatch.setattr(benchmark.torch, "compile", compile_forever)
    monkeypatch.setattr(benchmark, "MOST_SECONDS_TO_COMPILE", 1)
    assert benchmark.compiled_or_none("small", lambda: None, []) is None
    assert capsys.readouterr().out == ("small: the reference under torch.compile is left out: it took more than 1 s\n")


def test_memory_that_cannot_be_measured_has_no_ratio(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "peak_memory", lambda function, device: None)
    run(benchmark, monkeypatch, "--repeats", "1")
    table = capsys.readouterr().out
    assert "1/" not in table
    assert re.search(r"`votes` .* \| - \| [\d.,]+ \| [\d.]+x / [\d.]+x \| - \|", table)


def test_a_device_that_is_not_there(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda was asked for, and torch finds no CUDA device"):
        run(benchmark, monkeypatch, "--device", "cuda")


@pytest.mark.gpu
def test_on_cuda_launches_are_counted_and_alternatives_timed(benchmark, monkeypatch, tmp_path, capsys):
    run(benchmark, monkeypatch, "--device", "cuda", "--repeats", "2", "--json", str(tmp_path / "times.json"))
    written = json.loads((tmp_path / "times.json").read_text())
    runs = {row["strategy"]: row for row in written["runs"]}
    assert {"original", "reference", "moments", "votes", benchmark.COMPILED} <= runs.keys()
    assert "cpu" not in runs and sum(name.startswith(benchmark.ATTENTION) for name in runs) == 1
    for row in runs.values():
        assert len(row["forward_backward"]) == 2 and min(row["forward_backward"]) > 0
        assert row["launches"] > 0 and row["busy"] > 0 and row["peak_memory"] > 0
    assert "times the bound" in capsys.readouterr().out


@pytest.mark.gpu
def test_it_profiles_kernels_on_cuda(benchmark, monkeypatch, capsys):
    run(benchmark, monkeypatch, "--device", "cuda", "--profile")
    assert re.search(r"\| a small case \| `votes` \| `.+` \| [\d,]+ \| \d+\.\d+ \|", capsys.readouterr().out)
