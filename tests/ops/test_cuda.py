"""Strategy "cuda", without a GPU: its kernels in Triton's interpreter, and compiled for GPUs that are not there.

The interpreter replaces the functions of `triton.language` when Triton is imported, and this process may have imported
it already. So the kernels run in a process of their own, which receives tensors and answers with tensors.
"""

import json
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from oracle import INF, NAMES, OUTPUTS, as_torch, draw, random_cotangents

from capsule_heads.ops import route

pytest.importorskip("triton", reason="Triton has no wheels for this platform")

from capsule_heads.ops import cuda
from capsule_heads.ops.strategy import Call

SERVER = """
import os, pickle, sys, traceback
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from capsule_heads.ops import cuda, route

requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what else is printed must not get into the answers
defaults = {name: getattr(cuda, name) for name in ("_TILE", "_TILE_OF_W", "_n_programs")}
VIEWS_AND_ALLOCATIONS = {
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "view", "_unsafe_view", "expand",
    "permute", "transpose", "t", "detach", "alias", "slice", "select", "unsqueeze", "squeeze", "as_strided", "unbind",
    "promote_types",  # of the host alone
}

launch, launches = cuda.Launcher.__call__, []

def counted(self, *arguments):
    launches.append(self.kernel.__name__ if hasattr(self.kernel, "__name__") else self.kernel.fn.__name__)
    with _disable_current_modes():  # the interpreter copies tensors
        launch(self, *arguments)

cuda.Launcher.__call__ = counted

class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS_AND_ALLOCATIONS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

def count(run, *arguments, **options):
    launches.clear()
    with Operations() as operations:
        results = run(*arguments, **options)
    return results, (list(launches), operations.names)

while True:
    try:
        tensors, cotangents, options, settings = pickle.load(requests)
    except EOFError:
        break
    for name, value in (defaults | settings).items():
        setattr(cuda, name, value if callable(value) or name != "_n_programs" else lambda device, n=value: n)
    cuda.Sizes.of.cache_clear()
    cuda._launcher.cache_clear()
    try:
        tensors = [x.requires_grad_() for x in tensors]
        outputs, forward = count(route, *tensors, strategy="cuda", **options)
        gradients, backward = [], None
        if cotangents is not None:
            gradients, backward = count(torch.autograd.grad, outputs, tensors, cotangents)
        answer = [x.detach() for x in (*outputs, *gradients)], forward, backward
    except Exception:
        answer = traceback.format_exc()
    pickle.dump(answer, answers)
    answers.flush()
"""


class Interpreter:
    """Route in the process of the interpreter, and differentiate there if cotangents are given."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def counted(self, tensors, cotangents, options, settings=None):
        """Return results, and for each direction the kernels launched and the names of torch operations."""
        pickle.dump(([x.detach() for x in tensors], cotangents, options, settings or {}), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        assert not isinstance(answer, str), answer
        return answer

    def __call__(self, *arguments):
        return self.counted(*arguments)[0]


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.process.communicate(timeout=60)  # it ends where its requests end


def on_gpu(tensors, cotangents, options, settings=None):
    """Do what `Interpreter` does, by the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings or {}).items():
            patch.setattr(cuda, name, (lambda device, n=value: n) if name == "_n_programs" else value)
        clear_caches()
        tensors = [x.detach().cuda().requires_grad_() for x in tensors]
        outputs = route(*tensors, strategy="cuda", **options)
        gradients = torch.autograd.grad(outputs, tensors, [x.cuda() for x in cotangents])
    clear_caches()
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def clear_caches():
    """Forget what was chosen under other settings."""
    cuda.Sizes.of.cache_clear()
    cuda._launcher.cache_clear()


def gradients_of(pairs, tensors):
    """Return the gradients of outputs paired with their cotangents."""
    outputs, cotangents = zip(*pairs)
    return torch.autograd.grad(outputs, tensors, cotangents)


