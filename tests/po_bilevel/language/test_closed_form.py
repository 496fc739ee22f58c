"""U* of embeddings makes the data's covariance the optimum's, whatever the reference; what cannot be is refused."""

import math

import pytest
import torch
from po_bilevel import PositivePrecision, optimal_precision
from po_bilevel.language.closed_form import embedding_precision, marginal, residuals
from po_bilevel.language.rewards import TextEmbeddingReward

KINDS = ("isotropic", "diagonal", "low_rank", "full")
BETA = 0.3
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.7, 0.0], [-0.3, 0.2, 0.5]], dtype=torch.float64)


def rows(number, factor=FACTOR, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return marginal(torch.randn(number, len(factor), dtype=torch.float64, generator=generator) @ factor.mT)


def shrunk(rows, shrinkage):
    """Ledoit and Wolf's estimate from its definition, at their weight."""
    covariance = rows.mT @ rows / len(rows)
    dim = len(covariance)
    return (1.0 - shrinkage) * covariance + shrinkage * covariance.trace() / dim * torch.eye(dim, dtype=rows.dtype)


def test_the_optimum_under_u_star_has_the_covariance_of_the_data_by_integration():
    data, reference = rows(300, FACTOR[:2, :2]), rows(300, 2.0 * FACTOR[:2, :2].mT, seed=1)
    found = embedding_precision(data, BETA, "full", reference=reference)
    assert found.clipped == 0
    expected, prior = (shrunk(r, s) for r, s in zip((data, reference), found.shrinkage, strict=True))
    # p* ∝ p_ref exp(r/β) with y at the mean, summed over a grid: ±8 standard deviations, where what is left out and the
    # error of the trapezoidal rule are below 1e-12.
    axes = [torch.linspace(-8.0, 8.0, 161, dtype=torch.float64) * s for s in expected.diagonal().sqrt()]
    grid = torch.cartesian_prod(*axes)
    log_ref = torch.distributions.MultivariateNormal(torch.zeros(2).double(), prior).log_prob(grid)
    reward = TextEmbeddingReward(lambda texts: torch.zeros(len(texts), 2), U=found.precision, kind="full")
    weight = (log_ref + reward(grid, torch.zeros(2).double()) / BETA).softmax(0).detach()
    torch.testing.assert_close(weight @ grid, torch.zeros(2).double(), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(grid.mT @ (weight[:, None] * grid), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_precisions_add_up_for_each_kind(kind):
    data, reference = rows(200), rows(100, 3.0 * FACTOR, seed=1)
    # Of rank n - 1 the low-rank covariance is the full one.
    found = embedding_precision(data, BETA, kind, reference=reference, rank=2 if kind == "low_rank" else None)
    covariances = [shrunk(r, s) for r, s in zip((data, reference), found.shrinkage, strict=True)]
    if kind == "isotropic":
        covariances = [c.trace() / 3.0 * torch.eye(3).double() for c in covariances]
    if kind == "diagonal":
        covariances = [c.diagonal().diag() for c in covariances]
    u = found.precision if found.precision.ndim == 2 else found.precision * torch.eye(3).double()
    optimum = (covariances[1].inverse() + (2.0 / BETA) * u).inverse()
    torch.testing.assert_close(optimum, covariances[0], rtol=1e-10, atol=1e-10)
    assert found.precision.shape == {"isotropic": (), "diagonal": (3,)}.get(kind, (3, 3))
    assert found.clipped == 0


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_without_a_reference_it_is_the_entropys(kind):
    data = rows(50)
    found = embedding_precision(data, BETA, kind)
    expected = optimal_precision(shrunk(data, found.shrinkage[0]), BETA, kind)
    torch.testing.assert_close(found.precision, expected, rtol=1e-10, atol=1e-10)
    assert found.shrinkage[1] is None
    wide = embedding_precision(data, BETA, kind, reference=1e6 * rows(50, seed=1))
    torch.testing.assert_close(wide.precision, expected, rtol=1e-9, atol=1e-9)


def test_low_rank_keeps_the_diagonal_and_a_spiked_covariance():
    # Rows whose second moment is I + 4 u uᵀ in four dimensions, to rounding.
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64, generator=generator))[0] * math.sqrt(40.0)
    u = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5, 3.0]).double(), dim=0)
    data = basis @ (torch.eye(4).double() + (math.sqrt(5.0) - 1.0) * torch.outer(u, u))
    found, full = (embedding_precision(data, BETA, k, rank=r) for k, r in (("low_rank", 1), ("full", None)))
    torch.testing.assert_close(found.precision, full.precision, rtol=1e-10, atol=1e-10)
    found = embedding_precision(rows(200), BETA, "low_rank", rank=1)
    covariance = (2.0 / BETA * found.precision).inverse()
    expected = shrunk(rows(200), found.shrinkage[0])
    torch.testing.assert_close(covariance.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-10)
    # Off the diagonal it is what the leading eigenvector is above the others' mean.
    values, vectors = torch.linalg.eigh(expected)
    spike = (values[2] - values[:2].mean()) * torch.outer(vectors[:, 2], vectors[:, 2])
    off = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(covariance[off], spike[off], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["diagonal", "low_rank", "full"])
