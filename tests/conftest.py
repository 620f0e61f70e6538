"""What all tests share, set before anything of Hugging Face is imported: no network, the same bits, one kind of device.

Tests marked `gpu` run under `pytest -m gpu`. In any other run no process sees a CUDA device: Trainer, pipelines and
programs of several processes would take it otherwise, and what is meant for the CPU runs there on every machine.
"""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may wait for a hub
# Otherwise MKL's products differ in the last bit by where in memory the weights are, and loaded ones are elsewhere.
os.environ["MKL_CBWR"] = "AUTO"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads of each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported


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


def _process_state():
    """What a test could change for those after it; what it imports first is not compared."""
    import logging
    import sys

    state = {"logging.disable": logging.root.manager.disable}
    for name in ("capsule_heads", "transformers"):
        logger = logging.getLogger(name)
        state |= {f"level of {name}": logger.level, f"propagation of {name}": logger.propagate}
    if torch := sys.modules.get("torch"):
        state |= {"threads": torch.get_num_threads(), "dtype": torch.get_default_dtype()}
        state["gradients"] = torch.is_grad_enabled()
    if datasets := sys.modules.get("datasets"):
        state["bars of datasets"] = datasets.are_progress_bars_disabled()
    if transformers_logging := sys.modules.get("transformers.utils.logging"):
        state["bars of transformers"] = transformers_logging.is_progress_bar_enabled()
    if heads := sys.modules.get("capsule_heads.heads.base"):
        state["registered heads"] = sorted(heads.registered_heads())
    return state


@pytest.fixture(autouse=True)
def nothing_stays(compiled_kernels):
    """Fail where a test leaves its process other than it found it: tests after it would fail, or could not."""
    before = _process_state()
    yield
    after = _process_state()
    assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}