def by_reference(tensors, cotangents, options):
    """Return cotangents, drawn unless given, and outputs and gradients of the literal loop."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = route(*tensors, strategy="reference", **options)
    if cotangents is None:
        cotangents = random_cotangents(outputs)
    pairs = [
        (x, y) for x, y in zip(outputs, cotangents, strict=True) if x.requires_grad
    ]  # R of one iteration: constant
    return cotangents, [x.detach() for x in (*outputs, *gradients_of(pairs, tensors))]


def names(options):
    return [*(OUTPUTS if options["return_R"] else OUTPUTS[:3]), *(f"d_{name}" for name in NAMES)]


def errors(actual, expected, options):
    """Return errors by name, relative to the norm, or absolute where zero is expected."""
    assert [x.shape for x in actual] == [x.shape for x in expected]
    pairs = zip(names(options), actual, expected, strict=True)
    return {name: ((a.double() - b.double()).norm() / (b.double().norm() or 1.0)).item() for name, a, b in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# Outputs and gradients
# ---------------------------------------------------------------------------------------------------------------------

TEXT = {"d_cov": 1, "d_inp": 64, "d_out": 2}  # wide
POSES = {"d_cov": 3, "d_inp": 5, "d_out": 3}  # narrow, as the next
SQUARES = {"d_cov": 4, "d_inp": 4, "d_out": 4}
LONG_POSES = {"d_cov": 4, "d_inp": 5, "d_out": 8}  # 32 planes of votes: too many for the narrow kernels
CHUNKS = {"d_cov": 3, "d_inp": 70, "d_out": 2}  # columns of inputs in several steps
OWN = {"n_inp": 7, "d_cov": 1, "d_inp": 2, "d_out": 2, "own_inp": True}
OWN_POSES = {"n_inp": 5, "d_cov": 3, "d_inp": 4, "d_out": 3, "own_inp": True}
SMALL_BLOCKS = {"_TILE": 256, "_TILE_OF_W": 256}  # 16 inputs by 16 outputs, the smallest


def case(shape, n_out, n_iters, p_model, *, return_R=True, batch=(2,), edit=None, settings=None, **draw_options):
    shape = {"n_inp": 37, "n_out": n_out, "batch": batch, "own_inp": False, **shape, **draw_options}
    options = {"n_out": n_out, "n_iters": n_iters, "p_model": p_model, "return_R": return_R}
    return shape, options, edit, settings


def mask_some(a_inp, mu_inp, *parameters):
    a_inp = a_inp.clone()
    a_inp[..., ::3] = -INF
    a_inp[..., 1] = INF
    return a_inp, mu_inp, *parameters


def mask_all(a_inp, *others):
    return torch.full_like(a_inp, -INF), *others


def share(*which):
    """Return an edit that keeps the first input's values of some parameters, for all inputs."""

    def edit(*tensors):
        return [x[:1] if name in which else x for name, x in zip(NAMES, tensors, strict=True)]

    return edit


def transpose(a_inp, mu_inp, *parameters):
    """Return the same values, in another order in memory."""
    return a_inp.T.contiguous().T, mu_inp.transpose(-1, -3).contiguous().transpose(-1, -3), *parameters


