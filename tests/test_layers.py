import copy
import io
import itertools
import math
import pickle
import shutil

import pytest
import torch

from capsule_heads.layers import Routing
from capsule_heads.ops import route

FIXED_OR_VARIABLE = list(itertools.product([None, 6], [None, 4]))


def build(seed=0, dtype=torch.float32, **kwargs):
    """A layer in which no parameter is zero, so that each of them matters."""
    torch.manual_seed(seed)
    routing = Routing(**({"d_cov": 2, "d_inp": 3, "d_out": 5} | kwargs)).to(dtype)
    with torch.no_grad():
        for parameter in routing.parameters():
            parameter.add_(torch.randn_like(parameter))
    return routing


def draw(n_inp=6, d_cov=2, d_inp=3, batch=(), dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(*batch, n_inp, dtype=dtype), torch.randn(*batch, n_inp, d_cov, d_inp, dtype=dtype)


def assert_equal(outputs, others):
    assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single_beta", [False, True])
@pytest.mark.parametrize("n_inp, n_out", FIXED_OR_VARIABLE)
def test_names_and_shapes_of_parameters(n_inp, n_out, single_beta):
    i, j = n_inp or 1, n_out or 1
    expected = {"W": (i, j, 3, 5), "B": (i, j, 2, 5), "beta_use": (i, j)}
    if n_out is None:
        expected["B_brk"] = (1, 2, 5)
    if not single_beta:
        expected["beta_ign"] = (i, j)
    routing = Routing(d_cov=2, d_inp=3, d_out=5, n_inp=n_inp, n_out=n_out, single_beta=single_beta)
    assert {name: tuple(tensor.shape) for name, tensor in routing.state_dict().items()} == expected
    assert dict(routing.named_parameters()).keys() == expected.keys()


def test_initial_values():
    torch.manual_seed(0)
    routing = Routing(d_cov=2, d_inp=20, d_out=50, n_inp=100)
    fresh = {name: parameter.clone() for name, parameter in routing.named_parameters()}
    with torch.no_grad():
        for parameter in routing.parameters():
            parameter.fill_(7.0)
    routing.reset_parameters()
    for parameters in (fresh, dict(routing.named_parameters())):
        units = parameters.pop("W").flatten() * 20  # standard normal
        n = len(units)
        assert abs(units.mean()) < 5 / math.sqrt(n)
        assert abs(units.std() - 1) < 5 / math.sqrt(2 * n)
        assert abs((units.abs() < 1).float().mean() - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n)
        assert parameters.keys() == {"B", "B_brk", "beta_use", "beta_ign"}
        assert not any(parameter.any() for parameter in parameters.values())


@pytest.mark.parametrize("n_inp, n_out", FIXED_OR_VARIABLE)
def test_single_beta_is_beta_use_in_the_place_of_beta_ign(n_inp, n_out):
    double = build(n_inp=n_inp, n_out=n_out, dtype=torch.float64)
    with torch.no_grad():
        double.beta_ign.copy_(double.beta_use)
    single = Routing(d_cov=2, d_inp=3, d_out=5, n_inp=n_inp, n_out=n_out, single_beta=True).double()
    assert single.beta_ign is None
    single.load_state_dict({name: tensor for name, tensor in double.state_dict().items() if name != "beta_ign"})

    results = [routing(*draw(dtype=torch.float64)) for routing in (single, double)]
    assert_equal(*results)
    cotangents = [torch.randn_like(x) for x in results[0]]
    for outputs in results:
        torch.autograd.backward(outputs, cotangents)
    expected = {name: parameter.grad for name, parameter in double.named_parameters()}
    expected["beta_use"] = expected["beta_use"] + expected.pop("beta_ign")
    assert expected["beta_use"].any()
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The usages of the paper's README
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_to_objects():
    routing = Routing(d_cov=4, d_inp=4, d_out=4, n_inp=100, n_out=10)
    a_out, mu_out, sig2_out = routing(torch.randn(100), torch.randn(100, 4, 4))
    assert a_out.shape == (10,)
    assert mu_out.shape == sig2_out.shape == (10, 4, 4)


@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_tokens_to_classes(batch, n):
    routing = Routing(d_cov=1, d_inp=1024, d_out=8, n_out=2)
    a_inp, mu_inp = draw(n, 1, 1024, batch)
    a_out, mu_out, sig2_out = routing(a_inp, mu_inp)
    assert a_out.shape == (*batch, 2)
    assert mu_out.shape == sig2_out.shape == (*batch, 2, 1, 8)
    for index in itertools.product(*map(range, batch)):  # a batch is its samples
        for whole, one in zip((a_out, mu_out, sig2_out), routing(a_inp[index], mu_inp[index])):
            torch.testing.assert_close(whole[index], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 10, 17])
