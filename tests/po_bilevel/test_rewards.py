"""Rewards are positive and mean what they say; closed-form rewards are the outer optimum."""

import math

import pytest
import torch
from po_bilevel import (
    MahalanobisReward,
    OneHotMahalanobisReward,
    PolicyGradient,
    PositivePrecision,
    TableReward,
    iterated_precision,
    marginal_covariance,
    one_hot_table,
    optimal_precision,
    residual_covariance,
)

KINDS = ("isotropic", "diagonal", "full")
SHAPES = {"isotropic": (), "diagonal": (3,), "full": (3, 3)}
MATRIX = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.7]], dtype=torch.float64)
STARTS = {"isotropic": torch.tensor(0.4).double(), "diagonal": torch.tensor([0.1, 1.0, 50.0]).double(), "full": MATRIX}


@pytest.mark.parametrize("kind", KINDS)
def test_precision_starts_where_it_is_told(kind):
    precision = PositivePrecision(3, kind, STARTS[kind])()
    assert precision.shape == SHAPES[kind]
    torch.testing.assert_close(precision, STARTS[kind], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        PositivePrecision(3, kind)(),
        {"isotropic": torch.tensor(1.0), "diagonal": torch.ones(3)}.get(kind, torch.eye(3)),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [-200.0, -1.0, 0.0, 30.0])
def test_precision_is_positive_whatever_its_parameters(kind, raw):
    module = PositivePrecision(3, kind).double()
    with torch.no_grad():
        module.raw.fill_(raw)
    module().sum().backward()
    u = module().detach()
    eigenvalues = torch.linalg.eigvalsh(u) if kind == "full" else u.reshape(-1)
    # LLᵀ has rank one here: what is left is ε = 1e-6, less the rounding of the largest eigenvalue.
    assert (eigenvalues > 1e-6 - 1e-12 * float(eigenvalues.max())).all()
    assert module.raw.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "start", "message"),
    [
        ("isotropic", torch.ones(3), "expected shape"),
        ("diagonal", torch.eye(3), "expected shape"),
        ("full", torch.ones(2), "expected shape"),
        ("diagonal", torch.tensor([1.0, 0.0, 1.0]), "above"),
        ("isotropic", float("inf"), "finite"),
        ("full", -torch.eye(3), "positive definite"),
        ("full", torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]]), "symmetric"),
        ("banded", None, "kind: expected one of"),
    ],
)
def test_bad_starts_are_refused(kind, start, message):
    with pytest.raises(ValueError, match=message):
        PositivePrecision(3, kind, start)


@pytest.mark.parametrize("kind", KINDS)
def test_mahalanobis_reward_of_answers(kind):
    reward = MahalanobisReward(3, kind, STARTS[kind])
    answer, target = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = {"isotropic": 0.4 * torch.eye(3).double(), "diagonal": torch.diag(STARTS["diagonal"]), "full": MATRIX}[kind]
    expected = [-float((a - y) @ u @ (a - y)) for a, y in zip(answer, target, strict=True)]
    torch.testing.assert_close(reward(answer, target).tolist(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_table(kind):
    reward = OneHotMahalanobisReward(3, kind, STARTS[kind])
    u = {"isotropic": 0.4 * torch.eye(3).double(), "diagonal": torch.diag(STARTS["diagonal"]), "full": MATRIX}[kind]
    basis = torch.eye(3, dtype=torch.float64)
    expected = torch.tensor([[-float((a - b) @ u @ (a - b)) for b in basis] for a in basis], dtype=torch.float64)
    torch.testing.assert_close(reward.table(), expected)
    assert (reward.table().diagonal() == 0).all()
    assert float(reward(torch.tensor(2), torch.tensor(0)).detach()) == pytest.approx(float(expected[2, 0]))


def test_one_hot_table_cannot_see_the_all_ones_direction():
    torch.testing.assert_close(one_hot_table(MATRIX, 3), one_hot_table(MATRIX + 7.0, 3))


def test_table_reward():
    reward = TableReward(MATRIX)
    assert torch.equal(reward.table(), MATRIX)
    assert float(reward(torch.tensor(0), torch.tensor(1)).detach()) == 0.5
    assert [p.shape for p in reward.parameters()] == [(3, 3)]
    with pytest.raises(ValueError, match=r"\(C, C\)"):
        TableReward(torch.zeros(2, 3))


def test_covariances():
    y = torch.tensor([[0.0, 2.0], [2.0, 4.0], [4.0, 0.0]])
    torch.testing.assert_close(marginal_covariance(y), torch.tensor([[8 / 3, -4 / 3], [-4 / 3, 8 / 3]]))
    torch.testing.assert_close(residual_covariance(y), torch.tensor([[20 / 3, 8 / 3], [8 / 3, 20 / 3]]))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        marginal_covariance(torch.zeros(0, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_optimal_precision_minimises_the_outer_loss(kind):
    """F(U) = ½ log det Σ_θ + ½ tr(Σ_θ⁻¹ Σ), where the policy under U has Σ_θ = (λ/2) U⁻¹."""
    entropy_coef = 0.6
    covariance = torch.linalg.inv(MATRIX)
    u = optimal_precision(covariance, entropy_coef, kind).requires_grad_()
    matrix = u if u.ndim == 2 else torch.diag(u.expand(3))
    loss = -0.5 * torch.logdet(matrix) + (matrix @ covariance).trace() / entropy_coef
    (gradient,) = torch.autograd.grad(loss, u)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-12)
    assert u.shape == SHAPES[kind]


def test_ridge_and_pseudo_inverse_of_one_hot_labels():
    labels = torch.nn.functional.one_hot(torch.arange(150) % 3, 3).double()
    covariance = marginal_covariance(labels)
    with pytest.raises(ValueError, match="singular"):
        optimal_precision(covariance, 1.0, "full")
    pseudo = optimal_precision(covariance, 1.0, "full", ridge=None)
    # Balanced classes: Σ = (I - 11ᵀ/3)/3, whose pseudo-inverse is 3 (I - 11ᵀ/3).
    expected = 0.5 * 3 * (torch.eye(3, dtype=torch.float64) - 1 / 3)
    torch.testing.assert_close(pseudo, expected)
    ridged = optimal_precision(covariance, 1.0, "full", ridge=1e-3)
    # Σ's eigenvalues are 1/3 where they are not 0, so that the ridge moves their inverses by at most 0.3%.
    torch.testing.assert_close(one_hot_table(ridged, 3), one_hot_table(expected, 3), rtol=1e-2, atol=0.0)
    assert float(optimal_precision(covariance, 1.0, "isotropic")) == pytest.approx(3 / (2 * 2 / 3))
    diagonal = optimal_precision(covariance, 2.0, "diagonal", ridge=0.5)
    torch.testing.assert_close(diagonal, torch.full((3,), 1 / (2 / 9 + 0.5), dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), 1.0), "covariance"),
        ((torch.eye(2), 0.0), "entropy_coef"),
        ((torch.eye(2), 1.0, "banded"), "kind"),
        ((torch.zeros(2, 2), 1.0, "diagonal"), "positive variance"),
        ((torch.zeros(2, 2), 1.0, "isotropic"), "positive variance"),
    ],
)
def test_bad_covariances_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimal_precision(*arguments)
    with pytest.raises(ValueError, match="ridge"):
        optimal_precision(torch.eye(2), 1.0, "diagonal", ridge=None)
    with pytest.raises(ValueError, match="ridge"):
        optimal_precision(torch.eye(2), 1.0, ridge=-1.0)