CASES = {
    "one iteration": case(TEXT, 5, 1, "gaussian", return_R=False),
    "one iteration, R": case(TEXT, 5, 1, "gaussian"),
    "one iteration, R, narrow": case(POSES, 5, 1, "skm"),
    "four iterations": case(TEXT, 5, 4, "gaussian"),
    "four iterations, narrow": case(SQUARES, 5, 4, "gaussian", batch=()),
    "text, two iterations": case(TEXT, 17, 2, "gaussian", return_R=False),
    "text, three iterations": case(TEXT, 5, 3, "gaussian"),
    "text, skm": case(TEXT, 17, 3, "skm"),
    "poses": case(POSES, 5, 3, "gaussian", return_R=False),
    "poses, skm": case(POSES, 17, 2, "skm", batch=()),
    "squares": case(SQUARES, 5, 3, "gaussian", batch=()),
    "squares, skm": case(SQUARES, 17, 2, "skm", return_R=False, batch=()),
    "long poses": case(LONG_POSES, 5, 2, "gaussian"),
    "chunks": case(CHUNKS, 5, 3, "gaussian"),
    "chunks, skm": case(CHUNKS, 5, 2, "skm", settings=SMALL_BLOCKS),
    "odd width": case({"d_cov": 1, "d_inp": 21, "d_out": 3}, 5, 2, "gaussian", batch=(2, 2)),
    "three rows, wide": case({"d_cov": 3, "d_inp": 64, "d_out": 2}, 17, 2, "gaussian", batch=()),
    "one output": case({"d_cov": 1, "d_inp": 5, "d_out": 1}, 1, 2, "gaussian"),
    "shared by outputs": case(TEXT, 5, 3, "gaussian", own_out=False),
    "some masked": case(TEXT, 5, 3, "gaussian", edit=mask_some),
    "some masked, skm": case(POSES, 5, 2, "skm", edit=mask_some),
    "all masked": case(TEXT, 5, 3, "gaussian", return_R=False, edit=mask_all),
    "all masked, skm": case(TEXT, 5, 3, "skm", edit=mask_all),
    "other strides": case(POSES, 5, 2, "gaussian", edit=transpose),
    # Three blocks in each sample of 37 inputs: a program each; or two for the first program and one for the second
    "programs": case(TEXT, 5, 3, "gaussian", settings=SMALL_BLOCKS),
    "programs of blocks": case(TEXT, 17, 3, "gaussian", settings=SMALL_BLOCKS | {"_n_programs": 4}),
    "programs of blocks, poses": case(POSES, 5, 2, "skm", settings=SMALL_BLOCKS | {"_n_programs": 4}),
    "one program": case(TEXT, 5, 2, "gaussian", settings=SMALL_BLOCKS | {"_n_programs": 1}),
    "programs, some masked": case(TEXT, 5, 2, "gaussian", edit=mask_some, settings=SMALL_BLOCKS | {"_n_programs": 4}),
    "programs of blocks, squares": case(
        SQUARES, 5, 3, "gaussian", n_inp=69, batch=(), edit=mask_some, settings={"_n_programs": 2}
    ),
    "own": case(OWN, 5, 3, "gaussian"),
    "own, without R": case(OWN, 5, 2, "gaussian", return_R=False, batch=(2, 2)),
    "own, skm": case(OWN, 5, 3, "skm"),
    "own poses": case(OWN_POSES, 5, 3, "gaussian", batch=()),
    "own poses, skm": case(OWN_POSES, 4, 2, "skm"),
    "own, one iteration": case(OWN, 5, 1, "gaussian"),
    "own, four iterations": case(OWN_POSES, 3, 4, "gaussian"),
    "own, one output": case(OWN, 1, 2, "gaussian"),
    "own, shared by outputs": case(OWN_POSES, 5, 3, "gaussian", own_out=False),
    "own, some masked": case(OWN, 5, 3, "gaussian", edit=mask_some),
    "own, all masked": case(OWN, 5, 3, "gaussian", edit=mask_all),
    "own W": case(OWN_POSES, 5, 3, "gaussian", edit=share("B", "beta_use", "beta_ign")),
    "own betas": case(OWN_POSES, 5, 2, "skm", edit=share("W", "B")),
    "own B and beta_use": case(OWN, 5, 3, "gaussian", edit=share("W", "beta_ign")),
}


def check(run, shape, options, edit, settings):
    tensors = as_torch(draw(**shape))
    tensors = tensors if edit is None else edit(*tensors)
    cotangents, expected = by_reference(tensors, None, options)
    actual = run(tensors, cotangents, options, settings)
    for name, error in errors(actual, expected, options).items():
        assert error < 1e-11, name  # NaN fails too


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(interpreter, name):
    check(interpreter, *CASES[name])


def test_the_cases_are_narrow_or_wide():
    def is_narrow(shape):
        return cuda.Sizes.of(shape["d_cov"], shape["d_inp"], shape["d_out"], 5, False).is_narrow

    assert is_narrow(POSES) and is_narrow(SQUARES)
    assert not (is_narrow(TEXT) or is_narrow(LONG_POSES) or is_narrow(CHUNKS))


