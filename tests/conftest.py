"""What all tests share, set before anything of Hugging Face is imported: no network, the same bits, one kind of device.

Tests marked `gpu` run under `pytest -m gpu`. In any other run no process sees a CUDA device: Trainer, pipelines and
programs of several processes would take it otherwise, and what is meant for the CPU runs there on every machine.
"""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may wait for a hub
# Otherwise MKL's products differ in the last bit by where in memory the weights are, and loaded ones are elsewhere.
os.environ["MKL_CBWR"] = "AUTO"


pytest_plugins = ["command_fixtures", "model_fixtures"]  # after the variables above are set


def pytest_configure(config):
    """Hide CUDA devices, or all but one for the tests marked `gpu`: the driver reads this when it is first called."""
    if config.option.markexpr == "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would spread a batch over several
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    """Skip tests marked `gpu` where no CUDA device is seen."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # after the variables above are set

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and to be asked for: pytest -m gpu")


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels():
    """Compile the kernels of small routings: the first process on a machine says that it does, which is of no test."""
    import torch

    from capsule_heads.ops import STRATEGIES, route

    if STRATEGIES["kept"].missing() is not None:
        return
    for dtype in (torch.float32, torch.float64):
        inputs = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, 1, 4, dtype=dtype, requires_grad=True)
        weights = (torch.ones(1, 5, *shape, dtype=dtype) for shape in ((4, 2), (1, 2), (), ()))
        route(*inputs, *weights, n_out=5, strategy="kept")[0].sum().backward()
