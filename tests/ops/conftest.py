import pytest
import torch

from .cases import DEVICE


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin return NaN, or the largest integer: an output that no kernel wrote is seen."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    # On a GPU some of the reference's operations have no such algorithm.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert torch.empty(3).isnan().all()
    assert torch.ones(2, 2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def one_thread(torch_state):
    """Tests of threads ask for two; in all others, threads of torch would only wait for a busy core, spinning."""
    torch.set_num_threads(1)
