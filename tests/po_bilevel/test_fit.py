"""`fit` of a trainer: what it warns of, when it stops, how it goes on; and solves that are never worse than none."""

import warnings

import pytest
import torch
from po_bilevel import (
    BilevelTrainer,
    CategoricalPolicy,
    Dense,
    FixedPoint,
    HypergradientWarning,
    ImplicitCG,
    LinearCategorical,
    Neumann,
    NormalCG,
    OneHotMahalanobisReward,
    PolicyGradient,
    UsageError,
    train_nll,
)
from problems import lbfgs, seeded


def trainer(batch, **options):
    """Solved inner problems, for one of samples is not."""
    reward = OneHotMahalanobisReward(3).double()
    given = {
        "inner_loss": PolicyGradient(l2=1e-2), "hypergradient": ImplicitCG(1e-4), "inner_steps": 50,
        "inner_optimizer": lbfgs, "inner_data": batch, "outer_data": batch,
        "outer_optimizer": torch.optim.Adam(reward.parameters(), lr=0.1),
    }  # fmt: skip
    return BilevelTrainer(
        seeded(LinearCategorical, 2, 3), reward, keep_inner_state=False, progress=False, **given | options
    )


def test_imperfect_hypergradients_are_warned_of_once(classes):
    noisy = PolicyGradient(estimator="dice", num_samples=4)
    learner = trainer(classes, inner_loss=noisy, inner_optimizer=lambda p: torch.optim.Adam(p, lr=0.1), inner_steps=3)
    with pytest.warns(HypergradientWarning) as said:
        history = learner.fit(4)
    (warning,) = said
    assert warning.filename == __file__
    flawed = sum(step.negative_curvature or not step.converged for step in history)
    assert str(warning.message).startswith(f"{flawed} of the last 4 outer steps had an imperfect hypergradient; the l")
    assert history[-1].problems[0] in str(warning.message)
    # What is solved is not warned of, whatever came before.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(classes).fit(4)
        learner.fit(0)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_stops_where_the_outer_loss_no_longer_falls(patience, classes):
    history = trainer(classes).fit(50, patience=patience, min_delta=1e9)
    # The first falls below nothing at all.
    assert len(history) == 1 + patience
    assert len(trainer(classes).fit(5, patience=patience)) == 5
    with pytest.raises(ValueError, match="patience: expected an integer of at least 1, got 0"):
        trainer(classes).fit(5, patience=0)


def test_a_resumed_fit_counts_to_a_total(classes, tmp_path):
    path = tmp_path / "run.pt"
    expected = trainer(classes).fit(6)
    first = trainer(classes, checkpoint=path)
    # The same script begins a run and goes on with it, and does nothing once it is done.
    assert len(first.fit(4, resume=path)) == 4
    for _ in range(2):
        again = trainer(classes, checkpoint=path)
        history = again.fit(6, resume=path)
        assert [step.outer_loss for step in history] == [step.outer_loss for step in expected]
    with pytest.raises(UsageError, match=r"other\.pt"):
        trainer(classes, checkpoint=path).fit(6, resume=tmp_path / "other.pt")
    # The patience counts steps of before, too.
    assert len(trainer(classes, checkpoint=path).fit(9, resume=path, patience=2, min_delta=1e9)) == 6


METHODS = [
    ImplicitCG(), ImplicitCG(max_iterations=3), ImplicitCG(damping=3.0), NormalCG(max_iterations=2), Neumann(),
    Neumann(terms=1, learning_rate=10.0), FixedPoint(), FixedPoint(learning_rate=2.0), Dense(),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_no_solve_is_worse_than_zero(method):
    """Of indefinite systems, on which conjugate gradients and series go astray: zero has a relative residual of one."""
    generator = torch.Generator().manual_seed(0)
    residuals = []
    for _ in range(20):
        shapes = [(6, 6), (6, 2), (6,), (6,), (2,)]
        matrix, mixed, right, theta, phi = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes
        )
        matrix = matrix + matrix.mT
        result = method(
            lambda t, p, a=matrix, b=mixed: 0.5 * t[0] @ a @ t[0] + t[0] @ b @ p[0], lambda t, p, c=right: t[0] @ c,
            (theta.requires_grad_(),), (phi.requires_grad_(),),
        )  # fmt: skip
        assert result.converged is not True or result.residual_norm < 1e-2
        # And the gradient is that of the vector that is given.
        torch.testing.assert_close(result.gradient[0], -mixed.mT @ result.solution[0])
        residuals.append(result.residual_norm)
    assert max(residuals) <= 1.0
    # Those that have found something keep it; steps that are too long find nothing.
    assert min(residuals) < 1.0 or getattr(method, "learning_rate", None)


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"inner_data": "numpy"}, TypeError, "inner_data: expected inputs that are a tensor, got numpy.ndarray"),
        (
            {"outer_data": "tuple"},
            TypeError,
            "outer_data: expected a Batch of inputs and targets, or a DataLoader, got tuple",
        ),
        ({"outer_data": "float"}, ValueError, "outer_data: expected inputs of torch.float64 as the policy has, got t"),
        (
            {"inner_data": "narrow"},
            ValueError,
            "inner_data: expected inputs of the policy's 2 features, got shape (90",
        ),
        ({"outer_optimizer": None}, TypeError, "outer_optimizer: expected an optimiser of torch, got NoneType"),
        ({"inner_optimizer": None}, TypeError, "inner_optimizer: expected a function that makes an optimiser"),
    ],
    ids=str,
)
def test_what_a_trainer_cannot_use_is_named(change, error, part, classes):
    x, y = classes
    others = {
        "numpy": classes._replace(inputs=x.numpy()), "tuple": (x, y), "float": classes._replace(inputs=x.float()),
        "narrow": classes._replace(inputs=x[:, :1]),
    }  # fmt: skip
    with pytest.raises(error) as caught:
        trainer(classes, **{name: others.get(value, value) for name, value in change.items()})
    assert part in str(caught.value)


def test_what_a_loop_cannot_use_is_named(classes):
    policy = seeded(LinearCategorical, 2, 3)
    with pytest.raises(TypeError, match="optimizer: expected an optimiser of torch, got NoneType"):
        train_nll(policy, classes, None, 3)
    optimizer = torch.optim.Adam(policy.parameters())
    with pytest.raises(ValueError, match=r"data: expected inputs of torch\.float64 as the policy has, got torch\.f"):
        train_nll(policy, classes._replace(inputs=classes.inputs.float()), optimizer, 3)
    # A network's own casts are not known, so that nothing is refused.
    cast = torch.nn.Sequential(Double(), torch.nn.Linear(2, 3).double())
    policy = CategoricalPolicy(cast)
    train_nll(policy, classes._replace(inputs=classes.inputs.float()), torch.optim.Adam(policy.parameters()), 3)


class Double(torch.nn.Module):
    def forward(self, x):
        return x.double()
