"""These problems are tiny: a second thread costs them time, and much of it where others use the processor too."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from po_bilevel import Batch
from problems import NOISE, ROWS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A few steps of a few iterations are what most tests take: that hypergradients are imperfect there is no news."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.filterwarnings("ignore::po_bilevel.HypergradientWarning"))


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def regression() -> Batch:
    """y = W x + 1 + ε in two dimensions, ε of standard deviations NOISE."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(ROWS, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    noise = torch.randn(ROWS, 2, dtype=torch.float64, generator=generator) * NOISE
    return Batch(inputs, inputs @ weight + 1.0 + noise)


@pytest.fixture
def classes() -> Batch:
    generator = torch.Generator().manual_seed(2)
    target = torch.arange(90) % 3
    inputs = torch.randn(90, 2, dtype=torch.float64, generator=generator)
    inputs[:, 0] += 1.5 * target
    return Batch(inputs, target)
