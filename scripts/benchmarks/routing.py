#!/usr/bin/env python
"""Time every routing strategy beside the literal loop, after checking that all compute the same.

    python scripts/benchmarks/routing.py --json benchmark.json
    python scripts/benchmarks/routing.py --cases text-65536 sst --repeats 5
    python scripts/benchmarks/routing.py --device cuda
    python scripts/benchmarks/routing.py --cases sst smallnorb-layer --profile

There are two literal loops. `original` is the one of the paper's own code: it copies shared weights to every input
before it computes the votes. `reference` is this package's: it does not copy them. Times are those of a forward pass
without gradients, and of a forward and a backward pass. Memory is the most that a forward and a backward pass held at
once beyond inputs and parameters, gradients included. The script ends without a table if an output or a gradient of a
strategy is further from the float64 reference than twice the float32 reference is (or than 1e-5, if that is more).

The script repeats rounds, and each round runs every contestant. On the CPU a contestant runs once a round. On CUDA its
time in a round is the median of many runs, each timed by device events (`triton.testing.do_bench`). On CUDA the script
also counts launches (kernels, copies and fills of memory on the device) and sums their durations ("busy"). It adds what
else a user could run: `reference` under torch.compile, attention pooling of the same inputs, or the backbone alone.

`--profile` prints what takes the time of the fast strategies instead. On the CPU the time of "products" is that of
matrix products; for `cpu` it is that of its kernels, which do the elementwise work too. On CUDA it lists kernels.
"""

import argparse
import collections
import contextlib
import ctypes
import datetime
import functools
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capsule_heads.cli.options import OneLineParser, at_least, file_to_write
from capsule_heads.hardware import processor_name
from capsule_heads.heads import AttentivePoolingHead, TokenDepthHead
from capsule_heads.ops import STRATEGIES, cpu, route
from capsule_heads.ops.reference import Reference
from capsule_heads.ops.strategy import n_votes
from capsule_heads.paper.checkpoints import build_network

SEED = 0
PARITY = 1e-5
WINDOWS = {"warmup": 10, "rep": 40}  # milliseconds that a contestant runs in a round on CUDA
MOST_SECONDS_TO_COMPILE = 60
N_QUERIES = 64
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
KERNELS = [
    f"capsule_heads::{name}"  # as the profiler sees them
    for name in (
        "statistics",
        "gradients",
        "gradients_of_kept",
        "uniform_moments",
        "uniform_gradients",
        "forward_of_kept_votes",
        "backward_of_kept_votes",
    )
]
LITERAL = ("original", "reference")
NARROW = tuple(name for name in STRATEGIES if name not in ("reference", "kept"))  # `kept` is for few votes
WIDE = tuple(name for name in NARROW if name != "moments")  # wide inputs have too many moments
ONE_DEVICE = {"kept": "cpu", "cpu": "cpu", "cuda": "cuda"}  # strategies that run on one kind of device
COMPILED = "reference, compiled"
ATTENTION = f"attention pooling, {N_QUERIES} queries"

Run = Callable[[], tuple[Tensor, ...]]
Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """A function to time.

    Attributes:
        title: what it is.
        build: `build(strategy, device, dtype)` returns the function and the tensors that its gradients are for.
        alternatives: `alternatives(device)` returns what a user could run instead, in the form that `build` returns.
        literal: the literal loops that fit in memory.
        fast: the strategies worth a run.
        work: what `count_work` returns for routing alone; None for a head or a network, which do more than routing.
    """

    title: str
    build: Callable[..., tuple[Run, list[Tensor]]]
    alternatives: Callable[[str], dict[str, tuple[Run, list[Tensor]]]]
    literal: tuple[str, ...]
    fast: tuple[str, ...]
    work: dict[str, int] | None = None


