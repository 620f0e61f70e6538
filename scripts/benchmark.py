#!/usr/bin/env python
"""Times every routing strategy against the literal loop, pair by pair in one process, after checking that all agree.

    python scripts/benchmark.py --json benchmark.json
    python scripts/benchmark.py --cases text-65536 sst --repeats 5
    python scripts/benchmark.py --device cuda
    python scripts/benchmark.py --cases sst smallnorb-layer --profile

Two literal loops stand as baselines. `original` is the one of the paper's own code, which copies shared weights to
every input before it computes the votes; `reference` is this package's, which does not. Times are those of a forward
pass without gradients, and of a forward and a backward pass; memory is the most that the latter held at once beyond
inputs and parameters, gradients included. The script fails, and reports nothing, if an output or a gradient of a
strategy is further from the float64 reference than twice the float32 reference is (or than 1e-5, if that is more).
`--profile` says instead what the time of the fast strategies goes to. Of `numba`, the time of "products" is that of its
kernels, which do the elementwise work too.
"""

import argparse
import ctypes
import datetime
import functools
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from capsule_heads.convert import build_network
from capsule_heads.heads import TokenDepthHead
from capsule_heads.ops import STRATEGIES, route
from capsule_heads.ops.autograd import n_votes
from capsule_heads.training.command_line import OneLineParser, at_least, file_to_write

SEED = 0
PARITY = 1e-5
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
KERNELS = [
    f"capsule_heads::{name}"  # as the profiler sees them
    for name in ("statistics", "gradients", "gradients_of_kept", "uniform_moments", "uniform_gradients")
]


def original(a_inp: Tensor, mu_inp: Tensor, W: Tensor, *others: Tensor, **options: object) -> tuple[Tensor, ...]:
    """The loop as the paper's code has it: shared weights are first expanded, one copy for each input."""
    return STRATEGIES["reference"](a_inp, mu_inp, W.expand(mu_inp.shape[-3], -1, -1, -1), *others, **options)


def routing_case(batch: tuple[int, ...], n_inp: int, d_cov: int, d_inp: int, d_out: int, n_out: int = 64):
    """A case of routing alone."""

    def build(strategy: str, device: str, dtype: torch.dtype = torch.float32):
        torch.manual_seed(SEED)
        tensors = [torch.randn(*batch, n_inp), torch.randn(*batch, n_inp, d_cov, d_inp)]
        tensors += [torch.randn(1, n_out, d_inp, d_out) / d_inp, 0.1 * torch.randn(1, n_out, d_cov, d_out)]
        tensors += [torch.randn(1, n_out), torch.randn(1, n_out)]
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
        return functools.partial(route, *tensors, n_out=n_out, strategy=strategy), tensors

    return build


def sst_head_case(strategy: str, device: str, dtype: torch.dtype = torch.float32):
    """The paper's text head on the hidden states of GPT-2-large."""
    torch.manual_seed(SEED)
    head = TokenDepthHead(d_emb=[1280] * 37, n_out=5, strategy=strategy)
    hidden_states = [torch.randn(20, 30, 1280).to(device, dtype) for _ in range(37)]
    head = perturbed(head).to(device, dtype)
    return (lambda: head(hidden_states, torch.ones(20, 30, device=device))[:3]), list(head.parameters())


def smallnorb_case(strategy: str, device: str, dtype: torch.dtype = torch.float32):
    """The whole network, on 20 stereo pairs."""
    torch.manual_seed(SEED)
    network = build_network("smallnorb", strategy=strategy).train()
    network = perturbed(network).to(device, dtype)
    images = torch.rand(20, 2, 96, 96).to(device, dtype)

    def run():
        outputs = network(images, output_capsules=True)
        return outputs.logits, outputs.poses, outputs.variances

    return run, list(network.parameters())


