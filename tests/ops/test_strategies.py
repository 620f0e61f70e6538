"""The fast strategies against the reference: the same function, gradients and memory; and which `auto` takes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import INF, NAMES, OUTPUTS, P_MODELS, as_torch, draw, random_cotangents, relative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from capsule_heads.layers import Routing
from capsule_heads.ops import STRATEGIES, autograd, blocks, cpu, kept, moments, route, streaming, uniform, votes
from capsule_heads.ops.routing import SMALL, _choose
from capsule_heads.ops.strategy import Call

STREAMING = ("moments", "votes", "cpu")
FAST = (*STREAMING, "kept")
SHARED = {"own_inp": False}


def values_and_gradients(tensors, strategy, **options):
    """Outputs, and the gradients of a random combination of those that have any."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = route(*tensors, strategy=strategy, **options)
    differentiable = [x for x in outputs if x.requires_grad]
    return (*outputs, *torch.autograd.grad(differentiable, tensors, random_cotangents(differentiable)))


def assert_agree(arrays, strategy, tolerance=1e-9, **options):
    tensors = as_torch(arrays)
    actual, expected = (values_and_gradients(tensors, s, **options) for s in (strategy, "reference"))
    n_outputs = len(expected) - len(NAMES)
    for name, a, e in zip((*OUTPUTS[:n_outputs], *NAMES), actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert relative(a, e) <= tolerance, f"{name}: {relative(a, e):.1e}"


def neighbours(tensors, n=4):
    """Yield the tensors, and others whose numbers are off by their last bit: in one rounding, chance has a part."""
    generator = torch.Generator().manual_seed(0)
    yield tensors
    for _ in range(n - 1):
        ends = [torch.where(torch.rand(x.shape, generator=generator) < 0.5, -INF, INF) for x in tensors]
        yield [torch.where(x.isinf(), x, torch.nextafter(x, end)) for x, end in zip(tensors, ends, strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four inputs, tiles of five."""
    for module in (uniform, moments, votes):
        monkeypatch.setattr(module, "block_size", lambda tensor, floats_per_input: 4)
    monkeypatch.setattr(cpu, "_MAX_TILE", 5)
    monkeypatch.setattr(cpu, "MAX_KEPT", 0)


# ---------------------------------------------------------------------------------------------------------------------
# The same function
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("return_R", [True, False])
@pytest.mark.parametrize("n_iters", [1, 2, 3, 5])
@pytest.mark.parametrize("p_model", P_MODELS)
@pytest.mark.parametrize("strategy", FAST)
def test_agrees_with_the_reference(strategy, p_model, n_iters, return_R):
    arrays = draw(batch=(2,), n_inp=11, **SHARED)
    assert_agree(arrays, strategy, n_out=5, n_iters=n_iters, p_model=p_model, return_R=return_R)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_inp": 1},
        {"n_out": 1},
        {"n_inp": 1, "n_out": 1, "d_cov": 1, "d_inp": 1, "d_out": 1},
        {"n_inp": 33, "n_out": 3, "d_cov": 1, "d_inp": 17, "d_out": 2},
        {"n_inp": 17, "n_out": 11, "d_cov": 4, "d_inp": 4, "d_out": 4},
        {"batch": (0,)},
        {"batch": (3,), "own_out": False},
        {"batch": (2, 1, 3), "n_inp": 9, "n_out": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", FAST)
@pytest.mark.usefixtures("small_blocks")
def test_agrees_in_blocks_and_at_odd_sizes(strategy, sizes):
    for p_model in P_MODELS:
        assert_agree(draw(**sizes, **SHARED), strategy, n_out=sizes.get("n_out", 5), p_model=p_model, return_R=True)


@pytest.mark.parametrize("strategy", FAST)
def test_every_parameter_may_be_shared_by_the_outputs_and_one_beta_used_twice(strategy):
    arrays = draw(**SHARED)
    arrays[2], arrays[4] = arrays[2][:, :1], arrays[4][:, :1]
    arrays[5] = arrays[4]
    assert_agree(arrays, strategy, n_out=5, return_R=True)


@pytest.mark.parametrize("p_model", P_MODELS)
@pytest.mark.parametrize("strategy", FAST)
@pytest.mark.usefixtures("small_blocks")
def test_infinite_scores_and_another_eps(strategy, p_model):
    arrays = draw(batch=(3,), n_inp=13, **SHARED)
    arrays[0][:, ::3], arrays[0][:, 1::3] = -INF, INF
    assert_agree(arrays, strategy, n_out=5, p_model=p_model, eps=0.3, return_R=True)


@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("strategy", FAST)
def test_all_inputs_masked_or_none_at_all(strategy, n_iters):
    tensors = as_torch(draw(**SHARED), torch.float32)
    tensors[0].fill_(-INF)
    none_at_all = [tensors[0][:0], tensors[1][:0], *tensors[2:]]
    for inputs in (tensors, none_at_all):
        a_out, mu_out, sig2_out, *gradients = values_and_gradients(inputs, strategy, n_out=5, n_iters=n_iters)
        assert not a_out.any() and not mu_out.any()
        assert torch.equal(sig2_out, torch.full_like(sig2_out, 1e-5))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("strategy", FAST)
def test_inputs_far_from_every_output(strategy):
    """Their weights all underflow unless the largest logit is taken out."""
    arrays = draw(n_inp=50, **SHARED)
    arrays[0][:5] = -20.0  # too light to draw the means
    arrays[1][:5] *= 1e3
    assert_agree(arrays, strategy, n_out=5, return_R=True)


@pytest.mark.parametrize("strategy", FAST)
def test_memory_layouts_of_arguments_do_not_matter(strategy):
    tensors = as_torch(draw(batch=(2, 3), **SHARED))
    strided = [tensor.mT.contiguous().mT for tensor in tensors]
    strided[1] = strided[1].transpose(0, 1).contiguous().transpose(0, 1)
    expected, actual = (values_and_gradients(x, strategy, n_out=5) for x in (tensors, strided))
    assert all(relative(a, e) <= 1e-12 for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("p_model", P_MODELS)
@pytest.mark.parametrize("strategy", FAST)
@pytest.mark.usefixtures("small_blocks")
def test_gradcheck(strategy, p_model):
    sizes = {"n_inp": 6, "n_out": 3, "d_cov": 2, "d_inp": 2, "d_out": 2}
    tensors = as_torch(draw(batch=(2,), **sizes, **SHARED), requires_grad=True)

    def function(*tensors):
        return route(*tensors, n_out=3, p_model=p_model, return_R=True, strategy=strategy)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("which", range(4), ids=OUTPUTS)
@pytest.mark.parametrize("strategy", FAST)
def test_the_gradient_of_a_single_output(strategy, which):
    gradients = {}
    for name in (strategy, "reference"):
        tensors = as_torch(draw(**SHARED), requires_grad=True)
        output = route(*tensors, n_out=5, return_R=True, strategy=name)[which]
        gradients[name] = torch.autograd.grad(output, tensors, random_cotangents([output]))
    for a, e in zip(gradients[strategy], gradients["reference"], strict=True):
        assert relative(a, e) <= 1e-9


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    strategy=st.sampled_from(FAST),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    n_inp=st.integers(1, 70),
    n_out=st.integers(2, 9),  # a single output ignores nothing: zeros, of which there is no relative error
    d_cov=st.integers(1, 4),
    d_inp=st.integers(1, 9),
    d_out=st.integers(1, 4),
    own_out=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    n_iters=st.integers(1, 4),
    p_model=st.sampled_from(P_MODELS),
    infinities=st.booleans(),
)
def test_any_shape_agrees_with_the_reference(strategy, seed, dtype, n_out, n_iters, p_model, infinities, **sizes):
    arrays = draw(seed, n_out=n_out, **sizes, **SHARED)
    if infinities:
        arrays[0][..., ::3], arrays[0][..., 1::4] = -INF, INF
    options = {"n_out": n_out, "n_iters": n_iters, "p_model": p_model, "return_R": True}
    errors = {strategy: [], "reference": []}
    for singles in neighbours(as_torch(arrays, torch.float32)):
        exact = values_and_gradients([x.double() for x in singles], "reference", **options)
        for name, of_dtype in ((strategy, dtype), ("reference", torch.float32)):
            values = values_and_gradients([x.to(of_dtype) for x in singles], name, **options)
            assert all(x.dtype == of_dtype for x in values)
            errors[name].append([relative(x, e) for x, e in zip(values, exact, strict=True)])
    own, literal = (np.sqrt(np.mean(np.square(errors[name]), 0)) for name in errors)
    # How far rounding moves a result depends on the draw; the literal loop in single precision says how far.
    u = torch.finfo(torch.float32).eps
    growth = literal / u
    assume(max(growth) * u < 1e-2)  # beyond, rounding decides the outputs
    # Squares that cancel cost `moments` digits: it is for this that it computes float32 inputs in float64.
    u = u if dtype == torch.float32 else 1e5 * torch.finfo(torch.float64).eps
    for name, error, factor in zip((*OUTPUTS, *NAMES), own, growth, strict=True):
        assert error <= 2 * u * (factor + max(growth) / 10 + 10), f"{name}: {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def hostile(kind, seed, batch, n_inp, n_out, d_cov, d_inp, d_out):
    """Float32 arguments that are hard on single precision."""
    sizes = {"n_inp": n_inp, "n_out": n_out, "d_cov": d_cov, "d_inp": d_inp, "d_out": d_out}
    tensors = as_torch(draw(seed, batch=batch, **sizes, **SHARED), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    if kind in ("1e-3", "30"):
        tensors[1] *= float(kind)
    elif kind == "offset":
        tensors[1] += 100.0
    elif kind == "near-duplicates":
        tensors[1] = tensors[1][..., :1, :, :] + 1e-4 * tensors[1]
    elif kind == "masked":
        tensors[0][torch.rand(tensors[0].shape, generator=generator) < 0.9] = -INF
    return tensors


@pytest.mark.parametrize("p_model", P_MODELS)
@pytest.mark.parametrize("kind", ["plain", "1e-3", "30", "offset", "near-duplicates", "masked"])
@pytest.mark.parametrize(
    "strategies, sizes",
    [
        (("moments", "cpu"), ((), 37, 5, 3, 4, 4)),
        (("moments", "kept", "cpu"), ((2,), 201, 17, 4, 4, 4)),
        (("moments", "cpu"), ((2,), 499, 33, 4, 4, 4)),
        (("votes", "cpu"), ((), 37, 5, 3, 17, 2)),
        (("votes", "cpu"), ((2,), 201, 17, 1, 64, 2)),
        (("votes", "kept", "cpu"), ((4,), 1111, 64, 1, 64, 2)),
    ],
    ids=str,
)
def test_float32_errors_are_within_twice_those_of_the_literal_loop(strategies, sizes, kind, p_model):
    """Root mean squares over draws: in one draw, chance has a part in which error is the larger."""
    options = {"n_out": sizes[2], "p_model": p_model, "return_R": True}
    errors = {name: [] for name in ("reference", *strategies)}
    for seed in range(4):
        tensors = hostile(kind, seed, *sizes)
        exact = values_and_gradients([x.double() for x in tensors], "reference", **options)
        for name, found in errors.items():
            values = values_and_gradients(tensors, name, **options)
            found.append([relative(a, e) for a, e in zip(values, exact, strict=True)])
    for strategy in strategies:
        for name, own, literal in zip(
            (*OUTPUTS, *NAMES), zip(*errors[strategy]), zip(*errors["reference"]), strict=True
        ):
            limit = 2 * math.hypot(*literal) + 2e-7
            assert math.hypot(*own) <= limit, f"{strategy}, {name}: {own}, literal {literal}"


@pytest.mark.parametrize("strategy", FAST)
def test_no_bit_changes_from_run_to_run(strategy):
    tensors = hostile("plain", 0, (2,), 3000, 64, 1, 8, 2)
    first, second = (values_and_gradients(tensors, strategy, n_out=64, return_R=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Memory, compilation, second derivatives
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", FAST)
def test_training_after_inference_mode(strategy):
    """Buffers are kept from call to call, and tensors made in inference mode are not to be written to outside it."""
    tensors = hostile("plain", 0, (), 8000, 64, 1, 3, 2)  # more than tests before have asked for
    with torch.inference_mode():
        inferred = route(*tensors, n_out=64, strategy=strategy)
    trained = values_and_gradients(tensors, strategy, n_out=64)
    assert all(torch.equal(a, b) for a, b in zip(inferred, trained[:3]))


def test_buffers_are_kept_on_the_cpu_alone():
    """Elsewhere two calls may run at once, on streams of their own."""
    kept, anew = (
        [blocks.workspace("x", (3,), torch.float32, torch.device(device)) for _ in range(2)]
        for device in ("cpu", "meta")
    )
    assert kept[0].data_ptr() == kept[1].data_ptr()
    assert anew[0].untyped_storage()._cdata != anew[1].untyped_storage()._cdata


class LargestResult(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.numel = max([self.numel, *(x.numel() for x in tensors if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("strategy", STREAMING)
def test_nothing_is_larger_than_the_inputs(strategy, monkeypatch):
    for user in (uniform, moments, votes):
        monkeypatch.setattr(user, "block_size", lambda tensor, floats_per_input: 8)
    monkeypatch.setattr(cpu, "MAX_KEPT", 0)
    n_inp, n_out = 5000, 16
    a_inp, mu_inp, W, B, beta_use, beta_ign = as_torch(
        draw(n_inp=n_inp, n_out=n_out, d_cov=1, d_inp=3, d_out=2, **SHARED), torch.float32
    )
    tensors = (a_inp[None], mu_inp[None], W[0].permute(2, 0, 1), B[0].permute(1, 2, 0), beta_use[0], beta_ign[0])
    options = {"p_model": "gaussian", "eps": 1e-5}
    with LargestResult() as largest:
        *outputs, _, centre, moments_of_x, statistics = streaming.forward(
            STRATEGIES[strategy], *tensors, n_iters=3, return_R=False, **options
        )
        streaming.backward(
            STRATEGIES[strategy], (*outputs, None), *tensors, centre, moments_of_x, statistics, **options
        )
    assert mu_inp.numel() <= largest.numel < n_inp * n_out  # one plane of votes would be larger


@pytest.mark.parametrize("return_R", [True, False])
@pytest.mark.parametrize("strategy", FAST)
def test_compiles_without_a_graph_break(strategy, return_R):
    tensors = as_torch(draw(batch=(2,), **SHARED), requires_grad=True)

    def function(*tensors):
        return [3.0 * x for x in route(*tensors, n_out=5, return_R=return_R, strategy=strategy)]

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for f in (function, compiled):
        outputs = f(*tensors)
        results.append((*outputs, *torch.autograd.grad(outputs, tensors, random_cotangents(outputs))))
    for a, e in zip(*results, strict=True):
        assert relative(a, e) <= 1e-12


@pytest.mark.parametrize("strategy", STREAMING)
def test_the_operators_are_what_they_say(strategy):
    _, mu_inp, W, B, beta_use, beta_ign = as_torch(draw(batch=(2,), **SHARED))
    tensors = (mu_inp[..., 0, 0], mu_inp, W[0].permute(2, 0, 1), B[0].permute(1, 2, 0), beta_use[0], beta_ign[0])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(autograd._forward, (strategy, *tensors, 3, "gaussian", 1e-5, True), test_utils=tests)
    a_out, mu_out, _, R, *context = autograd._forward(strategy, *tensors, 3, "gaussian", 1e-5, True)
    arguments = (strategy, a_out, mu_out, None, R, *tensors, *context, "gaussian", 1e-5)
    torch.library.opcheck(autograd._backward, arguments, test_utils=tests)


@pytest.mark.parametrize("strategy", FAST)
def test_second_derivatives_are_refused(strategy):
    tensors = as_torch(draw(**SHARED), requires_grad=True)
    a_out = route(*tensors, n_out=5, strategy=strategy)[0]
    (gradient,) = torch.autograd.grad(a_out.sum(), tensors[1:2], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'first derivatives only; .* route with strategy="reference"'):
        gradient.square().sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Which strategy
# ---------------------------------------------------------------------------------------------------------------------


def choose(n_inp=20_000, n_out=64, d_cov=1, d_inp=64, d_out=2, own=None, device="cpu", dtype=torch.float32):
    mu_inp = torch.empty(n_inp, d_cov, d_inp, device=device)
    shapes = [(d_inp, d_out), (d_cov, d_out), (), ()]
    parameters = [torch.empty(n_inp if i == own else 1, n_out, *shape) for i, shape in enumerate(shapes)]
    return _choose(Call(mu_inp, tuple(parameters), n_out, dtype)).name


@pytest.mark.parametrize(
    "sizes, strategy",
    [
        ({}, "cpu"),
        ({"d_cov": 4, "d_inp": 4, "d_out": 4}, "cpu"),
        ({"dtype": torch.float64}, "cpu"),
        *(({"own": which}, "kept") for which in range(4)),
        ({"n_inp": SMALL["kept"] // 128}, "kept"),
        ({"n_inp": SMALL["kept"] // 128 + 1}, "cpu"),
    ],
    ids=str,
)
def test_auto_takes_the_cpus_kernels(sizes, strategy):
    assert choose(**sizes) == strategy


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setattr(cpu, "is_installed", lambda library: library != "numba")


@pytest.mark.parametrize(
    "sizes, strategy",
    [
        ({}, "votes"),
        ({"d_cov": 4, "d_inp": 4, "d_out": 4}, "moments"),
        ({"d_cov": 4, "d_inp": 4, "d_out": 4, "dtype": torch.float64}, "votes"),
        ({"d_cov": 4, "d_inp": 64, "d_out": 4}, "votes"),
        *(({"own": which}, "reference") for which in range(4)),
        ({"device": "meta"}, "reference"),
        ({"n_inp": SMALL["reference"] // 128}, "reference"),
        ({"n_inp": SMALL["reference"] // 128 + 1}, "votes"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_numba")
def test_auto_takes_the_line_of_the_table(sizes, strategy):
    assert choose(**sizes) == strategy


def test_auto_routes_as_the_strategy_that_it_takes():
    tensors = hostile("plain", 0, (), 8000, 16, 4, 4, 4)
    auto, named, other = (route(*tensors, n_out=16, strategy=s) for s in ("auto", "cpu", "votes"))
    assert all(torch.equal(a, b) for a, b in zip(auto, named))
    assert not torch.equal(auto[1], other[1])


@pytest.mark.parametrize("which", range(2, 6), ids=NAMES[2:])
@pytest.mark.parametrize("strategy", STREAMING)
def test_a_strategy_that_does_not_serve_the_weights_says_so(strategy, which):
    tensors = as_torch(draw(**SHARED))
    tensors[which] = as_torch(draw())[which]
    with pytest.raises(ValueError, match=rf'strategy "{strategy}" needs weights that all inputs share.* each of 7 inp'):
        route(*tensors, n_out=5, strategy=strategy)
    route(*tensors, n_out=5, strategy="auto")


@pytest.mark.parametrize("shared", ["own_inp", "own_out", None])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_kept_votes_are_of_any_weights(p_model, shared):
    arrays = draw(batch=(3,), n_inp=9, **({shared: False} if shared else {}))
    arrays[0][:, ::4] = -INF
    for which in range(2, 6):  # each parameter shared by itself
        one = [x[:1] if at == which else x for at, x in enumerate(arrays)]
        assert_agree(one, "kept", n_out=5, p_model=p_model, return_R=True)
    assert_agree(arrays, "kept", n_out=5, p_model=p_model)


def test_no_bit_of_kept_votes_depends_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(kept, "PER_THREAD", 1)
    tensors = hostile("plain", 0, (7,), 40, 11, 2, 3, 2)
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(values_and_gradients(tensors, "kept", n_out=11, return_R=True)[:4])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(results[0], found, strict=True))


def test_the_operators_of_kept_votes_are_what_they_say():
    V, f_inp = torch.randn(2, 7, 6, 5), torch.rand(2, 7, dtype=torch.float64)
    betas = torch.randn(2, 7, 5, dtype=torch.float64)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kept._forward, (V, f_inp, *betas, 3, True, 1e-5, True), test_utils=tests)
    of_iterations, R = kept._forward(V, f_inp, *betas, 3, True, 1e-5, True)
    arguments = (of_iterations[-1], R[-1], V, f_inp, *betas, of_iterations, R, True, 1e-5)
    torch.library.opcheck(kept._backward, arguments, test_utils=tests)


@pytest.mark.parametrize("strategy", FAST)
def test_a_layer_with_variable_outputs(strategy):
    torch.manual_seed(0)
    layer = Routing(3, 4, 2, strategy=strategy).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    reference = Routing(3, 4, 2, strategy="reference").double()
    reference.load_state_dict(layer.state_dict())
    a_inp, mu_inp = torch.randn(2, 9, dtype=torch.float64), torch.randn(2, 9, 3, 4, dtype=torch.float64)
    gradients = []
    for module in (layer, reference):
        outputs = module(a_inp, mu_inp, n_out=6)
        torch.autograd.backward(outputs, random_cotangents(outputs))
        gradients.append((*outputs, *(parameter.grad for parameter in module.parameters())))
    assert all(relative(a, e) <= 1e-9 for a, e in zip(*gradients, strict=True))
