"""The compiled extension itself: its keywords, and where its threads are not."""

import subprocess
import sys

import pytest
import torch

from po_kernels import extension

pytestmark = pytest.mark.skipif(extension.module is None, reason="the extension was not built")


def run(program: str) -> str:
    """In a process of its own; one that hangs fails."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_keywords_are_checked():
    logits, labels = torch.zeros(1, 2), torch.zeros(3, 1, dtype=torch.int64)
    arguments = {
        "is_double": False,
        "dual": False,
        "rows": 1,
        "classes": 2,
        "num_samples": 3,
        "seed": -1,
        "row_offset": 0,
        "logits": logits.data_ptr(),
        "logits_stride": 2,
        "out": labels.data_ptr(),
    }
    sample = extension.module.categorical_sample
    assert sample(**arguments) == (0, 0, 0)
    assert sample(**arguments, threads=2, logits_tangent=0) == (0, 0, 0)
    with pytest.raises(TypeError, match=r"unexpected keyword argument classe$"):
        sample(**arguments, classe=2)
    del arguments["seed"]
    with pytest.raises(TypeError, match=r"missing keyword argument seed$"):
        sample(**arguments)


def test_a_fork_after_threads_of_torch_alone():
    """The child has none of torch's threads, whether or not an op of ours used them before."""
    program = """
import os, torch
from po_kernels import gaussian_policy_loss

torch.set_num_threads(2)
x = torch.ones(2**20).exp()
child = os.fork()
if child == 0:
    y = x[: 2**18].reshape(-1, 4)
    gaussian_policy_loss(y, y[0], y, 1.0, estimator="dice", num_samples=8, seed=1, backend="native")
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    assert run(program).strip() == "0"


def test_without_openmp_it_is_serial():
    program = f"""
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", {extension.module.__file__!r})
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

rows = 2**17
rewards = array.array("d", [0.0] * rows + [1.0] * rows)
out = array.array("d", bytes(8 * 2 * rows))
pointers = {{"rewards": rewards.buffer_info()[0], "out": out.buffer_info()[0]}}
mean = native.enums()["Advantage"]["mean"]
sizes = {{"rows": rows, "num_samples": 2, "threads": 4}}
print(native.group_advantage(is_double=True, dual=False, advantage=mean, **sizes, **pointers))
assert set(out[:rows]) == {{-0.5}} and set(out[rows:]) == {{0.5}}
assert "torch" not in sys.modules
"""
    assert run(program).strip() == "(0, 0, 0)"


@pytest.mark.parametrize("level", ["avx1024", "x86-64-v9"])
def test_a_level_that_there_is_not(level, monkeypatch):
    """Said in a warning, by `status` and where the backend is asked for: by variable, value and what is allowed."""
    monkeypatch.setenv("PO_KERNELS_SIMD", level)
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import po_kernels as pk
    import torch
    pk.group_advantage(torch.zeros(3), "mean")
    print([str(each.message) for each in caught if each.category is RuntimeWarning])
try:
    pk.group_advantage(torch.zeros(3), "mean", backend="native")
except RuntimeError as error:
    print(error)
"""
    warned, raised = run(program).strip().splitlines()
    for said in (warned, raised):
        assert "PO_KERNELS_SIMD: expected a level" in said
        assert f"default), got {level}" in said