@pytest.mark.parametrize(
    "shape",
    [
        {"n_inp": 2, "d_cov": 1, "d_inp": 17, "d_out": 1, "own_inp": False},
        {"n_inp": 3, "d_cov": 1, "d_inp": 2, "d_out": 1, "own_inp": False},
        {"n_inp": 3, "d_cov": 1, "d_inp": 2, "d_out": 1, "own_inp": True},
    ],
    ids=["wide", "narrow", "own"],
)
def test_gradcheck(interpreter, shape):
    options = {"n_out": 2, "n_iters": 2, "p_model": "gaussian", "return_R": True}

    class Route(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tuple(interpreter(tensors, None, options))

        @staticmethod
        def backward(ctx, *cotangents):
            return tuple(interpreter(ctx.saved_tensors, cotangents, options)[4:])

    # Along random directions: the interpreter takes a minute for all numbers, which test_reference.py does.
    assert torch.autograd.gradcheck(Route.apply, as_torch(draw(n_out=2, **shape), requires_grad=True), fast_mode=True)


def hostile(kind, tensors):
    """Return float32 arguments that are hard on single precision."""
    a_inp, mu_inp, *parameters = (x.float() for x in tensors)
    if kind == "30":
        mu_inp = mu_inp * 30.0
    elif kind == "offset":
        mu_inp = mu_inp + 100.0
    return [a_inp, mu_inp, *parameters]


def check_float32(run, shape, options, settings, kind):
    """Compare root mean square errors over some draws: at most twice those of the literal loop in float32.

    One draw in several has most of an error, so it takes some to compare them.
    """
    squares = {name: [0.0, 0.0] for name in names(options)}
    seeds = range(8)
    for seed in seeds:
        single = hostile(kind, as_torch(draw(seed=seed, **shape)))
        cotangents, expected = by_reference([x.double() for x in single], None, options)
        cotangents = [x.float() for x in cotangents]
        results = run(single, cotangents, options, settings), by_reference(single, cotangents, options)[1]
        for k, result in enumerate(results):
            assert all(x.dtype == torch.float32 for x in result)
            for name, error in errors(result, expected, options).items():
                squares[name][k] += error**2 / len(seeds)
    for name, (fused, literal) in squares.items():
        # Room for an error of the literal loop that is small by chance, as in test_strategies.py
        assert math.sqrt(fused) < 2 * math.sqrt(literal) + 1e-7, f"{name}: {fused**0.5}, literal {literal**0.5}"


# Few inputs, as the interpreter adds up a block one after another, while a GPU adds up parts of it.
FLOAT32_CASES = {
    "wide": case(TEXT, 17, 3, "gaussian", batch=()),
    "narrow": case(SQUARES, 5, 3, "gaussian", n_inp=20, batch=()),
}
KINDS = ("plain", "30", "offset")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FLOAT32_CASES)
def test_float32_errs_as_little_as_the_literal_loop(interpreter, name, kind):
    shape, options, _, settings = FLOAT32_CASES[name]
    check_float32(interpreter, shape, options, settings, kind)


