"""What holds for every test: a fixed seed, and no setting of torch that outlives a test."""

import os
import warnings

# Read by the extension when its scratch memory is first allocated: fills it with NaN, so that a value
# read before it is written is seen.
os.environ["PO_KERNELS_POISON"] = "1"

import pytest
import torch

# torch imports it at the first derivative in forward mode, and warns of its own use of torch.jit.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch._decomp.decompositions_for_jvp


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tensors of the op tests are: cpu or cuda")


def pytest_configure(config):
    # Before tests/ops/cases.py is imported, which draws all cases.
    os.environ["PO_KERNELS_TEST_DEVICE"] = config.getoption("--device")


@pytest.fixture(autouse=True)
def torch_state(request):
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.config.getoption("--device") == "cpu":
            yield
        else:
            with torch.device(request.config.getoption("--device")):
                yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def pytest_collection_modifyitems(config, items):
    """A test over the backends that serve an op is not there at all where none does."""
    empty = [
        item
        for item in items
        if any("got empty parameter set" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skip"))
    ]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]