class Original(Reference):
    """Routing as the paper's code does it: shared weights are first expanded, one copy for each input."""

    name = "original"

    def route(self, a_inp: Tensor, mu_inp: Tensor, W: Tensor, *others: Tensor, **options: Any) -> Any:
        """Route; see `Strategy.route`."""
        return super().route(a_inp, mu_inp, W.expand(mu_inp.shape[-3], -1, -1, -1), *others, **options)


def count_work(
    n_samples: int, n_inp: int, d_cov: int, d_inp: int, d_out: int, n_out: int, n_iters: int = 3
) -> dict[str, int]:
    """Count what a forward and a backward pass of routing takes at least.

    Operations. The first iteration routes uniformly and needs no votes. Each of the others makes all votes, once
    forward and once more backward, where there are also two products of the same size: the gradients of the inputs and
    of `W`. So `4 (n_iters - 1)` products take `2 d_inp` operations for each number in the votes. The elementwise work
    on such a number is 8 operations forward (subtract the mean, square, scale and add; add to a weighted mean and a
    weighted variance), and twice as many backward.

    Bytes. Each input is read once. Each output and each gradient is written once, in float32.

    Returns:
        `flops` and `bytes`.
    """
    n_votes = n_samples * n_inp * n_out * d_cov * d_out
    n_inputs = n_samples * n_inp * (1 + d_cov * d_inp) + n_out * (d_inp * d_out + d_cov * d_out + 2)
    n_outputs = n_samples * n_out * (1 + 2 * d_cov * d_out)
    return {
        "flops": (n_iters - 1) * n_votes * (4 * 2 * d_inp + 3 * 8),
        "bytes": 4 * (2 * n_inputs + n_outputs),
    }


def routing_case(
    title: str,
    batch: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    n_out: int = 64,
    literal: tuple[str, ...] = LITERAL,
    fast: tuple[str, ...] = WIDE,
) -> Case:
    """Return a case of routing alone, where `sizes` are those of the inputs and of an output: `i`, `c`, `d`, `h`."""
    n_inp, d_cov, d_inp, d_out = sizes

    def draw_inputs() -> list[Tensor]:
        torch.manual_seed(SEED)
        return [torch.randn(*batch, n_inp), torch.randn(*batch, n_inp, d_cov, d_inp)]

    def build(strategy: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Run, list[Tensor]]:
        tensors = draw_inputs()
        tensors += [torch.randn(1, n_out, d_inp, d_out) / d_inp, 0.1 * torch.randn(1, n_out, d_cov, d_out)]
        tensors += [torch.randn(1, n_out), torch.randn(1, n_out)]
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
        return functools.partial(route, *tensors, n_out=n_out, strategy=strategy), tensors

    def alternatives(device: str) -> dict[str, tuple[Run, list[Tensor]]]:
        tensors = [*draw_inputs(), torch.randn(N_QUERIES, d_cov * d_inp)]
        tensors = [tensor.to(device).requires_grad_() for tensor in tensors]
        pools = {"scaled_dot_product_attention": pool_by_attention, "two products": pool_by_products}
        return {f"{ATTENTION} ({name})": (functools.partial(pool, *tensors), tensors) for name, pool in pools.items()}

    return Case(title, build, alternatives, literal, fast, count_work(math.prod(batch), *sizes, n_out))


def pool_by_attention(a_inp: Tensor, mu_inp: Tensor, queries: Tensor) -> tuple[Tensor]:
    """Pool inputs by attention of learned queries, in one head, by torch's fused function.

    Args:
        a_inp: `[..., i]`, scores of inputs, as logits: the logarithms of their sigmoids are added to the attention's.
        mu_inp: `[..., i, c, d]`, the inputs, which are keys and values.
        queries: `[q, c d]`.

    Returns:
        `[..., q, c d]`.
    """
    x = mu_inp.flatten(-2)
    mask = F.logsigmoid(a_inp).unsqueeze(-2).expand(*a_inp.shape[:-1], len(queries), -1)
    queries = queries.expand(*a_inp.shape[:-1], -1, -1)
    # One head: the fused kernels take four dimensions.
    four = [tensor.reshape(-1, 1, *tensor.shape[-2:]) for tensor in (queries, x, x, mask)]
    pooled = F.scaled_dot_product_attention(*four)
    return (pooled.reshape(*a_inp.shape[:-1], *pooled.shape[-2:]),)


