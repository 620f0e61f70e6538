"""The reference strategy against the oracle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import INF, NAMES, OUTPUTS, P_MODELS, as_torch, draw, oracle, random_cotangents, relative

from capsule_heads.ops import route


def assert_agree(arrays, tolerance=1e-10, **options):
    n_out = options["n_out"]
    actual = route(*as_torch(arrays), **options, return_R=True, strategy="reference")
    expected = oracle(arrays, **options)
    for name, a, e in zip(OUTPUTS, actual, expected, strict=True):
        assert a.dtype == torch.float64
        assert relative(a, e) <= tolerance, f"{name}: {relative(a, e):.1e}"
    assert actual[3].shape[-1] == n_out


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_out", [True, False])
@pytest.mark.parametrize("own_inp", [True, False])
@pytest.mark.parametrize("n_iters", [1, 2, 3, 5])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_agrees_with_the_oracle(p_model, n_iters, own_inp, own_out):
    assert_agree(draw(own_inp=own_inp, own_out=own_out), n_out=5, n_iters=n_iters, p_model=p_model)


@pytest.mark.parametrize("p_model", P_MODELS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"n_inp": 1},
        {"n_out": 1},
        {"n_inp": 1, "n_out": 1, "d_cov": 1, "d_inp": 1, "d_out": 1},
        {"n_inp": 13, "n_out": 3, "d_cov": 1, "d_inp": 17, "d_out": 2},
        {"n_inp": 6, "n_out": 11, "d_cov": 4, "d_inp": 4, "d_out": 4},
        {"batch": (3,)},
        {"batch": (2, 1, 3), "n_inp": 3, "n_out": 2},
    ],
    ids=str,
)
def test_agrees_with_the_oracle_at_odd_sizes(sizes, p_model):
    for own_inp in (True, False):
        assert_agree(draw(**sizes, own_inp=own_inp), n_out=sizes.get("n_out", 5), p_model=p_model)


@pytest.mark.parametrize("p_model", P_MODELS)
def test_each_parameter_may_be_shared_on_its_own(p_model):
    arrays = draw()
    arrays[2] = arrays[2][:1]  # W shared by inputs
    arrays[3] = arrays[3][:, :1]  # B by outputs
    arrays[4] = arrays[4][:1, :1]  # beta_use by both
    assert_agree(arrays, n_out=5, p_model=p_model)


@pytest.mark.parametrize("p_model", P_MODELS)
def test_everything_shared_by_the_outputs_still_gives_n_out_outputs(p_model):
    arrays = draw(own_out=False)
    arrays[3] = arrays[3][:, :1]
    assert_agree(arrays, n_out=5, p_model=p_model)


@pytest.mark.parametrize("p_model", P_MODELS)
def test_one_beta(p_model):
    arrays = draw()
    arrays[5] = arrays[4]
    assert_agree(arrays, n_out=5, p_model=p_model)


@pytest.mark.parametrize("p_model", P_MODELS)
def test_infinite_scores(p_model):
    arrays = draw(batch=(2,))
    arrays[0][:, ::3], arrays[0][:, 1::3] = -INF, INF
    assert_agree(arrays, n_out=5, p_model=p_model)


@pytest.mark.parametrize("p_model", P_MODELS)
def test_scores_whose_sigmoid_underflows(p_model):
    arrays = draw()
    arrays[4], arrays[5] = 1000 * arrays[4], 1000 * np.abs(arrays[5])
    assert oracle(arrays, n_out=5, n_iters=2)[0].min() < -1000  # exp(-1000) is zero in float64
    assert_agree(arrays, n_out=5, p_model=p_model)


def test_another_eps():
    assert_agree(draw(), n_out=5, eps=0.3)
    assert relative(oracle(draw(), n_out=5, eps=0.3)[2], oracle(draw(), n_out=5)[2]) > 0.01


def test_defaults_are_those_of_the_paper():
    tensors = as_torch(draw())
    outputs = route(*tensors, n_out=5)
    explicit = route(*tensors, n_out=5, n_iters=3, p_model="gaussian", eps=1e-5, strategy="auto", return_R=True)
    assert len(outputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(outputs, explicit))


def errors_of(size, seed):
    """Relative errors, normal with standard deviation `size`, for every elementary result of the oracle."""
    rng = np.random.default_rng(seed)
    return lambda x: x * (1 + size * rng.normal(size=np.shape(x)))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    n_inp=st.integers(1, 9),
    n_out=st.integers(1, 5),
    d_cov=st.integers(1, 3),
    d_inp=st.integers(1, 5),
    d_out=st.integers(1, 3),
    own_inp=st.booleans(),
    own_out=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    n_iters=st.integers(1, 4),
    p_model=st.sampled_from(P_MODELS),
    infinities=st.booleans(),
)
def test_any_shape_agrees_with_the_oracle(seed, dtype, n_out, n_iters, p_model, infinities, **sizes):
    arrays = draw(seed, n_out=n_out, **sizes)
    if infinities:
        arrays[0][..., ::3], arrays[0][..., 1::4] = -INF, INF
    tensors = as_torch(arrays, dtype)
    arrays = [tensor.double().numpy() for tensor in tensors]  # what the tensors hold, exactly
    options = {"n_out": n_out, "n_iters": n_iters, "p_model": p_model}
    expected = oracle(arrays, **options)

    # The tolerance. Every elementary result carries a relative error of `u`, sums of some ten terms several. How far
    # that moves the outputs depends on the draw: E-steps sharpen, and symmetric outputs may be an unstable state. So it
    # is measured: the oracle with errors of 8 u in each of its elementary results. The outputs are rounded: 8 u more.
    u = torch.finfo(dtype).eps / 2
    wrong = [oracle(arrays, **options, rounded=errors_of(8 * u, trial)) for trial in range(4)]
    tolerances = [8 * u + max(relative(w, e) for w in ws) for e, *ws in zip(expected, *wrong)]
    assume(max(tolerances) < 1e-2)  # beyond, the draw is chaotic: rounding decides its outputs

    actual = route(*tensors, **options, return_R=True, strategy="reference")
    for name, a, e, tolerance in zip(OUTPUTS, actual, expected, tolerances, strict=True):
        assert a.dtype == dtype
        assert relative(a, e) <= tolerance, f"{name}: {relative(a, e):.1e} > {tolerance:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------

TINY = {"n_inp": 4, "n_out": 3, "d_cov": 2, "d_inp": 2, "d_out": 2}


def finite_differences(loss, arrays, which, step=1e-4):
    """Central differences of fourth order: an error of step^4, where the rounding is 1e-16 / step."""
    gradient = np.zeros_like(arrays[which])
    for index in np.ndindex(gradient.shape):
        for shift, weight in ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12)):
            moved = [array.copy() for array in arrays]
            moved[which][index] += shift * step
            gradient[index] += weight * loss(moved) / step
    return gradient


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_every_gradient_agrees_with_the_oracle(p_model, n_iters, own):
    options = {"n_out": 3, "n_iters": n_iters, "p_model": p_model}
    arrays = draw(**TINY, own_inp=own, own_out=own)
    tensors = as_torch(arrays, requires_grad=True)
    outputs = [x for x in route(*tensors, **options, return_R=True, strategy="reference") if x.requires_grad]
    assert len(outputs) == (3 if n_iters == 1 else 4)  # the first R is a constant
    cotangents = random_cotangents(outputs)

    def loss(moved):
        return sum((c.numpy() * x).sum() for c, x in zip(cotangents, oracle(moved, **options)))

    for which, (name, gradient) in enumerate(
        zip(NAMES, torch.autograd.grad(outputs, tensors, cotangents), strict=True)
    ):
        error = relative(gradient, finite_differences(loss, arrays, which))
        assert error <= 1e-6, f"{name}: {error:.1e}"


def test_the_gradient_of_one_beta_is_that_of_use_and_ignorance_together():
    arrays = draw(**TINY)
    arrays[5] = arrays[4]
    tensors = as_torch(arrays, requires_grad=True)
    cotangents = random_cotangents(route(*tensors, n_out=3, return_R=True))
    apart = torch.autograd.grad(route(*tensors, n_out=3, return_R=True), tensors, cotangents)
    single = route(*tensors[:5], tensors[4], n_out=3, return_R=True)
    together = torch.autograd.grad(single, tensors[:5], cotangents)
    assert relative(together[4], apart[4] + apart[5]) <= 1e-12
    assert all(relative(t, a) <= 1e-12 for t, a in zip(together[:4], apart))


@pytest.mark.parametrize("own_out", [True, False])
@pytest.mark.parametrize("own_inp", [True, False])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_gradcheck(p_model, own_inp, own_out):
    tensors = as_torch(draw(**TINY, batch=(2,), own_inp=own_inp, own_out=own_out), requires_grad=True)

    def function(*tensors):
        return route(*tensors, n_out=3, n_iters=3, p_model=p_model, return_R=True, strategy="reference")

    assert torch.autograd.gradcheck(function, tensors)


# ---------------------------------------------------------------------------------------------------------------------
# Facts that follow from the definition
# ---------------------------------------------------------------------------------------------------------------------


def select_inputs(tensors, index, own_inp):
    a_inp, mu_inp, *parameters = tensors
    return [a_inp[..., index], mu_inp[..., index, :, :], *(p[index] if own_inp else p for p in parameters)]


@pytest.mark.parametrize("own_inp", [True, False])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_a_masked_input_changes_nothing(p_model, own_inp):
    tensors = as_torch(draw(batch=(2,), own_inp=own_inp))
    tensors[0][:, [1, 4]] = -INF
    kept = torch.tensor([0, 2, 3, 5, 6])
    with_mask = route(*tensors, n_out=5, p_model=p_model, return_R=True)
    without = route(*select_inputs(tensors, kept, own_inp), n_out=5, p_model=p_model, return_R=True)
    for a, b in zip((*with_mask[:3], with_mask[3][:, kept]), without, strict=True):
        assert relative(a, b) <= 1e-12


@pytest.mark.parametrize("p_model", P_MODELS)
def test_what_a_masked_input_holds_changes_no_bit_and_gets_no_gradient(p_model):
    tensors = as_torch(draw(), requires_grad=True)
    with torch.no_grad():
        tensors[0][3] = -INF
    other = [tensors[0], tensors[1].detach().clone(), *tensors[2:]]
    other[1][3] = 100.0
    outputs = route(*tensors, n_out=5, p_model=p_model)
    assert all(torch.equal(a, b) for a, b in zip(outputs, route(*other, n_out=5, p_model=p_model)))
    gradients = torch.autograd.grad(outputs, tensors, random_cotangents(outputs))
    assert all(not gradient[3].any() and gradient[2].any() for gradient in gradients)


@pytest.mark.parametrize("own_inp", [True, False])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_permuting_inputs_with_their_own_weights_changes_nothing(p_model, own_inp):
    tensors = as_torch(draw(batch=(2,), own_inp=own_inp))
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    plain = route(*tensors, n_out=5, p_model=p_model, return_R=True)
    permuted = route(*select_inputs(tensors, order, own_inp), n_out=5, p_model=p_model, return_R=True)
    for a, b in zip(permuted, (*plain[:3], plain[3][:, order]), strict=True):
        assert relative(a, b) <= 1e-12


@pytest.mark.parametrize("n_iters", [1, 3])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_all_inputs_masked(p_model, n_iters):
    tensors = as_torch(draw())
    tensors[0].fill_(-INF)
    a_out, mu_out, sig2_out, R = route(*tensors, n_out=5, n_iters=n_iters, p_model=p_model, return_R=True)
    assert torch.equal(a_out, torch.zeros_like(a_out))
    assert torch.equal(mu_out, torch.zeros_like(mu_out))
    assert torch.equal(sig2_out, torch.full_like(sig2_out, 1e-5))
    assert relative(R.sum(-1), torch.ones(7)) <= 1e-12


def test_no_inputs_at_all_are_like_masked_ones():
    tensors = as_torch(draw(own_inp=False))
    a_out, mu_out, sig2_out, R = route(tensors[0][:0], tensors[1][:0], *tensors[2:], n_out=5, return_R=True)
    assert not a_out.any() and not mu_out.any() and torch.equal(sig2_out, torch.full_like(sig2_out, 1e-5))
    assert R.shape == (0, 5)


@pytest.mark.parametrize("p_model", P_MODELS)
def test_the_scores_are_sums_of_credits_and_rows_of_R_sum_to_one(p_model):
    tensors = as_torch(draw(batch=(2,)))
    a_out, _, _, R = route(*tensors, n_out=5, p_model=p_model, return_R=True)
    f_inp, beta_use, beta_ign = tensors[0].sigmoid()[..., None], tensors[4], tensors[5]
    credits = beta_use * f_inp * R - beta_ign * f_inp * (1 - R)  # phi [...ij]
    assert relative(credits.sum(-2), a_out) <= 1e-12
    assert relative(R.sum(-1), np.ones((2, 7))) <= 1e-12
    assert (R >= 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Finite, in float32
# ---------------------------------------------------------------------------------------------------------------------


def score_all_masked(a_inp):
    a_inp[:] = -INF


def score_infinite(a_inp):
    a_inp[..., ::3], a_inp[..., 1::3] = INF, -INF


def score_one_certain(a_inp):
    a_inp[:] = -INF
    a_inp[..., 0] = INF


def score_random(a_inp):
    pass


@pytest.mark.parametrize("own_inp", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("scores", [score_random, score_all_masked, score_infinite, score_one_certain])
@pytest.mark.parametrize("p_model", P_MODELS)
def test_finite_outputs_and_gradients(p_model, scores, equal, scale, own_inp):
    options = {"n_out": 4, "p_model": p_model, "return_R": True, "strategy": "reference"}
    for sizes, own_out in itertools.product(({"n_inp": 12}, {"n_inp": 1}), (True, False)):
        sizes |= {"n_out": 4, "d_cov": 4, "d_inp": 4, "d_out": 4, "own_inp": own_inp, "own_out": own_out}
        arrays = draw(batch=(2,), scale=scale, **sizes)
        scores(arrays[0])
        if equal:
            arrays[1][:] = arrays[1][:, :1]
        if not own_out:
            arrays[3] = arrays[3][:, :1]  # outputs exactly alike, as a layer with variable n_out has them at first
        tensors = as_torch(arrays, torch.float32, requires_grad=True)
        outputs = route(*tensors, **options)
        gradients = torch.autograd.grad(outputs, tensors, random_cotangents(outputs))
        for name, x in zip((*OUTPUTS, *NAMES), (*outputs, *gradients), strict=True):
            assert x.dtype == torch.float32
            assert x.isfinite().all(), f"{name} at {sizes}"
