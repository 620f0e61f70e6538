"""Strategy "cpu" by itself: sizes around those of its vectors and tiles, threads, and numba that is not installed."""

import importlib.util
import types
from concurrent.futures import ThreadPoolExecutor

import numba
import pytest
import torch
from oracle import as_torch, draw, random_cotangents

from capsule_heads.ops import cpu, cpu_kernels, route
from capsule_heads.ops.routing import STRATEGIES, _check_served
from capsule_heads.ops.strategy import Call
from capsule_heads.ops.terms import EStep, Inputs

SHARED = {"own_inp": False}


def values_and_gradients(tensors, name="cpu", **options):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = route(*tensors, strategy=name, **options)
    return (*outputs, *torch.autograd.grad(outputs, tensors, random_cotangents(outputs)))


@pytest.mark.parametrize("n_inp, n_out", [(15, 1), (16, 3), (17, 17), (130, 65)])
@pytest.mark.parametrize("d_cov", [1, 4])
@pytest.mark.parametrize("d_inp, d_out", [(1, 1), (4, 4), (5, 2), (9, 8), (64, 2), (64, 3)])
@pytest.mark.parametrize("kept", [True, False])
def test_odd_sizes(monkeypatch, n_inp, n_out, d_cov, d_inp, d_out, kept):
    monkeypatch.setattr(cpu, "_MAX_TILE", 48)
    if not kept:
        monkeypatch.setattr(cpu, "MAX_KEPT", 0)
    sizes = {"n_inp": n_inp, "n_out": n_out, "d_cov": d_cov, "d_inp": d_inp, "d_out": d_out}
    tensors = as_torch(draw(batch=(2,), **sizes, **SHARED))
    actual, expected = (values_and_gradients(tensors, s, n_out=n_out, return_R=True) for s in ("cpu", "reference"))
    for a, e in zip(actual, expected, strict=True):  # of a single output, some gradients are zero
        assert (a - e).norm() <= 1e-9 * e.norm().clamp_min(1e-3)


def large(seed=0, batch=(3,), d_inp=4, dtype=torch.float32):
    return as_torch(draw(seed, batch=batch, n_inp=1500, n_out=20, d_cov=2, d_inp=d_inp, d_out=2, **SHARED), dtype)


@pytest.mark.parametrize("d_inp", [4, 16])
def test_no_bit_depends_on_the_number_of_threads(d_inp):
    tensors, n_threads = large(d_inp=d_inp), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outputs = STRATEGIES["cpu"].statistics(*pass_of(tensors), None)
            results.append(outputs[:3])
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def pass_of(tensors):
    """The inputs and an E-step of a pass."""
    a_inp, mu_inp, W = tensors[:3]
    f_inp = torch.sigmoid(a_inp)
    total = f_inp.sum(-1, keepdim=True, dtype=torch.float64)
    inputs = Inputs(mu_inp, f_inp, total, mu_inp[:, :1] * 0, W[0].permute(2, 0, 1).contiguous(), 1e-5)
    generator = torch.Generator().manual_seed(0)
    n, c, (h, j, _) = len(mu_inp), mu_inp.shape[2], inputs.W.shape
    mean, log_prior = (torch.randn(n, *s, j, dtype=torch.float64, generator=generator) for s in ((c, h), ()))
    return inputs, EStep(log_prior, mean, torch.ones_like(mean))


def test_calls_from_several_threads():
    calls = [large(seed) for seed in range(6)]
    alone = [values_and_gradients(tensors, n_out=20) for tensors in calls]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda tensors: values_and_gradients(tensors, n_out=20), calls * 3))
    for actual, expected in zip(together, alone * 3, strict=True):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("d_inp", [4, 16])
def test_arguments_are_not_written_to(d_inp):
    tensors = large(d_inp=d_inp)
    before = [tensor.clone() for tensor in tensors]
    values_and_gradients(tensors, n_out=20, return_R=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_exp():
    logits = -torch.cat([torch.linspace(0, 77, 10_001), torch.linspace(79, 1e4, 1000), torch.tensor([float("inf")])])

    @numba.njit
    def exp(values):
        for i in range(len(values)):
            values[i] = cpu_kernels._exp(values[i])

    for dtype, error in ((torch.float32, 2e-7), (torch.float64, 1e-15)):
        values = logits.to(dtype, copy=True)
        exp(values.numpy())
        expected = logits.double().exp()
        assert ((values[:10_001] / expected[:10_001] - 1).abs() <= error).all()
        assert (values[10_001:] <= 1e-33).all()


def test_kernels_without_a_place_to_keep_them(monkeypatch):
    njit = numba.njit

    def without_cache(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", without_cache)
    assert cpu_kernels._jit()(lambda x: x + 1)(1) == 2


def test_without_numba_it_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tensors = large()
    with pytest.raises(ImportError, match=r'numba is not installed: `pip install "capsule-heads\[cpu\]"`'):
        route(*tensors, n_out=20, strategy="cpu")
    auto, votes = (route(*tensors, n_out=20, strategy=name) for name in ("auto", "votes"))
    assert all(torch.equal(a, b) for a, b in zip(auto, votes, strict=True))


def test_it_is_for_the_cpu():
    mu_inp = types.SimpleNamespace(device=torch.device("cuda"), shape=(7, 1, 2))
    with pytest.raises(ValueError, match=r'strategy "cpu" runs on the CPU, and the inputs are on cuda\. Use strat'):
        _check_served(STRATEGIES["cpu"], Call(mu_inp, (torch.ones(1, 3, 2, 2),), n_out=3))