def test_iterated_precision_is_a_fixed_point():
    """A mean that is shrunk by weight decay is shrunk less under a sharper reward."""
    y = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1.0

    def residuals(u):
        # argmin over m of u (y - m)² + 0.3 m²
        return y - y.mean(dim=0) * u / (u + 0.3)

    start = optimal_precision(marginal_covariance(y), 1.0, "diagonal")
    u, rounds = iterated_precision(residuals, start, 1.0, "diagonal", rounds=50, tolerance=1e-10)
    assert 2 < rounds < 50
    torch.testing.assert_close(u, optimal_precision(residual_covariance(residuals(u)), 1.0, "diagonal"))
    assert (u < start).all()
    once, rounds = iterated_precision(residuals, start, 1.0, "diagonal", rounds=1)
    torch.testing.assert_close(once, optimal_precision(residual_covariance(residuals(start)), 1.0, "diagonal"))
    assert rounds == 1
    with pytest.raises(ValueError, match="rounds"):
        iterated_precision(residuals, start, 1.0, rounds=0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_variances_of_very_different_size_are_kept_in_float32(scale):
    covariance = torch.diag(torch.tensor([scale, 1e-4 * scale]))
    for ridge in (0.0, None):
        torch.testing.assert_close(
            optimal_precision(covariance, 1.0, ridge=ridge), torch.diag(0.5 / covariance.diagonal())
        )
    torch.testing.assert_close(
        optimal_precision(torch.diag(torch.tensor([1e8, 1.0])), 1.0), torch.diag(torch.tensor([0.5e-8, 0.5]))
    )


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (torch.tensor([[math.nan]]), "finite values"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), "semidefinite"),
        (torch.zeros(2, 2), "semidefinite"),
        (torch.zeros(0, 0), "shape"),
    ],
)
def test_what_is_no_covariance(covariance, message):
    with pytest.raises(ValueError, match=f"optimal_precision: covariance: expected .*{message}"):
        optimal_precision(covariance, 1.0, ridge=None)
    with pytest.raises(TypeError, match="optimal_precision: covariance: expected a floating tensor"):
        optimal_precision(torch.ones(1, 1, dtype=torch.int64), 1.0)


def test_full_precision_is_positive_in_float32_whatever_its_parameters():
    reward = MahalanobisReward(2, "full")
    for raw in ([[8.0, 0.0], [8.0, 0.0]], [[1e3, 0.0], [-1e3, 1e-3]], [[0.0, 0.0], [0.0, 0.0]]):
        with torch.no_grad():
            reward.matrix.raw.copy_(torch.tensor(raw))
        torch.linalg.cholesky(reward.precision())
    start = torch.tensor([[300.0, 20.0], [20.0, 5.0]])
    torch.testing.assert_close(MahalanobisReward(2, "full", start).precision(), start)


def test_bad_rewards():
    with pytest.raises(ValueError, match="precision: expected finite values"):
        MahalanobisReward(2, "full", math.nan)
    with pytest.raises(ValueError, match=r"one_hot_table: precision: expected shape \(\), \(4,\) or \(4, 4\)"):
        one_hot_table(torch.eye(2), 4)
    with pytest.raises(TypeError, match="table: expected a floating tensor"):
        TableReward(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="PolicyGradient: l2: expected a finite number of at least 0"):
        PolicyGradient(l2=-1.0)
