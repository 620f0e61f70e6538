"""Strategy "triton", without a GPU: its kernels in Triton's interpreter, and compiled for GPUs that are not there.

The interpreter replaces the functions of `triton.language` when Triton is imported, and this process may have imported
it already: so the kernels run in a process of their own, which is sent tensors and answers with tensors.
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

from capsule_heads.ops import triton as kernels

SERVER = """
import os, pickle, sys, traceback
import torch
import capsule_heads.ops.triton as kernels
from capsule_heads.ops import route

requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what else is printed must not get into the answers
defaults = {name: getattr(kernels, name) for name in ("_TILE", "_N_PROGRAMS")}
while True:
    try:
        tensors, cotangents, options, settings = pickle.load(requests)
    except EOFError:
        break
    for name, value in (defaults | settings).items():
        setattr(kernels, name, value)
    try:
        tensors = [x.requires_grad_() for x in tensors]
        outputs = route(*tensors, strategy="triton", **options)
        gradients = [] if cotangents is None else torch.autograd.grad(outputs, tensors, cotangents)
        answer = [x.detach() for x in (*outputs, *gradients)]
    except Exception:
        answer = traceback.format_exc()
    pickle.dump(answer, answers)
    answers.flush()
"""


class Interpreter:
    """Routes in the process of the interpreter, and differentiates there if it is given cotangents."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, tensors, cotangents, options, settings=None):
        pickle.dump(([x.detach() for x in tensors], cotangents, options, settings or {}), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        assert not isinstance(answer, str), answer
        return answer


@pytest.fixture(scope="module")
def interpreter():
    interpreter = Interpreter()
    yield interpreter
    interpreter.process.communicate(timeout=60)  # it ends where its requests end


def on_gpu(tensors, cotangents, options, settings=None):
    """What `Interpreter` does, by the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings or {}).items():
            patch.setattr(kernels, name, value)
        tensors = [x.detach().cuda().requires_grad_() for x in tensors]
        outputs = route(*tensors, strategy="triton", **options)
        gradients = torch.autograd.grad(outputs, tensors, [x.cuda() for x in cotangents])
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def by_reference(tensors, cotangents, options):
    tensors = [x.detach().requires_grad_() for x in tensors]
    outputs = route(*tensors, strategy="reference", **options)
    if cotangents is None:
        cotangents = random_cotangents(outputs)
    return cotangents, [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, tensors, cotangents))]


def names(options):
    return [*(OUTPUTS if options["return_R"] else OUTPUTS[:3]), *(f"d_{name}" for name in NAMES)]


def errors(actual, expected, options):
    """Relative to the norm, or absolute where nothing is expected: by name."""
    assert [x.shape for x in actual] == [x.shape for x in expected]
    pairs = zip(names(options), actual, expected, strict=True)
    return {name: ((a.double() - b.double()).norm() / (b.double().norm() or 1.0)).item() for name, a, b in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# Outputs and gradients
# ---------------------------------------------------------------------------------------------------------------------

TEXT = {"d_cov": 1, "d_inp": 64, "d_out": 2}
POSES = {"d_cov": 3, "d_inp": 5, "d_out": 3}
SMALL_BLOCKS = {"_TILE": 256}  # 16 inputs by 16 outputs, the smallest


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


def transpose(a_inp, mu_inp, *parameters):
    """The same values, in another order in memory."""
    return a_inp.T.contiguous().T, mu_inp.transpose(-1, -3).contiguous().transpose(-1, -3), *parameters


CASES = {
    "one iteration": case(TEXT, 5, 1, "gaussian", return_R=False),
    "text, two iterations": case(TEXT, 17, 2, "gaussian", return_R=False),
    "text, three iterations": case(TEXT, 5, 3, "gaussian"),
    "text, skm": case(TEXT, 17, 3, "skm"),
    "poses": case(POSES, 5, 3, "gaussian", return_R=False),
    "poses, skm": case(POSES, 17, 2, "skm", batch=()),
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
    "programs of blocks": case(TEXT, 17, 3, "gaussian", settings=SMALL_BLOCKS | {"_N_PROGRAMS": 4}),
    "programs of blocks, poses": case(POSES, 5, 2, "skm", settings=SMALL_BLOCKS | {"_N_PROGRAMS": 4}),
    "one program": case(TEXT, 5, 2, "gaussian", settings=SMALL_BLOCKS | {"_N_PROGRAMS": 1}),
    "programs, some masked": case(TEXT, 5, 2, "gaussian", edit=mask_some, settings=SMALL_BLOCKS | {"_N_PROGRAMS": 4}),
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


def test_gradcheck(interpreter):
    options = {"n_out": 2, "n_iters": 2, "p_model": "gaussian", "return_R": True}

    class Route(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return tuple(interpreter(tensors, None, options))

        @staticmethod
        def backward(ctx, *cotangents):
            return tuple(interpreter(ctx.saved_tensors, cotangents, options)[4:])

    arrays = draw(n_inp=3, n_out=2, d_cov=1, d_inp=2, d_out=1, own_inp=False)
    assert torch.autograd.gradcheck(Route.apply, as_torch(arrays, requires_grad=True))


def check_float32(run, shape, options, settings):
    """Root mean square errors over some draws, against float64: at most twice those of the literal loop in float32."""
    squares = {name: [0.0, 0.0] for name in names(options)}
    seeds = range(3)
    for seed in seeds:
        wide = as_torch(draw(seed=seed, **shape))
        narrow = [x.float() for x in wide]
        cotangents, expected = by_reference([x.double() for x in narrow], None, options)
        cotangents = [x.float() for x in cotangents]
        results = run(narrow, cotangents, options, settings), by_reference(narrow, cotangents, options)[1]
        for k, result in enumerate(results):
            assert all(x.dtype == torch.float32 for x in result)
            for name, error in errors(result, expected, options).items():
                squares[name][k] += error**2 / len(seeds)
    for name, (fused, literal) in squares.items():
        # Nothing is held to less than the rounding of its result.
        assert math.sqrt(fused) < 2 * max(math.sqrt(literal), torch.finfo(torch.float32).eps / 2), name


# Few inputs, as the interpreter adds up a block one after another, while a GPU adds up parts of it.
FLOAT32_CASES = {
    "text": case(TEXT, 17, 3, "gaussian"),
    "poses": case(POSES, 5, 3, "skm"),
    "programs of blocks": case(TEXT, 5, 2, "gaussian", n_inp=64, settings=SMALL_BLOCKS | {"_N_PROGRAMS": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT32_CASES)
def test_float32_errs_as_little_as_the_literal_loop(interpreter, name):
    shape, options, _, settings = FLOAT32_CASES[name]
    check_float32(interpreter, shape, options, settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    for arguments in CASES.values():
        check(on_gpu, *arguments)
    for shape, options, _, settings in FLOAT32_CASES.values():
        check_float32(on_gpu, shape, options, settings)


# ---------------------------------------------------------------------------------------------------------------------
# What the compiler makes of it
# ---------------------------------------------------------------------------------------------------------------------

COMPILE = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import capsule_heads.ops.triton as kernels

ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
if not ptxas.exists():
    print(json.dumps(None))
    sys.exit()
ptx_file = Path(sys.argv[1]) / "kernel.ptx"
compiled = []
for capability in (80, 90):
    for shape in json.loads(sys.argv[2]):
        for kernel, flag in ((kernels._statistics_kernel, "HAS_R"), (kernels._gradients_kernel, "HAS_D_R")):
            constants = kernels.kernel_options(*shape) | {flag: False}
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            signature, attributes = {}, {}
            for position, name in enumerate(kernel.arg_names):
                is_pointer = name.endswith("_ptr")
                signature[name] = "constexpr" if name in constants else "*fp32" if is_pointer else "i32"
                if is_pointer or (name == "n_out" and shape[-1] % 16 == 0):  # as at a launch
                    attributes[(position,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel, signature, constants, attributes)
            result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            ptx = result.asm["ptx"]
            ptx_file.write_text(ptx)
            architecture = re.search(r"\\.target (\\w+)", ptx)[1]
            command = [ptxas, "-v", f"--gpu-name={architecture}", ptx_file, "-o", ptx_file.with_suffix(".cubin")]
            log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            compiled.append({
                "what": f"{kernel.__name__} {shape} {architecture}",
                "shared": result.metadata.shared,
                "registers": int(re.search(r"Used (\\d+) registers", log)[1]),
                "spilled": int(re.search(r"(\\d+) bytes spill stores", log)[1]),
                "tensor_cores": "mma" in ptx,
                "atomics": re.search(r"\\b(atom|red)\\.", ptx) is not None,
            })
print(json.dumps(compiled))
"""


def run_without_interpreter(program, *arguments, **environment):
    """A new process: this one may have been started with the interpreter, or have changed Triton's settings."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_kernels_compile_and_fit_into_a_multiprocessor(tmp_path):
    shapes = [(1, 64, 2, 64), (4, 4, 4, 64), (1, 64, 2, 5)]
    done = run_without_interpreter(COMPILE, str(tmp_path), json.dumps(shapes), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    if compiled is None:
        pytest.skip("this Triton comes without ptxas, the assembler for NVIDIA GPUs")
    assert len(compiled) == 2 * 2 * len(shapes)
    for kernel in compiled:
        assert kernel["shared"] <= 32 * 1024, kernel
        assert kernel["spilled"] <= 128, kernel  # bytes of each thread, in which a plane takes 64
        assert not kernel["tensor_cores"], kernel  # they would round float32 to TF32
        assert not kernel["atomics"], kernel


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def test_shapes_that_are_served():
    for shape in ((1, 64, 2, 64), (4, 4, 4, 64), (1, 64, 2, 5), (1, 1, 1, 1), (1, 1024, 2, 256)):
        assert kernels.check_shapes(*shape) is None


def test_shapes_that_are_too_large():
    assert kernels.check_shapes(1, 64, 2, 3000) == (
        "n_out is 3000; the kernels hold all outputs of a block in registers, up to 256"
    )
    assert kernels.check_shapes(8, 512, 8, 256) == (
        "d_cov * d_inp * d_out * n_out is 8388608; each program of the backward pass adds up a gradient of that size, "
        "up to 4194304"
    )


ON_CPU = """
import torch
from capsule_heads.ops import route
route(torch.zeros(3), torch.ones(3, 1, 2), *(torch.ones(1, 1, *s) for s in ((2, 2), (1, 2), (), ())),
      n_out=4, n_iters=2, strategy="triton")
"""

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails
import capsule_heads.ops.triton
"""


@pytest.mark.parametrize(
    "program, message",
    [
        (
            ON_CPU,
            'ValueError: strategy "triton" runs on CUDA, and the inputs are on cpu. Move them there, use '
            'strategy="auto", or set TRITON_INTERPRET=1',
        ),
        (WITHOUT_TRITON, 'ImportError: Triton is not installed, and strategy "triton" is made of its kernels; on'),
    ],
    ids=["on the CPU", "without Triton"],
)
def test_errors(program, message):
    done = run_without_interpreter(program)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_shape_that_is_too_large_is_an_error(interpreter):
    arrays = draw(n_inp=2, n_out=257, d_cov=1, d_inp=2, d_out=1, own_inp=False)
    options = {"n_out": 257, "n_iters": 2}
    with pytest.raises(AssertionError, match=r'ValueError: strategy "triton" does not serve .*: n_out is 257'):
        interpreter(as_torch(arrays), None, options)
