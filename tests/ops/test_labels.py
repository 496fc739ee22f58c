"""How labels are drawn: the rule in integers, known answers, and classes that 24 bits could not reach."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import po_kernels as pk
from po_kernels.backends.reference import philox

from .cases import serving
from .test_philox import KNOWN_ANSWERS, SEEDS, numpy_philox, words

EVERYWHERE = pytest.mark.parametrize("backend", serving("categorical_sample"))

# Of seed 2024, five samples of rows 0 and 1, the logits 0, 1, ..., 999 times 0.01.
KNOWN_LABELS = [[949, 878], [874, 830], [997, 897], [879, 967], [606, 991]]


@EVERYWHERE
def test_a_batch_of_problems(backend):
    """Under vmap labels are those of each problem by itself, with one seed for all or with its own."""
    logits, seeds = torch.randn(3, 2, 50), torch.tensor([4, 5, 2**40])
    sample = partial(pk.categorical_sample, num_samples=6, stream=2, backend=backend)
    found = torch.func.vmap(lambda x, seed: sample(x, seed=seed))(logits, seeds)
    assert torch.equal(found, torch.stack([sample(x, seed=int(seed)) for x, seed in zip(logits, seeds, strict=True)]))
    found = torch.func.vmap(partial(sample, seed=9))(logits)
    assert torch.equal(found, torch.stack([sample(x, seed=9) for x in logits]))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(sample)(logits)
    equal = logits[:1].expand(3, 2, 50)
    same, different = (torch.func.vmap(sample, randomness=kind)(equal) for kind in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_a_stream_of_a_seed_that_is_not_at_hand():
    with FakeTensorMode():
        labels = pk.categorical_sample(torch.zeros(2, 3), 4, seed=torch.tensor(1), stream=1)
    assert labels.shape == (4, 2)


def numpy_labels(logits: np.ndarray, seed: int, samples: int) -> np.ndarray:
    """(samples, rows): the classes whose distribution function is at most the 53-bit integer, over 2^53."""
    rows = len(logits)
    counter = np.zeros((samples, rows, 4), dtype=np.uint64)
    counter[..., 1] = np.arange(samples, dtype=np.uint64)[:, None]
    counter[..., 2] = np.arange(rows, dtype=np.uint64)
    seed %= 2**64
    x = numpy_philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = (x[..., 0] >> np.uint64(5)) * np.uint64(2**26) + (x[..., 1] >> np.uint64(6))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    limits = np.ceil(np.cumsum(p / p.sum(-1, keepdims=True), -1) * 2.0**53)
    labels = [np.searchsorted(limits[row], bits[:, row].astype(np.float64), side="right") for row in range(rows)]
    return np.minimum(np.stack(labels, -1), logits.shape[-1] - 1)


def test_uniform_of_known_words():
    first, second = words(KNOWN_ANSWERS[0][2])[:2]
    expected = ((first >> 5) * 2**26 + (second >> 6)) / 2**53
    assert philox.uniform53(torch.tensor(first), torch.tensor(second)).item() == expected
    assert philox.uniform53(torch.tensor(2**32 - 1), torch.tensor(2**32 - 1)).item() == 1 - 2.0**-53


@EVERYWHERE
def test_known_labels(backend):
    logits = (torch.arange(1000, dtype=torch.float64) * 0.01).expand(2, -1)
    found = pk.categorical_sample(logits, 5, seed=2024, backend=backend)
    assert found.tolist() == KNOWN_LABELS


@EVERYWHERE
@pytest.mark.parametrize("classes", [2, 63, 64, 65, 1000])
def test_labels_are_those_of_numpy(backend, classes):
    logits = torch.randn(3, classes, dtype=torch.float64)
    for seed in SEEDS:
        for dtype in (torch.float32, torch.float64):
            found = pk.categorical_sample(logits.to(dtype), 201, seed=seed, backend=backend)
            assert np.array_equal(found.numpy(), numpy_labels(logits.to(dtype).double().numpy(), seed, 201))


@EVERYWHERE
def test_rare_classes_of_a_vocabulary(backend):
    """Half of 50,000 classes have a mass of 1e-6 each, a sixteenth of what is between two numbers of 24 bits."""
    classes, count = 50_000, 400_000
    p = torch.full((1, classes), 0.975 / (classes // 2), dtype=torch.float64)
    p[:, ::2] = 1e-6
    labels = pk.categorical_sample(p.log(), count, seed=7, backend=backend)
    seen = torch.bincount(labels.flatten(), minlength=classes)[::2]
    # Poisson of mean 0.4 a class: their sum, and the classes that are seen, within four standard deviations.
    rare, mean = classes // 2, count * 1e-6
    assert abs(seen.sum() - rare * mean) <= 4 * math.sqrt(rare * mean)
    once = 1 - math.exp(-mean)
    assert abs((seen > 0).sum() - rare * once) <= 4 * math.sqrt(rare * once * (1 - once))


@EVERYWHERE
def test_the_last_class_with_mass_takes_the_rest(backend):
    logits = torch.full((1, 200), float("-inf"), dtype=torch.float64)
    logits[0, [3, 120]] = 0.0
    labels = pk.categorical_sample(logits, 4000, seed=3, backend=backend)
    assert set(labels.flatten().tolist()) == {3, 120}