def test_attributes_to_targets(k):
    routing = Routing(d_cov=1, d_inp=256, d_out=64, n_inp=10)
    a_out, mu_out, sig2_out = routing(torch.randn(10), torch.randn(10, 1, 256), n_out=k)
    assert a_out.shape == (k,)
    assert mu_out.shape == sig2_out.shape == (k, 1, 64)


@pytest.mark.parametrize("n_inp", [None, 6])
def test_n_out_defaults_to_n_inp(n_inp):
    routing = build(n_inp=n_inp)
    assert routing(*draw())[0].shape == (6,)
    assert_equal(routing(*draw()), routing(*draw(), n_out=6))


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"n_iters": 2, "p_model": "skm", "eps": 0.1, "strategy": "reference"}], ids=str
)
@pytest.mark.parametrize("n_inp, n_out", FIXED_OR_VARIABLE)
def test_calls_route_with_its_parameters_and_options(n_inp, n_out, options):
    routing = build(n_inp=n_inp, n_out=n_out, dtype=torch.float64, **options)
    B = routing.B
    if n_out is None:
        B = torch.stack([B[:, 0] + routing.B_brk * t for t in (-1, -1 / 3, 1 / 3, 1)], dim=1)
    parameters = (routing.W, B, routing.beta_use, routing.beta_ign)
    actual = routing(*draw(dtype=torch.float64), n_out=None if n_out else 4, return_R=True)
    expected = route(*draw(dtype=torch.float64), *parameters, n_out=4, return_R=True, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)  # the layer's positions, 1/3, are float32


def test_return_R():
    routing = build(n_out=4)
    without, with_R = routing(*draw(batch=(2,))), routing(*draw(batch=(2,)), return_R=True)
    assert len(without) == 3 and len(with_R) == 4
    assert_equal(without, with_R[:3])
    assert with_R[3].shape == (2, 6, 4)
    torch.testing.assert_close(with_R[3].sum(-1), torch.ones(2, 6))


