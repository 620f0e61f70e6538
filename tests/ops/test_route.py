"""What `route` does before any strategy: dtypes and errors."""

import math

import pytest
import torch
from oracle import NAMES, as_torch, draw, random_cotangents

from capsule_heads.ops import check_routing_options, route

# ---------------------------------------------------------------------------------------------------------------------
# Dtypes
# ---------------------------------------------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("strategy", ["auto", "reference", "moments", "votes"])
def test_autocast_changes_no_bit(strategy, half):
    tensors = as_torch(draw(batch=(2,), own_inp=False), torch.float32, requires_grad=True)
    options = {"n_out": 5, "return_R": True, "strategy": strategy}
    plain = route(*tensors, **options)
    with torch.autocast("cpu", dtype=half):
        assert (tensors[1] @ tensors[1].mT).dtype == half  # autocast is on here
        cast = route(*tensors, **options)
    cotangents = random_cotangents(plain)
    gradients = [torch.autograd.grad(outputs, tensors, cotangents) for outputs in (cast, plain)]
    for a, b in zip((*cast, *gradients[0]), (*plain, *gradients[1]), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_half_precision_arguments_are_computed_in_float32(half):
    halves = as_torch(draw(batch=(2,)), half)
    outputs = route(*halves, n_out=5, return_R=True)
    expected = route(*(x.float() for x in halves), n_out=5, return_R=True)
    for a, b in zip(outputs, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", range(6), ids=NAMES)
def test_one_wider_argument_widens_the_computation(which):
    tensors = as_torch(draw(), torch.bfloat16)
    tensors[which] = tensors[which].double()
    outputs = route(*tensors, n_out=5, return_R=True)
    expected = route(*(x.double() for x in tensors), n_out=5, return_R=True)
    for a, b in zip(outputs, expected, strict=True):
        assert a.dtype == torch.float64
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

OPTION_ERRORS = [
    ({"n_iters": 0}, r"n_iters is 0; expected a whole number of iterations, 1 or more"),
    ({"n_iters": 2.0}, r"n_iters is 2\.0; expected a whole number"),
    ({"n_iters": True}, r"n_iters is True; expected a whole number"),
    ({"p_model": "gauss"}, r'p_model is \'gauss\'; expected "gaussian" or "skm"'),
    ({"eps": 0.0}, r"eps is 0\.0; expected a positive number"),
    ({"eps": -1e-5}, r"eps is -1e-05; expected a positive number"),
    ({"eps": math.nan}, r"eps is nan; expected a positive number"),
    ({"eps": math.inf}, r"eps is inf; expected a positive number"),
    ({"eps": "1e-5"}, r"eps is '1e-5'; expected a positive number"),
    ({"strategy": ["auto"]}, r"strategy is \['auto'\]; expected one of auto, reference"),
    ({"strategy": "fast"}, r"strategy is 'fast'; expected one of auto, reference"),
]


@pytest.mark.parametrize("option, message", OPTION_ERRORS, ids=str)
def test_option_errors(option, message):
    good = {"n_iters": 3, "p_model": "gaussian", "eps": 1e-5, "strategy": "auto"}
    check_routing_options(**good)
    with pytest.raises(ValueError, match=message):
        check_routing_options(**(good | option))
    with pytest.raises(ValueError, match=message):
        route(*as_torch(draw()), n_out=5, **option)


@pytest.mark.parametrize("n_out", [0, -1])
def test_n_out_error(n_out):
    with pytest.raises(ValueError, match=rf"n_out is {n_out}; expected at least 1"):
        route(*as_torch(draw(own_out=False)), n_out=n_out)


@pytest.mark.parametrize(
    "which, shape, message",
    [
        (0, (6,), r"a_inp has shape \(6,\) and mu_inp \(7, 3, 5\); expected scores \[\.\.\., n_inp\]"),
        (0, (2, 7), r"a_inp has shape \(2, 7\) and mu_inp \(7, 3, 5\)"),
        (1, (3, 5), r"a_inp has shape \(7,\) and mu_inp \(3, 5\)"),
        (1, (7, 4, 5), r"B has shape \(7, 5, 3, 2\), which does not fit .*; expected \[7 or 1, 5 or 1, 4, 2\]"),
        (2, (6, 5, 5, 2), r"W has shape \(6, 5, 5, 2\).* \(7, 3, 5\) and n_out=5; expected \[7 or 1, 5 or 1, 5, 2\]"),
        (2, (7, 4, 5, 2), r"W has shape \(7, 4, 5, 2\).*; expected \[7 or 1, 5 or 1, 5, 2\]"),
        (2, (7, 5, 4, 2), r"W has shape \(7, 5, 4, 2\).*; expected \[7 or 1, 5 or 1, 5, 2\]"),
        (2, (5, 5, 2), r"W has shape \(5, 5, 2\).*; expected \[7 or 1, 5 or 1, 5, 2\]"),
        (3, (7, 5, 3, 1), r"B has shape \(7, 5, 3, 1\).*; expected \[7 or 1, 5 or 1, 3, 2\]"),
        (3, (7, 5, 1, 2), r"B has shape \(7, 5, 1, 2\).*; expected \[7 or 1, 5 or 1, 3, 2\]"),
        (4, (7, 4), r"beta_use has shape \(7, 4\).*; expected \[7 or 1, 5 or 1\]"),
        (4, (5,), r"beta_use has shape \(5,\).*; expected \[7 or 1, 5 or 1\]"),
        (5, (2, 5), r"beta_ign has shape \(2, 5\).*; expected \[7 or 1, 5 or 1\]"),
        (5, (7, 5, 1), r"beta_ign has shape \(7, 5, 1\).*; expected \[7 or 1, 5 or 1\]"),
    ],
)
def test_shape_errors(which, shape, message):
    tensors = as_torch(draw())
    tensors[which] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        route(*tensors, n_out=5)


def test_a_lone_capsule_without_a_dimension_of_inputs_is_an_error():
    _, _, *parameters = as_torch(draw(own_inp=False))
    with pytest.raises(ValueError, match=r"a_inp has shape \(\) and mu_inp \(3, 5\); expected scores"):
        route(torch.zeros(()), torch.zeros(3, 5), *parameters, n_out=5)