def perturbed(module: nn.Module) -> nn.Module:
    """Away from zero, where many parameters start, as their gradients would be zero too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return module


NARROW, WIDE = ("moments", "votes", "numba", "triton"), ("votes", "numba", "triton")
LITERAL = ("original", "reference")
CASES = {  # name: what it is, how to build it, the literal loops that fit in memory, the strategies worth a run
    "smallnorb-layer": (
        "smallNORB routing layer, 20 x 5,184 of 4x4",
        routing_case((20,), 5184, 4, 4, 4),
        LITERAL,
        NARROW,
    ),
    "text-16384": ("16,384 text capsules of 1x64", routing_case((), 16_384, 1, 64, 2), LITERAL, WIDE),
    "text-16384-256": (
        "16,384 text capsules of 1x64, to 256",
        routing_case((), 16_384, 1, 64, 2, n_out=256),
        LITERAL,
        WIDE,
    ),
    "text-65536": ("65,536 text capsules of 1x64", routing_case((), 65_536, 1, 64, 2), LITERAL, WIDE),
    "text-1000000": ("1,000,000 text capsules of 1x64", routing_case((), 1_000_000, 1, 64, 2), (), WIDE),
    "sst": ("SST routing, 20 x 1,110 of 1x64", routing_case((20,), 1110, 1, 64, 2), LITERAL, WIDE),
    "sst-head": ("whole SST head, 20 x 30 tokens, 37 x 1280", sst_head_case, LITERAL, WIDE),
    "smallnorb": ("whole smallNORB network, 20 images", smallnorb_case, LITERAL, NARROW),
}


def forward(run) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return run()


def forward_backward(run, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs and gradients, of a loss that weighs every output."""
    outputs = run()
    return *outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), parameters, allow_unused=True)


