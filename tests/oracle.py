"""An oracle of routing that shares nothing with the package: float64 numpy, loops over i and j; and inputs for it."""

import itertools
import math

import numpy as np
import torch

NAMES = ("a_inp", "mu_inp", "W", "B", "beta_use", "beta_ign")
OUTPUTS = ("a_out", "mu_out", "sig2_out", "R")
P_MODELS = ("gaussian", "skm")
INF = math.inf


def shared(parameter, i, j):
    """The entry of a parameter for input i and output j; a dimension of size 1 is shared."""
    return parameter[i if parameter.shape[0] > 1 else 0, j if parameter.shape[1] > 1 else 0]


def softmax(logits):
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def exact(x):
    return x


def oracle_one(a_inp, mu_inp, W, B, beta_use, beta_ign, n_out, n_iters, p_model, eps, rounded):
    """One sample, section 1 of the specification line by line. `rounded` sees every elementary result."""
    inputs, outputs = range(len(a_inp)), range(n_out)
    f = [0.0 if a == -INF else rounded(1.0 / (1.0 + math.exp(-a))) for a in a_inp]
    V = [[rounded(mu_inp[i]) @ rounded(shared(W, i, j)) + rounded(shared(B, i, j)) for j in outputs] for i in inputs]
    a_out = mu = sig2 = None
    R = np.full((len(f), n_out), 1.0 / n_out)
    for iteration in range(n_iters):
        for i in inputs if iteration > 0 else ():
            log_p = []
            for j in outputs:
                distances = rounded((V[i][j] - mu[j]) ** 2)
                if p_model == "gaussian":
                    log_p.append(-np.sum(distances / (2 * sig2[j])) - np.sum(rounded(np.log(np.sqrt(sig2[j])))))
                else:
                    log_p.append(-np.sum(distances))
            if p_model == "skm":
                log_p = [math.log(p) if p > 0 else -INF for p in softmax(log_p)]
            R[i] = softmax([rounded(-np.logaddexp(0.0, -a_out[j])) + rounded(log_p[j]) for j in outputs])
        a_out, mu, sig2 = np.zeros(n_out), [None] * n_out, [None] * n_out
        for j in outputs:
            use = [rounded(f[i] * R[i, j]) for i in inputs]
            for i in inputs:
                a_out[j] += rounded(shared(beta_use, i, j) * use[i])
                a_out[j] -= rounded(shared(beta_ign, i, j) * (f[i] - use[i]))
            n_j = rounded(sum(use) + eps)
            mu[j] = rounded(sum(rounded(use[i] * V[i][j]) for i in inputs) / n_j)
            sig2[j] = rounded(sum(use[i] * rounded((V[i][j] - mu[j]) ** 2) for i in inputs) / n_j + eps)
    return a_out, np.stack(mu), np.stack(sig2), R


def oracle(tensors, n_out, n_iters=3, p_model="gaussian", eps=1e-5, rounded=exact):
    """Every sample of a batch on its own. Numpy in, numpy out: a_out, mu_out, sig2_out, R."""
    a_inp, mu_inp, *parameters = tensors
    batch = a_inp.shape[:-1]
    results = [
        oracle_one(a_inp[index], mu_inp[index], *parameters, n_out, n_iters, p_model, eps, rounded)
        for index in itertools.product(*(range(size) for size in batch))
    ]
    return [np.stack(parts).reshape(*batch, *parts[0].shape) for parts in zip(*results)]


def draw(seed=0, batch=(), n_inp=7, n_out=5, d_cov=3, d_inp=5, d_out=2, own_inp=True, own_out=True, scale=1.0):
    """Random arguments of `route`, float64, all of them away from zero so that none drops out."""
    rng = np.random.default_rng(seed)
    i, j = n_inp if own_inp else 1, n_out if own_out else 1
    # biases as wide as the votes: outputs that share W then differ as well
    shapes = {"W": (i, j, d_inp, d_out), "B": (i, n_out, d_cov, d_out), "beta_use": (i, j), "beta_ign": (i, j)}
    tensors = {
        "a_inp": rng.normal(size=(*batch, n_inp)),
        "mu_inp": scale * rng.normal(size=(*batch, n_inp, d_cov, d_inp)),
    }
    tensors |= {name: rng.normal(size=shape) for name, shape in shapes.items()}
    tensors["W"] /= math.sqrt(d_inp)
    return list(tensors.values())


def as_torch(arrays, dtype=torch.float64, requires_grad=False):
    return [torch.tensor(array, dtype=dtype).requires_grad_(requires_grad) for array in arrays]


def relative(actual, expected):
    actual, expected = (
        np.asarray(x.detach() if torch.is_tensor(x) else x, dtype=np.float64) for x in (actual, expected)
    )
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), np.finfo(float).tiny)


def random_cotangents(outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
