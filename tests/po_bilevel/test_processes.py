"""Two processes of `DistributedDataParallel` take the steps of one that has all rows."""

import pytest
import torch
import two_processes
from po_bilevel import (
    BOME,
    Batch,
    BilevelTrainer,
    CategoricalPolicy,
    Dense,
    EvolutionStrategies,
    ImplicitCG,
    LinearCategorical,
    Neumann,
    NormalCG,
    OneHotMahalanobisReward,
    PolicyGradient,
    Recompute,
    Unrolled,
)
from po_bilevel.hypergradients import FisherCG, Nystrom
from problems import double, seeded
from torch import nn

# Of 61 and 29 rows two processes have shares of other sizes; of batches of 20 the last has one row.
DATA = Batch(double(90, 2, seed=6), torch.arange(90) % 3)
INNER, OUTER = Batch(DATA.inputs[:61], DATA.target[:61]), Batch(DATA.inputs[61:], DATA.target[61:])

CASES = {
    "cg": {"hypergradient": ImplicitCG()},
    "preconditioned": {"hypergradient": ImplicitCG(preconditioner=Nystrom(4, seed=3))},
    "normal": {"hypergradient": NormalCG()},
    "dense": {"hypergradient": Dense()},
    "neumann": {"hypergradient": Neumann(50)},
    "unrolled": {"hypergradient": Unrolled(4, 0.5), "inner_steps": 0},
    "recompute": {"hypergradient": Recompute(4, 0.5), "inner_steps": 0},
    "bome": {"hypergradient": BOME(4, 0.5, 0.5), "inner_steps": 0},
    "random directions": {"hypergradient": EvolutionStrategies(2, 0.1, 3, 0.1)},
    "batches": {"batch_size": 20, "outer_batch_size": 7, "product_batches": 2},
    "parts": {"accumulation": 3, "batch_size": 20},
    "lbfgs": {"inner_optimizer": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3)},
    "clipped": {"max_grad_norm": 0.05, "max_outer_grad_norm": 0.01, "inner_tolerance": 1e-4},
    "bfloat16": {"autocast": torch.bfloat16},
    "float16": {"autocast": torch.float16, "inner_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    "samples": {"inner_loss": PolicyGradient(estimator="dice", num_samples=8), "hypergradient": ImplicitCG(0.1)},
    "fisher": {"inner_loss": PolicyGradient(estimator="dice", num_samples=8), "hypergradient": FisherCG(0.1)},
    "dropout": {"policy": lambda: network(nn.Dropout(0.5)), "hypergradient": ImplicitCG(0.5)},
    "norm": {"policy": lambda: network(nn.BatchNorm1d(8)), "hypergradient": ImplicitCG(0.5)},
}
# They draw other numbers than one process does.
OWN = ("samples", "fisher", "dropout", "norm", "random directions")
# A type of few digits: rounding is not that of one process.
BOUNDS = {"bfloat16": 2e-2, "float16": 2e-3}


def network(layer):
    return CategoricalPolicy(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), layer, nn.Linear(8, 3)))


def made(wrap, *, policy=lambda: LinearCategorical(2, 3), **options):
    reward = seeded(OneHotMahalanobisReward, 3)
    arguments = {
        "inner_data": INNER,
        "outer_data": OUTER,
        "inner_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        "outer_optimizer": torch.optim.Adam(reward.parameters(), lr=0.1),
        "inner_steps": 5,
        "inner_loss": PolicyGradient(l2=0.05),
        "progress": False,
    }
    return BilevelTrainer(wrap(seeded(policy)), reward, **(arguments | options))


def ended(trainer):
    tensors = [*trainer.policy.state_dict().values(), *trainer.reward.parameters()]
    told = [(step.inner_loss, step.outer_loss, step.gradient_norm, step.num_products) for step in trainer.history]
    return [tensor.detach().clone() for tensor in tensors], told


def own_seed():
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 1)


def results(wrap, barrier, path):
    """What each case ends at, whole and with a stop, and how many exchanges a product takes."""
    found = {}
    for name, options in CASES.items():
        trainer = made(wrap, **options)
        own_seed()
        trainer.fit(3)
        found[name] = ended(trainer)
        trainer = made(wrap, checkpoint=path, **options)
        own_seed()
        trainer.fit(1)
        torch.manual_seed(2)
        trainer = made(wrap, **options)
        trainer.fit(3, resume=path)
        found[f"{name}, resumed"] = ended(trainer)
        barrier()
    return found | {"exchanges": exchanges(wrap)}


def exchanges(wrap):
    """For products that differ by one more iteration of the solve, with the same policy."""
    counts = []
    for iterations in (2, 3):
        trainer = made(wrap, hypergradient=ImplicitCG(max_iterations=iterations, tolerance=1e-14))
        before, calls = torch.distributed.all_reduce, []
        torch.distributed.all_reduce = lambda x, calls=calls, before=before, **options: (
            calls.append(x.numel()),
            before(x, **options),
        )
        try:
            trainer.step()
        finally:
            torch.distributed.all_reduce = before
        counts.append((trainer.history[0].num_products, len(calls)))
    (fewer, least), (more, most) = counts
    return more - fewer, most - least


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    return two_processes.run(__file__, folder, lambda: results(lambda x: x, lambda: None, folder / "alone.pt"))


@pytest.mark.parametrize("name", [each for each in CASES if each not in OWN])
def test_the_same_as_one_process(both, name):
    alone, *each = both
    parameters, told = alone[name]
    bound = BOUNDS.get(name, 1e-9)
    for found in each:
        for a, b in zip(found[name][0], parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        for step, right in zip(found[name][1], told, strict=True):
            assert step[:3] == pytest.approx(right[:3], rel=bound, abs=bound)


@pytest.mark.parametrize("name", CASES)
def test_processes_stay_together_and_resume_to_the_bit(both, name):
    for found in both:
        for a, b in zip(found[name][0], found[f"{name}, resumed"][0], strict=True):
            assert torch.equal(a, b)
        assert found[name][1] == found[f"{name}, resumed"][1]
    for a, b in zip(both[1][name][0], both[2][name][0], strict=True):
        assert torch.equal(a, b)
    assert both[1][name][1] == both[2][name][1]


def test_one_exchange_a_product(both):
    assert both[0]["exchanges"] == (1, 0)
    assert both[1]["exchanges"] == both[2]["exchanges"] == (1, 1)