def pool_by_products(a_inp: Tensor, mu_inp: Tensor, queries: Tensor) -> tuple[Tensor]:
    """Pool as `pool_by_attention` does, by two products and a softmax between them."""
    x = mu_inp.flatten(-2)
    scores = queries @ x.mT * x.shape[-1] ** -0.5 + F.logsigmoid(a_inp).unsqueeze(-2)
    return (scores.softmax(-1) @ x,)


def route_by(head: nn.Module, strategy: str) -> None:
    """Let a head route to its parts by a strategy, also by `original`, which is no option of heads."""
    head.routings[0].strategy = strategy


def build_sst_head(strategy: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Run, list[Tensor]]:
    """Build the paper's text head on the hidden states of GPT-2-large."""
    torch.manual_seed(SEED)
    head = TokenDepthHead(hidden_sizes=[1280] * 37, n_out=5)
    route_by(head, strategy)
    return on_hidden_states(head, device, dtype)


def alternatives_to_sst_head(device: str) -> dict[str, tuple[Run, list[Tensor]]]:
    """Build the head that pools the same hidden states by attention."""
    torch.manual_seed(SEED)
    head = AttentivePoolingHead(hidden_sizes=[1280] * 37, n_out=5)
    return {"attentive pooling head": on_hidden_states(head, device, torch.float32)}


def on_hidden_states(head: nn.Module, device: str, dtype: torch.dtype) -> tuple[Run, list[Tensor]]:
    """Return a pass of a head over 20 texts of 30 tokens, and its parameters."""
    hidden_states = [torch.randn(20, 30, 1280).to(device, dtype) for _ in range(37)]
    mask = torch.ones(20, 30, device=device)
    head = perturbed(head).to(device, dtype)
    return (lambda: tuple(x for x in head(hidden_states, mask)[:3] if x is not None)), list(head.parameters())


def build_smallnorb(strategy: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Run, list[Tensor]]:
    """Build the paper's network of stereo pairs, on 20 of them."""
    torch.manual_seed(SEED)
    network = perturbed(build_network("smallnorb").train()).to(device, dtype)
    route_by(network.head, strategy)
    images = torch.rand(20, 2, 96, 96).to(device, dtype)

    def run() -> tuple[Tensor, ...]:
        outputs = network(images, output_capsules=True)
        return outputs.logits, outputs.poses, outputs.variances

    return run, list(network.parameters())


def backbone_of_smallnorb(device: str) -> dict[str, tuple[Run, list[Tensor]]]:
    """Build the convolutional backbone of the same network."""
    torch.manual_seed(SEED)
    backbone = perturbed(build_network("smallnorb").train().backbone).to(device)
    images = torch.rand(20, 2, 96, 96).to(device)
    return {"its backbone alone": ((lambda: (backbone(images).last_hidden_state,)), list(backbone.parameters()))}