def errors(actual: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...]) -> list[float]:
    """Relative, in norm. A parameter that no output depends on has no gradient, and no error."""
    pairs = [(a, e) for a, e in zip(actual, exact, strict=True) if e is not None]
    return [((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item() for a, e in pairs]


def check_parity(name: str, strategies: list[str], device: str) -> None:
    """Exits if a strategy is less exact than it may be."""
    _, build, literal, _ = CASES[name]
    # Of a million capsules, the literal loop has room for the outputs alone.
    compute = forward_backward if literal else lambda run, _: forward(run)
    exact = compute(*build("reference", device, torch.float64))
    limits = [max(2.0 * error, PARITY) for error in errors(compute(*build("reference", device)), exact)]
    for strategy in strategies:
        found = errors(compute(*build(strategy, device)), exact)
        if not all(error <= limit for error, limit in zip(found, limits, strict=True)):
            sys.exit(
                f"{name}: {strategy} errs by {max(found):.1e}, not as little as the reference; nothing is reported."
            )


def seconds(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(function, device: str) -> int | None:
    """Bytes held at once beyond those held before: allocated (CUDA), or resident (Linux); None elsewhere."""
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


def strategies_of(name: str, device: str) -> list[str]:
    """The fast strategies of a case that run on the device."""
    has_numba = device == "cpu" and importlib.util.find_spec("numba") is not None
    missing = {"triton"} if device != "cuda" else set()
    missing |= set() if has_numba else {"numba"}
    return [strategy for strategy in CASES[name][3] if strategy not in missing]


def benchmark(name: str, device: str, repeats: int) -> list[dict[str, object]]:
    """Times one case. Each round runs every contestant once, so that all see the same machine."""
    title, build, literal, _ = CASES[name]
    strategies = strategies_of(name, device)
    check_parity(name, strategies, device)
    runs = {}
    for strategy in (*literal, *strategies):
        run, parameters = build(strategy, device)
        runs[strategy] = {
            "forward": functools.partial(forward, run),
            "forward_backward": functools.partial(forward_backward, run, parameters),
        }
    times = {strategy: {kind: [] for kind in kinds} for strategy, kinds in runs.items()}
    for _ in range(repeats):
        for strategy, kinds in runs.items():
            for kind, function in kinds.items():
                times[strategy][kind].append(seconds(function, device))
    return [
        {"case": name, "title": title, "strategy": strategy, **times[strategy]}
        | {"peak_memory": peak_memory(kinds["forward_backward"], device)}
        for strategy, kinds in runs.items()
    ]


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: medians (and least and most), and how many times less than each literal loop."""
    lines = [
        "| case | strategy | forward, ms | forward + backward, ms | MB | faster than original / reference | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    by_key = {(row["case"], row["strategy"]): row for row in rows}
    for row in rows:
        cells = [row["title"], f"`{row['strategy']}`"]
        for kind in ("forward", "forward_backward"):
            milliseconds = [1e3 * t for t in row[kind]]
            least, most = min(milliseconds), max(milliseconds)
            cells.append(f"{statistics.median(milliseconds):,.0f} ({least:,.0f} - {most:,.0f})")
        cells.append("-" if row["peak_memory"] is None else f"{row['peak_memory'] / 1e6:,.0f}")
        loops = [by_key.get((row["case"], loop)) for loop in LITERAL]
        if None in loops or row["strategy"] in LITERAL:
            cells += ["", ""]
        else:
            cells.append(" / ".join(f"{ratio(loop, row, 'forward_backward'):.1f}x" for loop in loops))
            memory = [each["peak_memory"] for each in (row, *loops)]
            ratios = "-" if None in memory else " / ".join(f"1/{loop / max(memory[0], 1):.0f}" for loop in memory[1:])
            cells.append(ratios)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def profile(name: str, device: str) -> list[str]:
    """Rows of Markdown: what a forward and a backward pass of each fast strategy spends its time on."""
    title, build, _, _ = CASES[name]
    rows = []
    for strategy in strategies_of(name, device):
        run, tensors = build(strategy, device)
        function = functools.partial(forward_backward, run, tensors)
        function()
        wall = min(seconds(function, device) for _ in range(5))
        with torch.profiler.profile(with_flops=True, record_shapes=True) as profiler:
            function()
        events = profiler.key_averages(group_by_input_shape=True)
        if strategy == "numba":
            counted = [event for event in events if event.key in KERNELS]
            flops = numba_product_flops(*run.args) if isinstance(run, functools.partial) else None
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
            f"| {title} | `{strategy}` | {1e3 * wall:,.0f} | {1e3 * in_counted:,.0f} |{rates}| {1e3 * rest:,.0f} | "
            f"{n_calls:,} |"
        )
    return rows


def numba_product_flops(a_inp: Tensor, mu_inp: Tensor, W: Tensor, *_: Tensor, n_iters: int = 3) -> int:
    """What the matrix products in the kernels of `numba` take in routing alone: torch does not see them.

    Narrow inputs: votes are made twice in a pass, and a backward pass has two products more, for the gradients of the
    inputs and of `W`. Wide inputs: all four once for each iteration after the first, or once for a direction where
    votes are kept.
    """
    from capsule_heads.ops import numba  # only here: not everyone has it

    _, n_out, d_inp, d_out = W.shape
    votes = n_votes(mu_inp, n_out, d_out)
    if d_inp <= numba.NARROW:
        n_products = 6 * (n_iters - 1)
    elif votes * mu_inp.element_size() <= numba.MAX_KEPT:
        n_products = 4
    else:
        n_products = 4 * (n_iters - 1)
    return 2 * n_products * votes * d_inp


def ratio(slow: dict[str, object], fast: dict[str, object], kind: str) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(s / f for s, f in zip(slow[kind], fast[kind], strict=True))


def machine(device: str) -> dict[str, object]:
    """What the numbers depend on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )
    a = torch.randn(2048, 2048, device=device)
    big = torch.empty(2**26, device=device)
    product = min(seconds(lambda: a @ a, device) for _ in range(5))
    b = a.double()
    product64 = min(seconds(lambda: b @ b, device) for _ in range(5))
    target = torch.empty_like(big)
    copy = min(seconds(lambda: target.copy_(big), device) for _ in range(5))
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "float32_product_gflops": 2 * 2048**3 / product / 1e9,
        "float64_product_gflops": 2 * 2048**3 / product64 / 1e9,
        "copy_gb_per_second": 2 * big.numel() * big.element_size() / copy / 1e9,
    }


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, help="rounds, in each of which every strategy runs once"
    )
    parser.add_argument("--profile", action="store_true", help="what the time goes to, instead of ratios")
    parser.add_argument("--json", type=file_to_write, help="a file to write every measured time to")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda was asked for, and torch finds no CUDA device on this machine; use --device cpu.")

    STRATEGIES["original"] = original
    about = machine(arguments.device)
    print(
        ", ".join(
            f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in about.items()
        )
    )
    if arguments.profile:
        print("| case | strategy | forward + backward, ms | products, ms | GFLOP | GFLOP/s | rest, ms | calls |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name in arguments.cases:
            print("\n".join(profile(name, arguments.device)))
        return
    rows = []
    for name in arguments.cases:
        rows += benchmark(name, arguments.device, arguments.repeats)
        print(f"{name} done", file=sys.stderr)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
