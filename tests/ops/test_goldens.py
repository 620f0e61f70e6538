"""Values and gradients that the original implementation computed in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from capsule_heads.layers import Routing

SHARED = Path(__file__).parents[3] / "shared"
GOLDENS = ("parts_to_objects", "tokens_to_classes", "attributes_to_targets", "masked_batch", "soft_k_means")


def load(name):
    """Metadata, and tensors by their prefix: in, param, out, cot, grad."""
    path = SHARED / "goldens" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    groups = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
            prefix, tensor = key.split(".", 1)
            groups.setdefault(prefix, {})[tensor] = file.get_tensor(key)
        return file.metadata(), groups


def assert_close(name, actual, expected, tolerance):
    assert actual.shape == expected.shape
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("strategy", ["auto", "reference", "moments", "votes"])
@pytest.mark.parametrize("name", GOLDENS)
def test_values_and_gradients_are_those_of_the_original(name, strategy):
    metadata, groups = load(name)
    kwargs = json.loads(metadata["kwargs"])
    if strategy in ("moments", "votes") and kwargs.get("n_inp") is not None:
        pytest.skip(f"{strategy} does not serve weights that differ by input; what it raises then is tested elsewhere")
    routing = Routing(**kwargs, strategy=strategy).double()
    routing.load_state_dict(groups["param"])
    inputs = {key: tensor.requires_grad_() for key, tensor in groups["in"].items()}

    outputs = routing(**inputs, n_out=json.loads(metadata["n_out_call"]), return_R=True)
    outputs = dict(zip(("a_out", "mu_out", "sig2_out", "R"), outputs, strict=True))
    for key, expected in groups["out"].items():
        assert_close(key, outputs[key], expected, 1e-10)

    cotangents = groups["cot"]
    torch.autograd.backward([outputs[key] for key in cotangents], list(cotangents.values()))
    gradients = {key: tensor.grad for key, tensor in (*routing.named_parameters(), *inputs.items())}
    # where scores are infinite, the file has no gradient of them
    without = {"a_inp"} if inputs["a_inp"].isinf().any() else set()
    assert groups["grad"].keys() == gradients.keys() - without
    for key, expected in groups["grad"].items():
        assert_close(f"gradient of {key}", gradients[key], expected, 1e-10)