def perturbed(module: nn.Module) -> nn.Module:
    """Move parameters away from zero, where many start, as their gradients would be zero too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return module


CASES = {
    "smallnorb-layer": routing_case("smallNORB routing layer, 20 x 5,184 of 4x4", (20,), (5184, 4, 4, 4), fast=NARROW),
    "text-16384": routing_case("16,384 text capsules of 1x64", (), (16_384, 1, 64, 2)),
    "text-16384-256": routing_case("16,384 text capsules of 1x64, to 256", (), (16_384, 1, 64, 2), n_out=256),
    "text-65536": routing_case("65,536 text capsules of 1x64", (), (65_536, 1, 64, 2)),
    "text-1000000": routing_case("1,000,000 text capsules of 1x64", (), (1_000_000, 1, 64, 2), literal=()),
    "phrases": routing_case("SST phrases, 20 x 77 of 1x64", (20,), (77, 1, 64, 2), fast=(*WIDE, "kept")),
    "sst": routing_case("SST routing, 20 x 1,110 of 1x64", (20,), (1110, 1, 64, 2)),
    "sst-head": Case("SST head, 20 x 30 tokens, 37 x 1280", build_sst_head, alternatives_to_sst_head, LITERAL, WIDE),
    "smallnorb": Case("smallNORB network, 20 images", build_smallnorb, backbone_of_smallnorb, LITERAL, NARROW),
}


def forward(run: Run) -> tuple[Tensor, ...]:
    """Run without gradients."""
    with torch.no_grad():
        return run()


def forward_backward(run: Run, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Return outputs, and gradients of a loss that weighs every output."""
    outputs = run()
    return *outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), parameters, allow_unused=True)