@pytest.mark.parametrize("n_inp", [None, 6])
def test_outputs_are_told_apart_only_by_B_brk(n_inp):
    routing = build(n_inp=n_inp)
    mu_out = routing(*draw(), n_out=3)[1]
    assert not torch.allclose(mu_out[0], mu_out[1]) and not torch.allclose(mu_out[1], mu_out[2])
    torch.nn.init.zeros_(routing.B_brk)
    for x in routing(*draw(), n_out=3):
        torch.testing.assert_close(x[1:], x[:1].expand_as(x[1:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layers_compute_in_float32(dtype):
    half = build().to(dtype)
    full = copy.deepcopy(half).float()
    a_inp, mu_inp = (x.to(dtype) for x in draw())
    outputs = half(a_inp, mu_inp, n_out=3)
    assert all(x.dtype == torch.float32 for x in outputs)
    assert_equal(outputs, full(a_inp.float(), mu_inp.float(), n_out=3))


@pytest.mark.parametrize("single_beta", [False, True])
@pytest.mark.parametrize("n_inp, n_out", FIXED_OR_VARIABLE)
def test_copies_and_pickles_give_the_same_result(n_inp, n_out, single_beta):
    routing = build(n_inp=n_inp, n_out=n_out, single_beta=single_beta, n_iters=2, p_model="skm", eps=0.1)
    expected = routing(*draw())
    buffer = io.BytesIO()
    torch.save(routing.state_dict(), buffer)
    loaded = build(1, n_inp=n_inp, n_out=n_out, single_beta=single_beta, n_iters=2, p_model="skm", eps=0.1)
    assert not torch.equal(loaded(*draw())[1], expected[1])
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for other in (copy.deepcopy(routing), pickle.loads(pickle.dumps(routing)), loaded):
        assert repr(other) == repr(routing)
        assert_equal(other(*draw()), expected)


def compiled(routing, backend):
    torch.compiler.reset()
    return torch.compile(routing, fullgraph=True, backend=backend)


@pytest.mark.parametrize("n_inp, n_out", [(None, 4), (6, None)])
def test_compiles_to_one_graph_with_the_same_values_and_gradients(n_inp, n_out):
    routing = build(n_inp=n_inp, n_out=n_out, dtype=torch.float64)
    n_out_call = None if n_out else 3
    outputs = routing(*draw(dtype=torch.float64), n_out=n_out_call, return_R=True)
    others = compiled(routing, "aot_eager")(*draw(dtype=torch.float64), n_out=n_out_call, return_R=True)
    cotangents = [torch.randn_like(x) for x in outputs]
    gradients = [torch.autograd.grad(xs, list(routing.parameters()), cotangents) for xs in (outputs, others)]
    for a, b in zip((*others, *gradients[1]), (*outputs, *gradients[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile generates C++ for the CPU and needs g++")
def test_compiles_to_machine_code():
    routing = build(n_out=4, n_iters=2)
    with torch.no_grad():
        outputs = compiled(routing, "inductor")(*draw())
        for a, b in zip(outputs, routing(*draw()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_repr_shows_the_arguments():
    assert repr(Routing(2, 3, 5)) == (
        "Routing(d_cov=2, d_inp=3, d_out=5, n_inp=None, n_out=None, n_iters=3, single_beta=False, p_model='gaussian', "
        "eps=1e-05, strategy='auto')"
    )
    shown = repr(Routing(1, 2, 3, 4, 5, 6, True, "skm", 0.1, "reference"))
    assert shown == (
        "Routing(d_cov=1, d_inp=2, d_out=3, n_inp=4, n_out=5, n_iters=6, single_beta=True, p_model='skm', eps=0.1, "
        "strategy='reference')"
    )
    assert repr(eval(shown)) == shown


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"], ids=str)
@pytest.mark.parametrize("name", ["d_cov", "d_inp", "d_out", "n_inp", "n_out"])
def test_sizes_are_positive_whole_numbers(name, size):
    kind = "a positive whole number" + (r" or None \(variable\)" if name.startswith("n_") else r"\.")
    with pytest.raises(ValueError, match=rf"^{name} is {size!r}; expected {kind}"):
        Routing(**({"d_cov": 2, "d_inp": 3, "d_out": 5} | {name: size}))


@pytest.mark.parametrize("name", ["d_cov", "d_inp", "d_out"])
def test_sizes_of_capsules_are_not_optional(name):
    with pytest.raises(ValueError, match=rf"^{name} is None; expected a positive whole number\."):
        Routing(**({"d_cov": 2, "d_inp": 3, "d_out": 5} | {name: None}))


@pytest.mark.parametrize(
    "option, message",
    [
        ({"n_iters": 0}, "n_iters is 0; expected"),
        ({"p_model": "gmm"}, "p_model is 'gmm'; expected"),
        ({"eps": 0}, "eps is 0; expected"),
        ({"strategy": "fast"}, "strategy is 'fast'; expected"),
        ({"single_beta": "no"}, "single_beta is 'no'; expected True or False"),
    ],
    ids=str,
)
def test_options_are_checked_at_construction(option, message):
    with pytest.raises(ValueError, match=message):
        Routing(2, 3, 5, **option)


@pytest.mark.parametrize("shape", [(6, 3, 3), (6, 2, 4), (2, 3), (6, 3, 2)], ids=str)
def test_shape_of_capsules(shape):
    message = rf"mu_inp has shape \({', '.join(map(str, shape))}\); this layer expects .*d_cov=2, d_inp=3\]"
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(6), torch.zeros(shape))


@pytest.mark.parametrize("n_inp", [1, 5, 7])
def test_number_of_inputs_where_it_is_fixed(n_inp):
    with pytest.raises(
        ValueError, match=rf"mu_inp has {n_inp} capsules; this layer was built for n_inp=6\. Leave n_inp"
    ):
        build(n_inp=6)(*draw(n_inp))


@pytest.mark.parametrize("n_out", [3, 4, 0])
def test_n_out_where_it_is_fixed(n_out):
    with pytest.raises(ValueError, match=rf"n_out={n_out} was passed to a layer built for n_out=4\. Leave it out"):
        build(n_out=4)(*draw(), n_out=n_out)


@pytest.mark.parametrize("n_out", [0, -2, 2.5, True, "2"])
def test_n_out_is_at_least_one(n_out):
    with pytest.raises(ValueError, match=rf"n_out is {n_out!r}; expected a whole number, at least 1"):
        build()(*draw(), n_out=n_out)


def test_what_is_no_tensor_or_not_real():
    scores, capsules = draw()
    with pytest.raises(TypeError, match="a_inp is list and mu_inp Tensor; expected tensors"):
        build()(scores.tolist(), capsules)
    with pytest.raises(TypeError, match=r"of the tensors of a routing is torch\.complex64; expected real numbers"):
        build()(scores, capsules * 1j)


def test_scores_that_do_not_fit_the_capsules():
    with pytest.raises(ValueError, match=r"a_inp has shape \(5,\) and mu_inp \(6, 2, 3\)"):
        build()(torch.zeros(5), torch.zeros(6, 2, 3))