def test_where_the_reference_is_narrower_u_is_raised_to_what_a_precision_holds(kind, dtype):
    wide, narrow = torch.tensor([1.0, 3.0, 0.2]).double(), torch.tensor([2.0, 1.0, 0.4]).double()
    data, reference = rows(500, wide.diag()).to(dtype), rows(500, narrow.diag(), seed=1).to(dtype)
    rank = 1 if kind == "low_rank" else None
    found = embedding_precision(data, 1.0, kind, reference=reference, rank=rank)
    assert found.clipped == 1
    assert found.precision.dtype == dtype
    u = found.precision if found.precision.ndim == 2 else found.precision.diag()
    free = embedding_precision(data, 1.0, kind, rank=rank).precision
    floor = 2e-6 + (32.0 * torch.finfo(dtype).eps * float(free.trace()) if free.ndim == 2 else 0.0)
    # An eigenvalue is known to a rounding of the largest.
    error = 4 * torch.finfo(dtype).eps * float(u.max())
    assert float(torch.linalg.eigvalsh(u)[0]) == pytest.approx(floor, rel=1e-6, abs=error)
    kept = PositivePrecision(3, "diagonal" if kind == "diagonal" else "full", found.precision)()
    # One inversion of softplus, or a Cholesky factor and its square: some roundings of the largest entry.
    torch.testing.assert_close(kept, found.precision, rtol=0.0, atol=64 * torch.finfo(dtype).eps * float(u.max()))
    everywhere = embedding_precision(data, 1.0, kind, reference=0.5 * data, rank=rank)
    assert everywhere.clipped == 3


def test_a_singular_covariance_is_shrunk_and_its_condition_said():
    data = marginal(torch.randn(10, 30, dtype=torch.float64))
    found = embedding_precision(data, BETA, "full")
    assert found.condition[0] == math.inf
    values = torch.linalg.eigvalsh(shrunk(data, found.shrinkage[0]))
    assert found.condition[1] == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    regular = embedding_precision(rows(200), BETA, "isotropic")
    values = torch.linalg.eigvalsh(rows(200).mT @ rows(200))
    assert regular.condition[0] == pytest.approx(float(values[-1] / values[0]), rel=1e-9)
    assert 0.0 < regular.shrinkage[0] < found.shrinkage[0] <= 1.0
    reward = TextEmbeddingReward(lambda texts: torch.zeros(len(texts), 30), U=found.precision, kind="full")
    torch.testing.assert_close(reward.shown(), found.precision, rtol=1e-10, atol=1e-10)


def test_residuals_estimate_the_spread_within_a_prompt():
    generator = torch.Generator().manual_seed(0)
    count = torch.tensor([1, 2, 3, 5] * 500)
    index = torch.arange(2000).repeat_interleave(count)
    order = torch.randperm(len(index), generator=generator)
    index = index[order]
    means = 10.0 * torch.randn(2000, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(index), 3, dtype=torch.float64, generator=generator)
    found = residuals(means[index] + noise, index)
    assert len(found) == 5000
    # 3500 degrees of freedom a number: a standard error of √(2/3500) = 0.024 for variances of one, times 4.
    torch.testing.assert_close(found.mT @ found / len(found), torch.eye(3).double(), rtol=0.0, atol=0.096)
    torch.testing.assert_close(
        residuals(torch.tensor([[1.0], [7.0], [3.0]]), torch.tensor([4, 2, 4])),
        torch.tensor([[-1.0], [1.0]]) * math.sqrt(2.0),
    )
    torch.testing.assert_close(marginal(torch.tensor([[1.0], [7.0], [4.0]])).mT, torch.tensor([[-3.0, 3.0, 0.0]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "tall"}, ValueError, "embedding_precision: kind: expected one of 'isotropic'.*'tall'"),
        ({"coefficient": 0.0}, ValueError, "coefficient: expected a finite positive number, got 0.0"),
        ({"coefficient": math.inf}, ValueError, "coefficient"),
        ({"kind": "low_rank"}, ValueError, "rank: expected 1 to 2 .*got None"),
        ({"kind": "low_rank", "rank": 3}, ValueError, "rank: expected 1 to 2 .*got 3"),
        ({"kind": "low_rank", "rank": 0}, ValueError, "rank: expected 1 to 2 .*got 0"),
        ({"rank": 1}, ValueError, "None without, got 1"),
        ({"data": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "data: expected a floating tensor.*int64"),
        ({"data": torch.zeros(4, 3)}, ValueError, "data: .*all zero"),
        ({"data": torch.ones(1, 3)}, ValueError, r"data: .*at least 2.*\(1, 3\)"),
        ({"data": torch.ones(3)}, ValueError, r"data: expected shape \(N, n\), got \(3,\)"),
        ({"data": torch.tensor([[1.0], [math.nan]])}, ValueError, "data: expected finite numbers, .*row 1"),
        ({"reference": torch.ones(4, 2)}, ValueError, r"reference: expected shape \(N, 3\).*\(4, 2\)"),
        ({"reference": torch.zeros(4, 3)}, ValueError, "reference: .*all zero"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        embedding_precision(**{"data": rows(9), "coefficient": BETA, "kind": "diagonal"} | change)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(9), "expected a prompt with two answers, got one answer for each"),
        (torch.zeros(8, dtype=torch.int64), r"index: expected integers of shape \(9,\), got torch.int64, \(8,\)"),
        (torch.zeros(9), "index: expected integers"),
    ],
)
def test_refused_prompts(index, message):
    with pytest.raises(ValueError, match=message):
        residuals(rows(9), index)
