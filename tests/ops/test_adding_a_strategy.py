"""The worked example of a strategy: an object that is defined here alone, and an entry in the table."""

import pytest
import torch
from oracle import as_torch, draw

from capsule_heads.layers import Routing
from capsule_heads.ops import STRATEGIES, route
from capsule_heads.ops.reference import Reference
from capsule_heads.ops.votes import Votes

SHARED = {"own_inp": False}


class Exact(Reference):
    """The literal loop in float64, for few inputs."""

    name = "exact"

    def unserved(self, call):
        if call.mu_inp.shape[-3] > 100:
            return f"is for up to 100 inputs, and there are {call.mu_inp.shape[-3]}"
        return super().unserved(call)

    def route(self, *tensors, **options):
        outputs = super().route(*(x.double() for x in tensors), **options)
        return tuple(None if x is None else x.to(tensors[0].dtype) for x in outputs)


class DoubleVotes(Votes):
    """A strategy that streams: the passes of "votes", always in float64."""

    name = "double-votes"

    def needs_double(self, n_votes, p_model, is_split):
        return True


@pytest.fixture(params=[Exact(), DoubleVotes()], ids=lambda strategy: strategy.name)
def added(request):
    """The name of a strategy that is in the table for the length of a test."""
    STRATEGIES[request.param.name] = request.param
    yield request.param.name
    del STRATEGIES[request.param.name]


def test_it_is_routed_with_by_name(added):
    tensors = [x.requires_grad_() for x in as_torch(draw(batch=(2,), **SHARED))]
    results = []
    for strategy in (added, "reference"):
        outputs = route(*tensors, n_out=5, return_R=True, strategy=strategy)
        loss = sum((k + 1.0) * x.square().sum() for k, x in enumerate(outputs))
        results.append((*outputs, *torch.autograd.grad(loss, tensors)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_layer_takes_it(added):
    torch.manual_seed(0)
    layer = Routing(1, 4, 2, n_out=3, strategy=added)
    assert layer(torch.zeros(2, 7), torch.randn(2, 7, 1, 4))[0].shape == (2, 3)


@pytest.mark.parametrize("added", [Exact()], indirect=True)
def test_what_it_does_not_serve_it_refuses(added):
    with pytest.raises(ValueError, match=r'strategy "exact" is for up to 100 inputs, and there are 101\. Use strat'):
        route(*as_torch(draw(n_inp=101, **SHARED)), n_out=5, strategy=added)


def test_it_is_gone_afterwards():
    with pytest.raises(ValueError, match=r"strategy is 'exact'; expected one of auto, reference, moments, votes, kept"):
        route(*as_torch(draw(**SHARED)), n_out=5, strategy="exact")
