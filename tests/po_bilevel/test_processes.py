"""Two processes of `DistributedDataParallel` take the steps of one that has all rows."""

import functools

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
    train_nll,
)
from po_bilevel.hypergradients import FisherCG, Nystrom
from problems import double, seeded
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

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
CASES["loaders"] = {"inner_data": 20, "outer_data": 10}
# They draw other numbers than one process does.
OWN = ("samples", "fisher", "dropout", "norm", "random directions")
# A type of few digits: rounding is not that of one process.
BOUNDS = {"bfloat16": 2e-2, "float16": 2e-3}


def network(layer):
    return CategoricalPolicy(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), layer, nn.Linear(8, 3)))


def loader(size):
    """Whose rows of all processes together are those of one: each takes its part of them."""
    rows = TensorDataset(DATA.inputs[:60], DATA.target[:60])
    if not torch.distributed.is_initialized():
        return DataLoader(rows, batch_size=size)
    sampler = DistributedSampler(rows, shuffle=False)
    return DataLoader(rows, batch_size=size // sampler.num_replicas, sampler=sampler)


def made(wrap, *, policy=lambda: LinearCategorical(2, 3), **options):
    reward = seeded(OneHotMahalanobisReward, 3)
    for name, size in (("inner_data", options.get("inner_data")), ("outer_data", options.get("outer_data"))):
        if isinstance(size, int):
            options[name] = loader(size)
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
    return found | {"exchanges": exchanges(wrap), "edges": edges(wrap)}


class Branches(nn.Module):
    """Of the first rows one branch, of the others another: a process knows one of them alone."""

    def __init__(self):
        super().__init__()
        self.common, self.first, self.last = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, inputs):
        found, early = self.common(inputs), inputs[:, 0] < 0
        for rows, branch in ((early, self.first), (~early, self.last)):
            if rows.any():
                found = found.index_add(0, rows.nonzero()[:, 0], branch(inputs[rows]))
        return found


def edges(wrap):
    """What processes that differ come to."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 1
    found, order = {}, INNER.inputs[:60, 0].sort().indices
    order = torch.cat([order[:30], order[-30:]])
    halves = Batch(INNER.inputs[order].clone(), INNER.target[order])
    halves.inputs[:30, 0], halves.inputs[30:, 0] = -1.0, 1.0
    loss = PolicyGradient()  # no penalty reaches the parameter that is not used
    for name, method in (("cg", ImplicitCG(0.5)), ("unrolled", Unrolled(3, 0.2))):
        trainer = made(
            wrap if wrap is same else functools.partial(wrap, find_unused_parameters=True),
            policy=lambda: CategoricalPolicy(Branches()),
            inner_data=halves,
            hypergradient=method,
            inner_loss=loss,
        )
        trainer.fit(2)
        found[f"branches, {name}"] = ended(trainer)
    policy = wrap(seeded(lambda: network(nn.BatchNorm1d(8))))
    train_nll(policy, INNER, torch.optim.SGD(policy.parameters(), lr=0.1), 3)
    found["buffers"] = [x.clone() for x in policy.state_dict().values()]
    _, steps = train_nll(
        policy, INNER, torch.optim.SGD(policy.parameters(), lr=0.1), 9, callback=lambda step, value: rank == step == 1
    )
    trainer = made(wrap)
    found["stopped"] = steps, len(trainer.fit(9, lambda step: rank == step.step == 1))
    for name, options in (
        ("rows", {"inner_data": Batch(INNER.inputs + rank, INNER.target)}),
        (
            "few",
            {
                "inner_loss": PolicyGradient(estimator="dice", num_samples=8),
                "hypergradient": FisherCG(0.1),
                "batch_size": 1,
            },
        ),
        ("folder", {}),
    ):
        try:
            made(wrap, **options).fit(1)
            made(wrap).save("/nowhere/run.pt")
        except (ValueError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def same(x):
    return x


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
    return two_processes.run(__file__, folder, lambda: results(same, lambda: None, folder / "alone.pt"))


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


@pytest.mark.parametrize("name", ["branches, cg", "branches, unrolled"])
def test_parameters_that_one_process_alone_reaches(both, name):
    alone, *each = (found["edges"][name] for found in both)
    for tensors, told in each:
        for a, b in zip(tensors, alone[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        assert told[0] == pytest.approx(alone[1][0], rel=1e-9)
    for a, b in zip(each[0][0], each[1][0], strict=True):
        assert torch.equal(a, b)


def test_processes_end_together(both):
    for first, second in zip(both[1]["edges"]["buffers"], both[2]["edges"]["buffers"], strict=True):
        assert torch.equal(first, second)
    for found in both:
        assert found["edges"]["stopped"] == (2, 2)
        assert found["edges"]["folder"].startswith("FileNotFoundError: ")
    for found in both[1:]:
        assert "inner_data: expected the same rows in each process, which share them out" in found["edges"]["rows"]
        assert (
            "batch_size: expected at least a row for each of 2 processes with FisherCG, got 1" in found["edges"]["few"]
        )
