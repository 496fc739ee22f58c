"""Batches from a loader of PyTorch."""

import pytest
import torch
from po_bilevel import (
    Batch,
    BatchStream,
    ImplicitCG,
    LinearCategorical,
    LoaderStream,
    OneHotMahalanobisReward,
    PolicyGradient,
    UsageError,
    train,
    train_nll,
    train_policy_gradient,
)
from problems import bilevel, seeded
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)


class Noisy(Dataset):
    """Draws anew each time that a row is read."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data.inputs)

    def __getitem__(self, row):
        return self.data.inputs[row] + 0.1 * torch.randn(2, dtype=torch.float64), self.data.target[row]


def loaders(data):
    rows = TensorDataset(*data)
    yield "in order", DataLoader(rows, batch_size=25)
    yield "shuffled", DataLoader(Noisy(data), batch_size=25, shuffle=True)
    own = torch.Generator().manual_seed(3)
    yield "a generator of its own", DataLoader(rows, batch_size=25, shuffle=True, generator=own, drop_last=True)
    sampler = RandomSampler(rows, replacement=True, num_samples=60, generator=torch.Generator())
    yield "a sampler of its own", DataLoader(rows, sampler=sampler, batch_size=25)
    inside = BatchSampler(RandomSampler(rows, generator=torch.Generator().manual_seed(1)), 25, False)
    yield "a generator in the sampler of batches", DataLoader(rows, batch_sampler=inside)
    yield "batches by hand", DataLoader(Noisy(data), batch_sampler=[[0, 1, 2], [5, 4], [7]])
    yield "workers", DataLoader(Noisy(data), batch_size=25, shuffle=True, num_workers=1)


def test_a_loader_in_order_gives_what_rows_in_order_do(classes):
    stream = LoaderStream(DataLoader(TensorDataset(*classes), batch_size=40), seed=5)
    for start, stop in ((0, 40), (40, 80), (80, 90), (0, 40)):
        batch, _ = stream.next()
        assert torch.equal(batch.inputs, classes.inputs[start:stop])
        assert torch.equal(batch.target, classes.target[start:stop])


def test_the_same_again_and_other_orders_each_epoch(classes):
    """Whatever else is drawn, and of what is drawn for a row too; no number of the default generator is taken."""
    for name, loader in loaders(classes):
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed + 5)
            before = torch.get_rng_state()
            stream = LoaderStream(loader, seed)
            found = [stream.next() for _ in range(9)]
            assert torch.equal(before, torch.get_rng_state()), name
            runs.append(found)
        for (a, one), (b, two) in zip(*runs[:2], strict=True):
            assert one == two
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.target, b.target)
        if name not in ("in order", "batches by hand"):
            assert not torch.equal(runs[0][0][0].inputs, runs[2][0][0].inputs)
            assert not torch.equal(runs[0][0][0].inputs, runs[0][4][0].inputs)
        assert len({seed for _, seed in runs[0]}) == 9


@pytest.mark.parametrize("taken", [0, 1, 4, 6])
def test_goes_on_to_the_bit(classes, taken):
    """Before, within and at the end of an epoch."""
    for _, loader in loaders(classes):
        stream = LoaderStream(loader, 1)
        for _ in range(taken):
            stream.next()
        state = stream.state()
        expected = [stream.next() for _ in range(6)]
        again = LoaderStream(loader, 1)
        again.restore(state)
        for batch, seed in expected:
            found, number = again.next()
            assert number == seed
            assert torch.equal(found.inputs, batch.inputs)


def made(data, path=None):
    rows = TensorDataset(data.inputs[:60], data.target[:60])
    return bilevel(
        data, inner_data=DataLoader(rows, batch_size=25, shuffle=True), inner_steps=7, checkpoint=path,
        outer_data=DataLoader(TensorDataset(data.inputs[60:], data.target[60:]), batch_size=10, shuffle=True),
        product_batches=2, hypergradient=ImplicitCG(damping=0.1),
        inner_loss=PolicyGradient(estimator="dice", num_samples=8, l2=0.05),
    )  # fmt: skip


def test_a_trainer_learns_from_loaders_and_resumes(classes, tmp_path):
    whole = made(classes)
    whole.fit(4)
    path = tmp_path / "run.pt"
    made(classes, path).fit(2)
    torch.manual_seed(9)
    parts = made(classes)
    parts.fit(4, resume=path)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert (a.inner_loss, a.outer_loss, a.gradient_norm) == (b.inner_loss, b.outer_loss, b.gradient_norm)
    assert torch.equal(whole.reward.precision(), parts.reward.precision())
    # Of a loader that gives all rows as those rows themselves.
    ends = []
    for loader in (False, True):
        inner, outer = Batch(classes.inputs[:60], classes.target[:60]), Batch(classes.inputs[60:], classes.target[60:])
        wrapped = [DataLoader(TensorDataset(*each), batch_size=60) for each in (inner, outer)] if loader else None
        inner_data, outer_data = wrapped or (inner, outer)
        run = bilevel(classes, inner_data=inner_data, outer_data=outer_data)
        run.fit(3)
        ends.append(run.reward.precision())
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


def test_one_level_from_a_loader(classes):
    loader = DataLoader(TensorDataset(*classes), batch_size=90)
    ends = []
    for data in (classes, loader):
        policy, reward = seeded(LinearCategorical, 2, 3), OneHotMahalanobisReward(3).double()
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        train_nll(policy, data, optimizer, 5)
        train_policy_gradient(policy, reward, data, optimizer, 5)
        stream = BatchStream(data, None, 0) if data is classes else LoaderStream(data, 0)
        train(policy, lambda policy, batch, seed: -policy.log_prob(*batch).mean(), stream, optimizer, 5)
        ends.append([p.detach() for p in policy.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


class Once(IterableDataset):
    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_a_generator_that_two_loaders_share(classes):
    rows, shared = TensorDataset(*classes), torch.Generator()

    def both():
        samplers = [RandomSampler(rows, replacement=True, num_samples=200, generator=shared) for _ in range(2)]
        return [LoaderStream(DataLoader(rows, 25, sampler=each), seed) for seed, each in enumerate(samplers)]

    for taken in range(4):
        streams = both()
        for _ in range(taken):
            for stream in streams:
                stream.next()
        states = [stream.state() for stream in streams]
        expected = [stream.next()[0].inputs for stream in streams]
        again = both()
        for stream, state in zip(again, states, strict=True):
            stream.restore(state)
        for stream, inputs in zip(again, expected, strict=True):
            assert torch.equal(stream.next()[0].inputs, inputs)


class Cached(Noisy):
    """Which changes with each row that is read."""

    cache: dict[int, object]

    def __getitem__(self, row):
        self.__dict__.setdefault("cache", {})[row] = row
        return super().__getitem__(row)


def test_what_a_checkpoint_knows_of_a_loader(classes, tmp_path):
    path = tmp_path / "run.pt"
    sampler = WeightedRandomSampler(torch.ones(90), 50)

    def run(rows, **options):
        loader = DataLoader(rows, **({"sampler": sampler, "batch_size": 25} | options))
        return bilevel(classes, inner_data=loader, checkpoint=path, inner_steps=3)

    run(Cached(classes)).fit(1)
    assert len(run(Cached(classes)).fit(2, resume=path)) == 2
    for other in (
        {"batch_size": 20},
        {"sampler": WeightedRandomSampler(torch.arange(1.0, 91.0), 50)},
        {"sampler": WeightedRandomSampler(torch.ones(90), 60)},
        {"collate_fn": lambda rows: default_collate(rows)},
    ):
        with pytest.raises(UsageError, match="inner_data was"):
            run(Cached(classes), **other).resume(path)
    with pytest.raises(UsageError, match="inner_data was"):
        run(Noisy(classes)).resume(path)


def test_bad_loaders(classes):
    policy = seeded(LinearCategorical, 2, 3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    rows = [(x, y) for x, y in zip(*classes, strict=True)]
    with pytest.raises(ValueError, match="data: expected a loader that begins anew, got one that gives a single epoch"):
        train_nll(policy, DataLoader(Once(rows), batch_size=40), optimizer, 5)
    with pytest.raises(ValueError, match="data: expected a loader that gives at least one batch, got one that gives"):
        train_nll(policy, DataLoader(TensorDataset(*classes), batch_size=100, drop_last=True), optimizer, 5)
    with pytest.raises(TypeError, match=r"data: expected a loader that gives \(inputs, target\), two tensors, got"):
        train_nll(policy, DataLoader(TensorDataset(classes.inputs), batch_size=10), optimizer, 5)
    with pytest.raises(TypeError, match=r"data: expected a loader that gives .* got NoneType"):
        train_nll(policy, DataLoader(rows, batch_size=10, collate_fn=lambda rows: None), optimizer, 5)
    with pytest.raises(ValueError, match="data: expected a loader with persistent_workers=False, got one with True"):
        train_nll(policy, DataLoader(TensorDataset(*classes), num_workers=1, persistent_workers=True), optimizer, 5)
    with pytest.raises(TypeError, match=r"data: expected a loader that gives .* got dict"):
        train_nll(policy, DataLoader([{"x": x} for x, _ in rows], batch_size=10), optimizer, 5)
    with pytest.raises(ValueError, match="data: expected a loader with batches of its own and no batch size, got 10"):
        train_nll(policy, DataLoader(TensorDataset(*classes), batch_size=10), optimizer, 5, batch_size=10)
    with pytest.raises(ValueError, match=r"data: expected finite numbers, got nan at inputs\[0, 0\]"):
        train_nll(policy, DataLoader(TensorDataset(classes.inputs * float("nan"), classes.target)), optimizer, 5)
    with pytest.raises(ValueError, match=r"inner_data: expected inputs of torch\.float64 as the policy has, got"):
        made(Batch(classes.inputs.float(), classes.target))
    with pytest.raises(TypeError, match="outer_data: expected a Batch of inputs and targets, or a DataLoader, got"):
        bilevel(classes, outer_data=rows)