def errors(actual: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> list[float]:
    """Return relative errors, in norm. A parameter that no output depends on has no gradient, and no error."""
    pairs = [(a, e) for a, e in zip(actual, exact, strict=True) if e is not None]
    return [((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for a, e in pairs]


def check_parity(name: str, strategies: list[str], device: str) -> None:
    """End the program if a strategy is less exact than it may be."""
    case = CASES[name]
    # Of a million capsules, the literal loop has room for the outputs alone.
    compute = forward_backward if case.literal else lambda run, _: forward(run)
    exact = compute(*case.build("reference", device, torch.float64))
    limits = [max(2.0 * error, PARITY) for error in errors(compute(*case.build("reference", device)), exact)]
    for strategy in strategies:
        found = errors(compute(*case.build(strategy, device)), exact)
        if not all(error <= limit for error, limit in zip(found, limits, strict=True)):
            sys.exit(
                f"{name}: {strategy} errs by {max(found):.1e}, not as little as the reference; nothing is reported."
            )


def seconds(function: Callable[[], object], device: str) -> float:
    """Return the time of one call, or on CUDA the median of several, each between two events of the device."""
    if device == "cuda":
        from triton.testing import do_bench  # not everyone has it

        return do_bench(function, **WINDOWS, return_mode="median") / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Return the bytes held at once beyond those held before: allocated (CUDA), or resident (Linux); None elsewhere."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    status, clear_refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and not given back would hide what is allocated
        clear_refs.write_text("5")  # resets the peak
    except (AttributeError, OSError, TypeError):  # another C library, another system, or no permission
        return None
    before = _kilobytes(status, "VmRSS")
    function()
    return (_kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def device_events(function: Callable[[], object]) -> list:
    """Return what the profiler sees on the CUDA device in one call: kernels, copies and fills of memory."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return on_device(profiler.events())


def on_device(events: list) -> list:
    """Return the events of a profile that are work of the device: no calls on the host, no ranges that a user named."""
    is_cuda = [event.device_type == torch.autograd.DeviceType.CUDA for event in events]
    return [event for event, on_cuda in zip(events, is_cuda) if on_cuda and not event.is_user_annotation]


def launches_and_busy(events: list) -> dict[str, float]:
    """Return the number of launches, and the seconds that the device was busy with them."""
    return {"launches": len(events), "busy": sum(event.time_range.elapsed_us() for event in events) / 1e6}


def strategies_of(name: str, device: str) -> list[str]:
    """Return the fast strategies of a case that run on the device."""
    on_it = [strategy for strategy in CASES[name].fast if ONE_DEVICE.get(strategy, device) == device]
    return [strategy for strategy in on_it if STRATEGIES[strategy].missing() is None]


def contestants(name: str, device: str) -> dict[str, dict[str, Callable[[], object]]]:
    """Return what to time in a case: for each contestant, the functions by what they are."""
    case = CASES[name]
    built = {strategy: case.build(strategy, device) for strategy in (*case.literal, *strategies_of(name, device))}
    if device == "cuda":
        built |= case.alternatives(device)
    functions = {
        each: {
            "forward": functools.partial(forward, run),
            "forward_backward": functools.partial(forward_backward, run, tensors),
        }
        for each, (run, tensors) in built.items()
    }
    if device == "cuda" and "reference" in case.literal:
        run, tensors = case.build("reference", device)
        compiled = compiled_or_none(name, run, tensors)
        if compiled is not None:
            functions[COMPILED] = {"forward_backward": compiled}
    return functions


def compiled_or_none(name: str, run: Run, tensors: list[Tensor]) -> Callable[[], object] | None:
    """Compile a forward and a backward pass; None, and a line that says why, if that fails or takes too long."""
    torch.compiler.reset()
    function = functools.partial(forward_backward, torch.compile(run), tensors)
    try:
        with time_limit(MOST_SECONDS_TO_COMPILE):
            function()
    except Exception as error:  # the compiler raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        print(f"{name}: the reference under torch.compile is left out: {reason}", flush=True)
        return None
    return function


@contextlib.contextmanager
def time_limit(most_seconds: int) -> Iterator[None]:
    """Raise a `TimeoutError` in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {most_seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(most_seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def benchmark(name: str, device: str, repeats: int) -> list[Row]:
    """Time one case. Each round runs every contestant, so that all see the same machine."""
    title = CASES[name].title
    check_parity(name, strategies_of(name, device), device)
    functions = contestants(name, device)
    times = {each: {kind: [] for kind in ("forward", "forward_backward")} for each in functions}
    for _ in range(repeats):
        for each, kinds in functions.items():
            for kind, function in kinds.items():
                times[each][kind].append(seconds(function, device))
    rows = []
    for each, kinds in functions.items():
        both = kinds["forward_backward"]
        row = {"case": name, "title": title, "strategy": each, **times[each], "peak_memory": peak_memory(both, device)}
        rows.append(row | (launches_and_busy(device_events(both)) if device == "cuda" else {}))
    return without_slower_pooling(rows)


def without_slower_pooling(rows: list[Row]) -> list[Row]:
    """Leave out the slower of the two ways to pool by attention."""
    pooling = [row for row in rows if str(row["strategy"]).startswith(ATTENTION)]
    pooling.sort(key=lambda row: statistics.median(row["forward_backward"]))
    return [row for row in rows if row not in pooling[1:]]


def bounds(names: list[str], about: Row) -> dict[str, Row]:
    """Return the work of each case of routing alone, and the seconds that it takes at the machine's measured rates."""
    found = {}
    for name in names:
        work = CASES[name].work
        if work is None:
            continue
        arithmetic = work["flops"] / about["float32_product_gflops"] / 1e9
        copies = work["bytes"] / about["copy_gb_per_second"] / 1e9
        found[name] = work | {"arithmetic": arithmetic, "copies": copies, "bound": max(arithmetic, copies)}
        if "tf32_product_gflops" in about:
            found[name]["as_three_tf32"] = 3 * work["flops"] / about["tf32_product_gflops"] / 1e9
    return found


def table_of_bounds(found: dict[str, Row]) -> str:
    """Return Markdown: the work of each case, and the time that it takes at least."""
    lines = [
        "| case | GFLOP | float32 arithmetic, ms | as three TF32 products, ms | MB | copies, ms | bound, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found.items():
        cells = [CASES[name].title, f"{row['flops'] / 1e9:,.2f}", milliseconds(row["arithmetic"])]
        cells += [milliseconds(row["as_three_tf32"]) if "as_three_tf32" in row else "-"]
        cells += [f"{row['bytes'] / 1e6:,.1f}", milliseconds(row["copies"]), milliseconds(row["bound"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[Row], found: dict[str, Row]) -> str:
    """Return Markdown: medians (and least and most), multiples of the bound, and how many times less than each loop."""
    lines = [
        "| case | strategy | forward, ms | forward + backward, ms | launches | busy, ms | MB | times the bound "
        "| faster than original / reference | memory |",
        f"|{' --- |' * 10}",
    ]
    by_key = {(row["case"], row["strategy"]): row for row in rows}
    for row in rows:
        name = row["strategy"]
        cells = [row["title"], f"`{name}`" if name in (*LITERAL, *NARROW) else name]
        cells += [spread(row[kind]) for kind in ("forward", "forward_backward")]
        cells += [f"{row['launches']:,}", milliseconds(row["busy"])] if "launches" in row else ["-", "-"]
        cells.append("-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.0f}")
        bound = found.get(row["case"])
        is_routing = bound and name in (*LITERAL, *NARROW, COMPILED)
        cells.append(f"{statistics.median(row['forward_backward']) / bound['bound']:,.1f}" if is_routing else "-")
        loops = [by_key.get((row["case"], loop)) for loop in LITERAL]
        if None in loops or name in LITERAL:
            cells += ["", ""]
        else:
            cells.append(" / ".join(f"{ratio(loop, row, 'forward_backward'):.1f}x" for loop in loops))
            memory = [each["peak_memory"] for each in (row, *loops)]
            ratios = "-" if None in memory else " / ".join(f"1/{loop / max(memory[0], 1):.0f}" for loop in memory[1:])
            cells.append(ratios)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(times: list[float]) -> str:
    """Return the median in milliseconds, and the least and the most."""
    if not times:
        return "-"
    return f"{milliseconds(statistics.median(times))} ({milliseconds(min(times))} - {milliseconds(max(times))})"


def milliseconds(time_in_seconds: float) -> str:
    """Return a time in milliseconds, of three digits or more where there are any."""
    time_in_ms = 1e3 * time_in_seconds
    return f"{time_in_ms:,.{3 if time_in_ms < 1 else 2 if time_in_ms < 10 else 1 if time_in_ms < 100 else 0}f}"


def ratio(slow: Row, fast: Row, kind: str) -> float:
    """Return the median over rounds of the ratio within a round."""
    return statistics.median(s / f for s, f in zip(slow[kind], fast[kind], strict=True))


PROFILE_HEADER = {
    "cpu": "| case | strategy | forward + backward, ms | products, ms | GFLOP | GFLOP/s | rest, ms | calls |",
    "cuda": "| case | strategy | kernel | launches | ms |",
}


def profile_on_cuda(name: str) -> list[str]:
    """Return rows of Markdown: the ten kernels of each fast strategy that take most of the time."""
    case, rows = CASES[name], []
    for strategy in strategies_of(name, "cuda"):
        run, tensors = case.build(strategy, "cuda")
        by_kernel = collections.defaultdict(list)
        for event in device_events(functools.partial(forward_backward, run, tensors)):
            by_kernel[event.name].append(event)
        found = {kernel: launches_and_busy(events) for kernel, events in by_kernel.items()}
        for kernel in sorted(found, key=lambda kernel: -found[kernel]["busy"])[:10]:
            launches, busy = found[kernel].values()
            rows.append(f"| {case.title} | `{strategy}` | `{kernel[:80]}` | {launches:,} | {milliseconds(busy)} |")
    return rows


def profile_on_cpu(name: str) -> list[str]:
    """Return rows of Markdown: what a forward and a backward pass of each fast strategy spends its time on."""
    case, rows = CASES[name], []
    for strategy in strategies_of(name, "cpu"):
        run, tensors = case.build(strategy, "cpu")
        function = functools.partial(forward_backward, run, tensors)
        function()
        wall = min(seconds(function, "cpu") for _ in range(5))
        with torch.profiler.profile(with_flops=True, record_shapes=True) as profiler:
            function()
        events = profiler.key_averages(group_by_input_shape=True)
        if strategy == "cpu":
            counted = [event for event in events if event.key in KERNELS]
            flops = cpu_product_flops(*run.args) if isinstance(run, functools.partial) else None
        else:
            counted = [event for event in events if event.key.removesuffix("_") in PRODUCTS]
            flops = sum(event.flops for event in counted)
            for event in counted:
                if event.key == "aten::baddbmm_":  # of which torch counts none
                    flops += 2 * event.count * math.prod(event.input_shapes[1]) * event.input_shapes[2][-1]
        in_counted = sum(event.self_cpu_time_total for event in counted) / 1e6
        n_calls = sum(e.count for e in events if e.key.startswith("aten::"))
        rates = " - | - " if flops is None else f" {flops / 1e9:.1f} | {flops / in_counted / 1e9:,.0f} "
        rest = max(0.0, wall - in_counted)  # the profiled run may be the slower one
        rows.append(
            f"| {case.title} | `{strategy}` | {1e3 * wall:,.0f} | {1e3 * in_counted:,.0f} |{rates}| {1e3 * rest:,.0f} "
            f"| {n_calls:,} |"
        )
    return rows


def cpu_product_flops(a_inp: Tensor, mu_inp: Tensor, W: Tensor, *_: Tensor, n_iters: int = 3) -> int:
    """Count the operations of matrix products in the kernels of `cpu` in routing alone: torch does not see them.

    Narrow inputs: votes are made twice in a pass, and a backward pass has two products more, for the gradients of the
    inputs and of `W`. Wide inputs: all four once for each iteration after the first, or once for a direction where
    votes are kept.
    """
    _, n_out, d_inp, d_out = W.shape
    votes = n_votes(mu_inp, n_out, d_out)
    if d_inp <= cpu.NARROW:
        n_products = 6 * (n_iters - 1)
    elif votes * mu_inp.element_size() <= cpu.MAX_KEPT:
        n_products = 4
    else:
        n_products = 4 * (n_iters - 1)
    return 2 * n_products * votes * d_inp


def machine(device: str) -> Row:
    """Return what the numbers depend on, and the rates of large matrix products and copies."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor_name()
    size = 8192 if device == "cuda" else 2048

    def rate_of_products(dtype: torch.dtype) -> float:
        a = torch.randn(size, size, device=device, dtype=dtype)
        return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(5)) / 1e9

    about = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "float32_product_gflops": rate_of_products(torch.float32),
        "float64_product_gflops": rate_of_products(torch.float64),
    }
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        about["tf32_product_gflops"] = rate_of_products(torch.float32)
        torch.set_float32_matmul_precision("highest")
    big = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(big)
    copy = min(seconds(lambda: target.copy_(big), device) for _ in range(5))
    return about | {"copy_gb_per_second": 2 * big.numel() * big.element_size() / copy / 1e9}


def main() -> None:
    """Run the benchmark from the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to run on")
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, help="number of rounds, each of which runs every contestant"
    )
    parser.add_argument("--profile", action="store_true", help="table of what takes the time, instead of ratios")
    parser.add_argument("--json", type=file_to_write, help="file to write every measured time to")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda was asked for, and torch finds no CUDA device on this machine; use --device cpu.")

    STRATEGIES["original"] = Original()
    about = machine(arguments.device)
    print(
        ", ".join(
            f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in about.items()
        ),
        flush=True,
    )
    if arguments.profile:
        profile = profile_on_cuda if arguments.device == "cuda" else profile_on_cpu
        header = PROFILE_HEADER[arguments.device]
        print(f"{header}\n|{' --- |' * (header.count('|') - 1)}")
        for name in arguments.cases:
            print("\n".join(profile(name)), flush=True)
        return
    found = bounds(arguments.cases, about)
    rows = []
    for name in arguments.cases:
        rows += benchmark(name, arguments.device, arguments.repeats)
        print(f"{name} done", file=sys.stderr, flush=True)
    print(f"\n{table_of_bounds(found)}\n\n{table(rows, found)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "bounds": found, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
