"""One input split over three processes is routed as in one."""

import functools
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import INF, NAMES, OUTPUTS, P_MODELS, as_torch, draw, random_cotangents, relative
from processes import fork_processes, run_program
from torch import nn

from capsule_heads.layers import Routing
from capsule_heads.ops import route

pytestmark = pytest.mark.slow

STRATEGIES = ("moments", "votes", "cpu", "auto")
SHARES = {"uneven": (2, 9, 4), "none in one": (7, 0, 8), "all in one": (0, 15, 0)}
CASES = [*itertools.product(STRATEGIES, P_MODELS, SHARES)]
BATCH, N_INP, N_OUT = (2,), 15, 5


def arguments():
    """Of which a third of the inputs are masked, all those of a process among them."""
    arrays = draw(batch=BATCH, n_inp=N_INP, n_out=N_OUT, own_inp=False)
    arrays[0][:, ::3], arrays[0][:, :2] = -INF, -INF
    return as_torch(arrays)


def cotangents(outputs, rank):
    """Of what every process has: its own. `R` has the same, as it is cut."""
    (of_R,) = random_cotangents([torch.empty(*BATCH, N_INP, N_OUT, dtype=torch.float64)], seed=3)
    return [*random_cotangents(outputs[:3], seed=rank), of_R]


class Network(nn.Module):
    """Parameters before the routing of what is split, in it, and behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.affine = nn.Linear(6, 4)
        self.to_parts = Routing(1, 4, 2, n_out=3, strategy="votes")
        self.to_classes = Routing(1, 2, 2, n_inp=3, n_out=2)
        self.double()

    def forward(self, x, group=None):
        a_out, mu_out, _ = self.to_parts(x[..., 0], self.affine(x).unsqueeze(-2), group=group)
        return self.to_classes(a_out, mu_out)[0]


def network_input():
    return torch.randn(2, N_INP, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def share_of(rank, shares):
    start = sum(shares[:rank])
    return slice(start, start + shares[rank])


def route_a_share(folder, rank):
    """What each of the processes does."""
    dist.init_process_group("gloo")
    results = {}
    for strategy, p_model, shares in CASES:
        part = share_of(rank, SHARES[shares])
        a_inp, mu_inp, *parameters = arguments()
        tensors = [a_inp[:, part].clone(), mu_inp[:, part].clone(), *parameters]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        options = {"p_model": p_model, "return_R": True, "strategy": strategy, "group": dist.group.WORLD}
        outputs = route(*tensors, n_out=N_OUT, **options)
        *others, of_R = cotangents(outputs, rank)
        gradients = torch.autograd.grad(outputs, tensors, [*others, of_R[:, part]])
        results[strategy, p_model, shares] = [x.detach() for x in (*outputs, *gradients)]
    network = nn.parallel.DistributedDataParallel(Network())
    x = network_input()[:, share_of(rank, SHARES["uneven"])]
    network(x, group=dist.group.WORLD).square().sum().backward()
    results["network"] = [parameter.grad for parameter in network.parameters()]
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_program(__file__, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_split_input_is_routed_as_a_whole_one(results, case):
    _, p_model, shares = case
    tensors = [tensor.requires_grad_() for tensor in arguments()]
    outputs = route(*tensors, n_out=N_OUT, p_model=p_model, return_R=True, strategy="reference")
    of_ranks = [cotangents(outputs, rank) for rank in range(3)]
    of_all = [sum(parts) for parts in zip(*(c[:3] for c in of_ranks))]
    expected = [*outputs, *torch.autograd.grad(outputs, tensors, [*of_all, of_ranks[0][3]])]

    found = [dict(zip((*OUTPUTS, *(f"d_{name}" for name in NAMES)), run[case], strict=True)) for run in results]
    for name in OUTPUTS[:3]:  # the same bits in every process
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:])
    actual = [found[0][name] for name in OUTPUTS[:3]]
    for name in ("R", "d_a_inp", "d_mu_inp"):  # of each one's own inputs
        assert [run[name].shape[1] for run in found] == [*SHARES[shares]]
        actual.append(torch.cat([run[name] for run in found], dim=1))
    actual += [sum(run[f"d_{name}"] for run in found) for name in NAMES[2:]]
    for name, a, e in zip((*OUTPUTS, *NAMES), actual, expected, strict=True):
        assert relative(a, e) <= 1e-9, f"{name}: {relative(a, e):.1e}"


def test_mistakes():
    tensors = arguments()
    with pytest.raises(TypeError, match=r"group is 'WORLD'; expected a process group, such as torch\.distributed"):
        route(*tensors, n_out=N_OUT, group="WORLD")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with pytest.raises(
            ValueError, match=r'"reference" does not route inputs split over processes.* strategy="auto"'
        ):
            route(*tensors, n_out=N_OUT, group=group, strategy="reference")
        with pytest.raises(ValueError, match=r"weights that all inputs share.*`Routing` without n_inp"):
            Routing(3, 5, 2, n_inp=N_INP, n_out=N_OUT).double()(*tensors[:2], group=group)
        with pytest.raises(ValueError, match=r"n_out is None; expected the number of outputs, as no process of a"):
            Routing(3, 5, 2).double()(*tensors[:2], group=group)
    finally:
        dist.destroy_process_group()


def test_under_ddp_every_parameter_has_the_gradient_of_one_process(results):
    network = Network()
    network(network_input()).square().sum().backward()
    for run in results:
        for actual, parameter in zip(run["network"], network.parameters(), strict=True):
            assert relative(actual, parameter.grad) <= 1e-9


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert fork_processes(3, functools.partial(route_a_share, sys.argv[1])) == [0, 0, 0]
