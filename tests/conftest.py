"""What holds for every test: a fixed seed, and no setting of torch that outlives a test.

PO_KERNELS_TEST_BACKENDS=native,numba names the backends that have to be there: without it, what is over the backends
that this machine has passes where there are none.
"""

import importlib.util
import os
import sys
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


from po_kernels import dispatch, extension


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the tensors of the op tests are: cpu or cuda")
    parser.addoption("--fast", action="store_true", help="fewer random cases, and no slow test")


def pytest_configure(config):
    # Before tests/ops/cases.py is imported, which draws all cases.
    os.environ["PO_KERNELS_TEST_DEVICE"] = config.getoption("--device")
    os.environ["PO_KERNELS_TEST_FAST"] = "1" if config.getoption("--fast") else ""
    for name in filter(None, os.environ.get("PO_KERNELS_TEST_BACKENDS", "").split(",")):
        if reason := absent(name):
            raise pytest.UsageError(f"PO_KERNELS_TEST_BACKENDS: {name} has to be there, but {reason}")


def absent(name):
    """Why no test can be of that backend, or None. Those for a GPU are tested without one too."""
    if name not in dispatch.BACKENDS:
        return f"there are {', '.join(dispatch.BACKENDS)}"
    if name == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if name == "cuda":
        return extension.missing or (None if extension.build["cuda"] else extension.build["cuda_reason"])
    return dispatch.module(name).unavailable()


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an error of the device nothing works in a process: the worker ends, and another one goes on."""
    report = yield
    broken = "CUDA error" in str(call.excinfo.value) if call.excinfo else False
    if broken and "PYTEST_XDIST_WORKER" in os.environ:
        item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture()
        print(f"{item.nodeid}\n{report.longrepr}", file=sys.stderr, flush=True)
        os._exit(1)
    return report


# Files that --fast leaves out whole: most of their time is that of a compiler, or of processes that start.
SLOW = ("test_compile.py", "test_docs.py", "test_sweep.py", "test_triton.py")


def pytest_collection_modifyitems(config, items):
    """A test over the backends that serve an op is not there at all where none does."""
    fast = config.getoption("--fast")
    left_out = {
        item
        for item in items
        if (fast and (item.path.name in SLOW or item.get_closest_marker("slow")))
        or any("got empty parameter set" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skip"))
    }
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