@pytest.mark.parametrize("name", ["programs of blocks", "programs of blocks, squares", "own poses"])
def test_no_bit_changes_from_run_to_run(interpreter, name):
    shape, options, _, settings = CASES[name]
    tensors = as_torch(draw(**shape), torch.float32)
    cotangents, _ = by_reference(tensors, None, options)
    first, second = (interpreter(tensors, cotangents, options, settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    for arguments in CASES.values():
        check(on_gpu, *arguments)
    for shape, options, _, settings in FLOAT32_CASES.values():
        for kind in KINDS:
            check_float32(on_gpu, shape, options, settings, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def count(interpreter, shape, options, **settings):
    """Return the kernels launched and the names of torch operations, for each direction."""
    tensors = as_torch(draw(**shape), torch.float32)
    cotangents, _ = by_reference(tensors, None, options)
    return interpreter.counted(tensors, cotangents, options, settings)[1:]


@pytest.mark.parametrize("return_R", [False, True])
@pytest.mark.parametrize("p_model", ["gaussian", "skm"])
@pytest.mark.parametrize("sizes", [TEXT, SQUARES], ids=["wide", "narrow"])
def test_launches_with_shared_weights(interpreter, sizes, p_model, return_R):
    n_iters = 3
    shape, options, _, _ = case(sizes, 5, n_iters, p_model, return_R=return_R, batch=())
    (launched, operations), (launched_backward, operations_backward) = count(interpreter, shape, options)
    prefix = "narrow_" if sizes is SQUARES else ""
    assert launched == ["prepare_kernel", *[f"{prefix}statistics_kernel"] * n_iters]
    assert operations == ["new_zeros"]
    assert launched_backward == ["start_backward_kernel", *[f"{prefix}gradients_kernel"] * n_iters, "parameters_kernel"]
    assert operations_backward == []
    # What users were promised
    assert len(launched) + len(operations) <= 10
    assert len(launched_backward) + len(operations_backward) <= 16


@pytest.mark.parametrize("n_iters", [1, 4])
def test_launches_grow_by_one_an_iteration(interpreter, n_iters):
    shape, options, _, _ = case(TEXT, 5, n_iters, "gaussian")
    forward, backward = count(interpreter, shape, options)
    assert [len(launched) for launched, _ in (forward, backward)] == [n_iters + 1, n_iters + 2]


@pytest.mark.parametrize("p_model", ["gaussian", "skm"])
@pytest.mark.parametrize("n_iters", [1, 3])
def test_launches_with_weights_of_each_inputs_own(interpreter, n_iters, p_model):
    shape, options, _, _ = case(OWN, 5, n_iters, p_model)
    forward, backward = count(interpreter, shape, options)
    assert forward == (["own_forward_kernel"], [])
    assert backward == (["own_backward_kernel", "sum_kernel"], [])


def test_launches_of_a_head(interpreter):
    """Route tokens to parts and parts to classes, as `TokenDepthHead` does."""
    n = 0
    for sizes, n_out in ((TEXT, 7), (OWN, 5)):
        shape, options, _, _ = case(sizes, n_out, 3, "gaussian", return_R=False)
        n += sum(len(names) for direction in count(interpreter, shape, options) for names in direction)
    assert n < 40


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of it
# ---------------------------------------------------------------------------------------------------------------------

COMPILE = """
import inspect, json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from capsule_heads.ops import cuda, cuda_kernels

CAPABILITIES = (80, 90)
# The assembler that Triton itself takes: it comes with two, of which the older does not read all that Triton writes.
by_capability = len(inspect.signature(get_ptxas).parameters)  # not before it came with two
try:
    ptxas = {capability: get_ptxas(*[capability] * by_capability).path for capability in CAPABILITIES}
except RuntimeError:
    print(json.dumps(None))
    sys.exit()
ptx_file = Path(sys.argv[1]) / "kernel.ptx"
kernels = []  # those of a middle iteration
for shape in json.loads(sys.argv[2]):
    sizes = cuda.Sizes.of(*shape, False)
    about, prefix = cuda._Shared(sizes, 3, "gaussian", 1e-5, False), "narrow_" if sizes.is_narrow else ""
    for name, flags in (
        ("prepare_kernel", ()),
        (prefix + "statistics_kernel", (False, False, False)),
        ("start_backward_kernel", (True, True, True)),
        (prefix + "gradients_kernel", (False, True, False)),
        ("parameters_kernel", ()),
    ):
        doubles = {"state_ptr", "sums_ptr"} | ({"partial_ptr"} if name == "prepare_kernel" else set())
        kernels.append((name, shape, cuda._OPTIONS[name](about, *flags), doubles))
for shape in json.loads(sys.argv[3]):
    about = cuda._Own(*shape, (True,) * 4, 3, "gaussian", 1e-5)
    for name, flags in (
        ("own_forward_kernel", (False,)),
        ("own_backward_kernel", (True, True, True, False)),
        ("sum_kernel", ()),
    ):
        kernels.append((name, shape, cuda._OPTIONS[name](about, *flags), set()))
compiled = []
for capability in CAPABILITIES:
    for name, shape, constants, doubles in kernels:
        if capability == 80 and name == "narrow_gradients_kernel":  # half a minute for each GPU
            continue
        kernel, constants = getattr(cuda_kernels, name), dict(constants)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
        signature, attributes = {}, {}
        for position, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument.endswith("_ptr"):
                kind = "i32" if argument == "counter_ptr" else "fp64" if argument in doubles else "fp32"
                signature[argument] = "*" + kind
                attributes[(position,)] = [["tt.divisibility", 16]]  # as at a launch
            else:
                signature[argument] = "i32"
        source = ASTSource(kernel, signature, constants, attributes)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = result.asm["ptx"]
        ptx_file.write_text(ptx)
        architecture = re.search(r"\\.target (\\w+)", ptx)[1]
        options = ["-v", f"--gpu-name={architecture}", "-o", ptx_file.with_suffix(".cubin")]
        command = [ptxas[capability], *options, ptx_file]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        compiled.append({
            "kernel": name,
            "what": f"{shape} {architecture}",
            "capability": capability,
            "shared": result.metadata.shared,
            "registers": int(re.search(r"Used (\\d+) registers", log)[1]),
            "spilled": int(re.search(r"(\\d+) bytes spill stores", log)[1]),
        })
print(json.dumps(compiled))
"""


def run_without_interpreter(program, *arguments, **environment):
    """A new process: this one may have been started with the interpreter, or have changed Triton's settings."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


FIRST_LAUNCHES = """
import sys
import torch
from capsule_heads.ops import cuda, cuda_kernels

class Kernel:
    arg_names, cache_key = ("x", "n", "SIZE"), "source"

    def __getitem__(self, grid):
        return lambda *arguments, **options: self

cuda_kernels.prepare_kernel = Kernel()
torch.cuda.get_device_capability = lambda: (9, 0)
for size in map(int, sys.argv[1:]):
    for dtype in (torch.float32, torch.float64):
        cuda.Launcher("prepare_kernel", SIZE=size)(1, torch.zeros(1, dtype=dtype), 3)
"""


def test_compiling_is_said_once_for_kernels_that_are_not_kept(tmp_path):
    def said(*sizes, cache="cache"):
        done = run_without_interpreter(FIRST_LAUNCHES, *map(str, sizes), TRITON_CACHE_DIR=str(tmp_path / cache))
        assert done.returncode == 0, done.stderr
        return done.stderr.count("Compiling the kernels of routing for sizes like these, once on this machine")

    assert [said(1, 2), said(1), said(2, 1), said(1, 3), said(3)] == [1, 0, 0, 1, 0]
    assert said(1, cache="other") == 1
    (tmp_path / "file").touch()
    assert said(1, cache="file/in") == 1  # and there is no place to keep it


def test_nothing_is_said_where_kernels_are_interpreted(tmp_path):
    program = (
        "import os\nos.environ['TRITON_INTERPRET'] = '1'\nimport torch\nfrom capsule_heads.ops import cuda, route\n"
        "x = torch.randn\nroute(x(2, 5), x(2, 5, 2, 3), x(1, 4, 3, 3), x(1, 4, 2, 3), x(1, 4), x(1, 4), n_out=4, "
        "strategy='cuda')"
    )
    done = run_without_interpreter(program, TRITON_CACHE_DIR=str(tmp_path))
    assert (done.returncode, "Compiling" in done.stderr) == (0, False), done.stderr


# The most bytes of each thread, by kernel; others spill 64 at most.
SPILLED = {
    "statistics_kernel": 640,
    "gradients_kernel": 1280,
    "narrow_statistics_kernel": 320,
    "narrow_gradients_kernel": 320,
}


@pytest.mark.slow
def test_kernels_compile_and_fit_into_a_multiprocessor(tmp_path):
    shared, own = [(1, 64, 2, 64), (4, 4, 4, 64), (1, 64, 2, 5)], [(64, 1, 2, 5, 2)]
    arguments = (str(tmp_path), json.dumps(shared), json.dumps(own))
    done = run_without_interpreter(COMPILE, *arguments, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    if compiled is None:
        pytest.skip("this Triton comes without ptxas, the assembler for NVIDIA GPUs")
    assert len(compiled) == 2 * (5 * len(shared) + 3 * len(own)) - 1
    for kernel in compiled:
        if kernel["capability"] == 80:
            assert kernel["shared"] <= 99 * 1024, kernel  # of a consumer GPU
        assert kernel["spilled"] <= SPILLED.get(kernel["kernel"], 64), kernel


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def unserved(n_inp, d_cov, d_inp, d_out, n_out, own=False, device="cpu"):
    mu_inp, parameters = arguments_of(n_inp, d_cov, d_inp, d_out, n_out, own, device)
    return cuda.unserved_sizes(Call(mu_inp, parameters, n_out))


def arguments_of(n_inp, d_cov, d_inp, d_out, n_out, own, device):
    mu_inp = torch.empty(2, n_inp, d_cov, d_inp, device=device)
    shapes = [(d_inp, d_out), (d_cov, d_out), (), ()]
    return mu_inp, tuple(torch.empty(n_inp if own else 1, n_out, *shape, device=device) for shape in shapes)


@pytest.mark.parametrize(
    "sizes",
    [
        (9, 1, 64, 2, 64),
        (9, 4, 4, 4, 64),
        (9, 1, 1, 1, 1),
        (9, 16, 64, 4, 256),
        (9, 1, 1024, 2, 512),
        (64, 1, 2, 2, 5, True),
        (1024, 1, 2, 2, 8, True),
        (5000, 1, 2, 2, 8),
    ],
    ids=str,
)
def test_shapes_that_are_served(sizes):
    assert unserved(*sizes) is None


@pytest.mark.parametrize(
    "sizes, clause",
    [
        ((9, 17, 4, 2, 5), "d_cov is 17, and the kernels hold up to 16 rows of a capsule"),
        (
            (9, 1, 64, 3, 257),
            "n_out=257 outputs of d_out=3 columns are 2048 numbers, each rounded up to a power of two, and the kernels "
            "hold up to 1024",
        ),
        (
            (1025, 1, 2, 2, 8, True),
            "the votes of inputs with weights of their own are 32768 numbers, each size rounded up to a power of two, "
            "and the kernels hold up to 16384",
        ),
        ((0, 1, 64, 2, 5), "they are empty"),
    ],
    ids=str,
)
def test_shapes_that_are_not_served(sizes, clause):
    assert unserved(*sizes) == f"does not serve these inputs: {clause}"


@pytest.mark.parametrize("which", range(4), ids=NAMES[2:])
def test_one_parameter_of_each_inputs_own_counts(which):
    mu_inp, shared = arguments_of(1025, 1, 2, 2, 8, False, "cpu")
    own = arguments_of(1025, 1, 2, 2, 8, True, "cpu")[1]
    parameters = tuple(o if k == which else s for k, (o, s) in enumerate(zip(own, shared, strict=True)))
    clause = "the votes of inputs with weights of their own are 32768"
    assert clause in cuda.unserved_sizes(Call(mu_inp, parameters, 8))


ON_CPU = """
import torch
from capsule_heads.ops import route
route(torch.zeros(3), torch.ones(3, 1, 2), *(torch.ones(1, 1, *s) for s in ((2, 2), (1, 2), (), ())),
      n_out=4, n_iters=2, strategy="cuda")
"""

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch
from capsule_heads.ops import route
route(torch.zeros(3), torch.ones(3, 1, 2), *(torch.ones(1, 1, *s) for s in ((2, 2), (1, 2), (), ())),
      n_out=4, n_iters=2, strategy="cuda")
"""


@pytest.mark.parametrize(
    "program, message",
    [
        (
            ON_CPU,
            'ValueError: strategy "cuda" runs on CUDA, and the inputs are on cpu (its kernels run there, slowly, with '
            "TRITON_INTERPRET=1 set before Triton is imported)",
        ),
        (
            WITHOUT_TRITON,
            'ImportError: strategy "cuda" is made of kernels that Triton compiles, and Triton is not installed: on '
            'Linux, `pip install triton`, or use strategy="auto"',
        ),
    ],
    ids=["on the CPU", "without Triton"],
)
def test_errors(program, message):
    done = run_without_interpreter(program)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_shape_that_is_too_large_is_an_error(interpreter):
    arrays = draw(n_inp=2, n_out=1025, d_cov=1, d_inp=2, d_out=1, own_inp=False)
    options = {"n_out": 1025, "n_iters": 2}
    with pytest.raises(AssertionError, match=r'ValueError: strategy "cuda" does not serve these inputs: n_out=1025'):
        interpreter(as_torch(arrays), None, options)
