"""The random numbers: known answers, and the samples of every backend against an implementation in numpy."""

import math

import numpy as np
import pytest
import torch

import po_kernels as pk
from po_kernels.backends.reference import philox

from .cases import fused, serving

# counter, key, output: the known answers published with the authors' Random123.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
ROW_OFFSETS = (0, 3, 2**32 - 2, 2**33 + 5)
SEEDS = (0, 1, 2**63 + 12345, 2**64 - 1, -7)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counter (..., 4) uint64 -> (..., 4) uint64, ten rounds."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            first & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, axis=-1)


def numpy_uniforms(seed: int, samples: int, rows: int, blocks: int, row_offset: int) -> np.ndarray:
    """(samples, rows, 4 blocks) in (0, 1)."""
    seed %= 2**64
    counter = np.zeros((samples, rows, blocks, 4), dtype=np.uint64)
    row = np.arange(row_offset, row_offset + rows, dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = np.arange(samples, dtype=np.uint64)[:, None, None]
    counter[..., 2] = (row & np.uint64(0xFFFFFFFF))[None, :, None]
    counter[..., 3] = (row >> np.uint64(32))[None, :, None]
    bits = numpy_philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(samples, rows, -1)
    return ((bits >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24


def numpy_normals(seed: int, samples: int, rows: int, dim: int, row_offset: int) -> np.ndarray:
    u = numpy_uniforms(seed, samples, rows, (dim + 3) // 4, row_offset)
    radius, angle = np.sqrt(-2.0 * np.log(u[..., 0::2])), 2.0 * math.pi * u[..., 1::2]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return pairs.reshape(samples, rows, -1)[..., :dim]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    found = philox.philox4x32(
        tuple(torch.tensor(word) for word in words(counter)), tuple(torch.tensor(word) for word in words(key))
    )
    assert [int(word) for word in found] == words(output)
    assert numpy_philox(np.array(words(counter), dtype=np.uint64), tuple(words(key))).tolist() == words(output)


@pytest.mark.parametrize("backend", serving("gaussian_sample"))
def test_known_answer_in_a_sample(backend):
    """Seed 0, row 0, sample 0 is counter 0 under key 0."""
    u = [((word >> 8) + 0.5) * 2.0**-24 for word in words(KNOWN_ANSWERS[0][2])]
    expected = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        length = math.sqrt(-2.0 * math.log(radius))
        expected += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
    zeros = torch.zeros(1, 4, dtype=torch.float64)
    found = pk.gaussian_sample(zeros, zeros, 1, seed=0, backend=backend)
    assert torch.allclose(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", serving("gaussian_sample"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_samples(backend, dtype):
    for seed in SEEDS:
        for row_offset in ROW_OFFSETS:
            for dim in (1, 2, 5, 8):
                zeros = torch.zeros(3, dim, dtype=dtype)
                found = pk.gaussian_sample(zeros, zeros, 4, seed=seed, row_offset=row_offset, backend=backend)
                expected = torch.as_tensor(numpy_normals(seed, 4, 3, dim, row_offset))
                # The angle's rounding, at most 2π eps, times a radius of at most 6, and one rounding more.
                eps = torch.finfo(torch.float64).eps
                assert (found - expected).abs().max() <= 64 * eps + torch.finfo(dtype).eps * 6


@pytest.mark.parametrize("backend", serving("gaussian_policy_loss"))
def test_samples_of_a_policy_loss(backend):
    """Row by row, mean 0, σ 1, U = I: the statistic reward_mean is −mean ‖z − y‖² of the samples."""
    for seed in SEEDS:
        for row_offset in ROW_OFFSETS:
            zeros = torch.zeros(3, 5, dtype=torch.float64)
            target = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)
            _, stats = pk.gaussian_policy_loss(
                zeros, zeros, target, 1.0, estimator="dice", num_samples=4, seed=seed, row_offset=row_offset,
                reduction="none", return_stats=True, backend=backend,
            )  # fmt: skip
            z = torch.as_tensor(numpy_normals(seed, 4, 3, 5, row_offset))
            expected = -(z - target).square().sum(-1).mean(0)
            assert torch.allclose(stats.reward_mean, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", serving("mvn_sample"))
def test_mvn_samples(backend):
    root = torch.tril(torch.randn(3, 5, 5, dtype=torch.float64), -1) + torch.eye(5, dtype=torch.float64)
    mean = torch.randn(3, 5, dtype=torch.float64)
    found = pk.mvn_sample(mean, root, 4, seed=9, row_offset=2**33, backend=backend)
    z = torch.as_tensor(numpy_normals(9, 4, 3, 5, 2**33))
    assert torch.allclose(found, mean + torch.einsum("bij,gbj->gbi", root, z), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", serving("categorical_sample"))
def test_labels(backend):
    """By inversion: the first class whose cumulated probability exceeds the uniform, here to 24 bits."""
    logits = torch.randn(5, 7, dtype=torch.float64)
    probabilities = torch.softmax(logits, -1).cpu().numpy()
    for seed in SEEDS:
        for row_offset in ROW_OFFSETS:
            u = numpy_uniforms(seed, 200, 5, 1, row_offset)[..., 0]
            expected = (np.cumsum(probabilities, -1)[None] < u[..., None]).sum(-1)
            found = pk.categorical_sample(logits, 200, seed=seed, row_offset=row_offset, backend=backend)
            assert np.array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("backend", fused("categorical_sample"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_labels_are_equal_to_the_bit(backend, dtype):
    logits = (4 * torch.randn(17, 33)).to(dtype)
    logits[::2, 3] = float("-inf")
    logits[5, :] = float("-inf")
    logits[5, 20] = 0.0
    for seed in SEEDS:
        found = pk.categorical_sample(logits, 50, seed=seed, row_offset=2**33, backend=backend)
        expected = pk.categorical_sample(logits, 50, seed=seed, row_offset=2**33, backend="reference")
        in_float64 = pk.categorical_sample(logits.double(), 50, seed=seed, row_offset=2**33, backend=backend)
        assert torch.equal(found, expected)
        assert torch.equal(found, in_float64)
    assert (found[:, 5] == 20).all()


ALL = slice(None)


def every_sample(backend, rows=ALL, group=6, row_offset=0):
    """Samples of all families for a fixed batch of 7 policies, or of some of its rows."""
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(7, 44, generator=generator, device="cpu").to(torch.get_default_device())
    mean, log_std, below, logits = numbers[:, :5], numbers[:, 5:10], numbers[:, 10:35], numbers[:, 35:]
    root = torch.tril(below.reshape(7, 5, 5), -1) + torch.eye(5)
    seed = 1234
    result = []
    options = {"seed": seed, "row_offset": row_offset}
    if backend in serving("gaussian_sample"):
        result.append(pk.gaussian_sample(mean[rows], log_std[rows], group, **options, backend=backend))
    if backend in serving("mvn_sample"):
        result.append(pk.mvn_sample(mean[rows], root[rows], group, **options, backend=backend))
    if backend in serving("categorical_sample"):
        result.append(pk.categorical_sample(logits[rows], group, **options, backend=backend))
    return result


BACKENDS = ["reference", *dict.fromkeys(fused("gaussian_sample") + fused("mvn_sample") + fused("categorical_sample"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_do_not_depend_on_threads_batch_or_group(backend):
    whole = every_sample(backend)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for found, expected in zip(every_sample(backend), whole, strict=True):
            assert torch.equal(found, expected)
    for start, stop in ((0, 1), (2, 5), (6, 7)):
        part = every_sample(backend, slice(start, stop), row_offset=start)
        for found, expected in zip(part, whole, strict=True):
            assert torch.equal(found, expected[:, start:stop])
    for group in (1, 4):
        for found, expected in zip(every_sample(backend, group=group), whole, strict=True):
            assert torch.equal(found, expected[:group])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_beyond_32_bits(backend):
    whole = every_sample(backend, row_offset=2**32 - 3)
    part = every_sample(backend, slice(4, 7), row_offset=2**32 + 1)
    for found, expected in zip(part, whole, strict=True):
        assert torch.equal(found, expected[:, 4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds(backend):
    mean, log_std = torch.zeros(2, 3), torch.zeros(3)

    def sample(seed):
        return pk.gaussian_sample(mean, log_std, 2, seed=seed, backend=backend)

    assert torch.equal(sample(-1), sample(2**64 - 1))
    assert torch.equal(sample(torch.tensor(-1)), sample(-1))
    assert not torch.equal(sample(1), sample(2**32 + 1))
    torch.manual_seed(3)
    drawn = sample(None)
    assert not torch.equal(drawn, sample(None))
    torch.manual_seed(3)
    assert torch.equal(drawn, sample(None))


@pytest.mark.parametrize("backend", serving("gaussian_sample"))
def test_distribution_of_the_normals(backend):
    count = 40_000
    z = pk.gaussian_sample(torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), count, seed=3,
                           backend=backend)  # fmt: skip
    # Moments within 4 standard errors: Var z = 1, Var z² = 2, Var z⁴ = 96, and the products of two have variance 1.
    assert (z.mean(0).abs() < 4 / math.sqrt(count)).all()
    assert ((z.square().mean(0) - 1).abs() < 4 * math.sqrt(2 / count)).all()
    assert ((z.pow(4).mean(0) - 3).abs() < 4 * math.sqrt(96 / count)).all()
    products = (z.T @ z / count)[torch.triu(torch.ones(4, 4), 1) > 0]
    assert (products.abs() < 4 / math.sqrt(count)).all()


@pytest.mark.parametrize("backend", serving("categorical_sample"))
def test_distribution_of_the_labels(backend):
    count = 40_000
    logits = torch.tensor([0.0, 1.0, -1.0, float("-inf"), 0.5])
    p = torch.softmax(logits, -1)
    observed = torch.bincount(pk.categorical_sample(logits, count, seed=3, backend=backend), minlength=5)
    assert observed[3] == 0
    seen = p > 0
    chi_square = ((observed - count * p).square() / (count * p))[seen].sum()
    # Three degrees of freedom: mean 3, variance 6.
    assert chi_square < 3 + 4 * math.sqrt(6)
