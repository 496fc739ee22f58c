"""Inner loops in native calls against the same loops step by step."""

import copy
import random

import pytest
import torch
from po_bilevel import (
    Batch,
    BatchStream,
    GaussianPolicy,
    LinearCategorical,
    LinearFullGaussian,
    LinearGaussian,
    MahalanobisReward,
    MLPCategorical,
    MLPFullGaussian,
    MLPGaussian,
    NegativeLogLikelihood,
    NonFiniteError,
    OneHotMahalanobisReward,
    PolicyGradient,
    TableReward,
    train,
    train_ensemble,
    train_nll,
    train_policy_gradient,
)
from po_bilevel.losses import Likelihood
from po_bilevel.training import native_steps, under
from problems import bilevel
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import po_kernels as pk
from po_kernels import extension

pytestmark = pytest.mark.skipif(extension.module is None, reason="without the extension there is nothing to test")


class Loop:
    """A random policy, reward, loss, optimiser and schedule: the same for the same number."""

    def __init__(self, number, **options):
        draw = random.Random(number)
        torch.manual_seed(number)
        inputs, dim, rows = draw.randint(1, 5), draw.randint(1, 6), draw.randint(5, 150)
        hidden = [draw.randint(1, 40) for _ in range(draw.randint(0, 3))]
        several = (draw.randint(2, 3),) if draw.random() < 0.3 else ()
        x = torch.randn(rows, inputs, dtype=torch.float64)
        kind = draw.choice(["gaussian", "full", "categorical"])
        estimator = draw.choice([None, "dice", "reinforce"])
        if kind == "categorical":
            dim += 1
            self.policy = MLPCategorical(inputs, dim, hidden=hidden) if hidden else LinearCategorical(inputs, dim)
            self.reward = draw.choice([OneHotMahalanobisReward(dim), TableReward(torch.eye(dim))])
            y = torch.randint(dim, (*several, rows))
        else:
            if kind == "full":
                self.policy = MLPFullGaussian(inputs, dim, hidden=hidden) if hidden else LinearFullGaussian(inputs, dim)
            else:
                state, std = draw.random() < 0.4, draw.choice(["learned", "bounded"])
                self.policy = MLPGaussian(inputs, dim, hidden=hidden, state_dependent_std=state, std=std)
                estimator = draw.choice([estimator, "reparam"])
            self.reward = MahalanobisReward(dim, draw.choice(["isotropic", "diagonal", "full"]))
            y = torch.randn(*several, rows, dim, dtype=torch.float64)
        self.policy, self.reward, self.data = self.policy.double(), self.reward.double(), Batch(x, y)
        self.loss = PolicyGradient(
            draw.choice([0.1, 1.0]), estimator, None if estimator is None else 3, draw.choice(["loo", "mean"]),
            draw.choice([0.0, 0.01]),
        )  # fmt: skip
        rate = {"lr": 0.01, "weight_decay": draw.choice([0.0, 0.1])}
        # An eps that rounding in a gradient near zero cannot be divided by.
        makers = [
            lambda p: torch.optim.Adam(p, eps=1e-3, **rate), lambda p: torch.optim.AdamW(p, eps=1e-3, **rate),
            lambda p: torch.optim.Adam(p, eps=1e-3, fused=True, **rate), lambda p: torch.optim.SGD(p, **rate),
            lambda p: torch.optim.SGD(p, momentum=0.5, nesterov=True, **rate),
        ]  # fmt: skip
        self.optimizer = draw.choice(makers)(self.policy.parameters())
        schedule = draw.choice([None, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 20), lr_scheduler.ReduceLROnPlateau])
        self.options = {
            "scheduler": schedule and schedule(self.optimizer), "max_grad_norm": draw.choice([None, 0.5]),
            "batch_size": draw.choice([None, max(1, rows // 3)]), "seed": number,
        } | options  # fmt: skip

    def run(self, steps):
        return train_policy_gradient(
            self.policy, self.reward, self.data, self.optimizer, steps, loss=self.loss, **self.options
        )

    def native(self):
        with under(self.reward, self.loss) as loss:
            return native_steps(self.policy, loss, self.data, self.optimizer, None) is not None

    def left(self):
        """Everything that steps change."""
        state = self.optimizer.state_dict()
        schedule = self.options["scheduler"]
        numbers = [group["lr"] for group in state["param_groups"]] + ([] if schedule is None else schedule._last_lr)
        tensors = [value for entry in state["state"].values() for value in entry.values() if value is not None]
        gradients = [p.grad for p in self.policy.parameters()]
        return [p.detach() for p in self.policy.parameters()], tensors, gradients, torch.tensor(numbers)


def close(found, right):
    """Rounding of a few dozen steps, each of some hundred."""
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def step_by_step(run):
    with pk.use_backend("reference"):
        return run()


@pytest.mark.parametrize("number", range(40))
def test_loops_are_equal_step_by_step(number):
    ours, theirs = Loop(number), Loop(number)
    assert ours.native()
    assert not step_by_step(theirs.native)
    for steps in (7, 1, 5):
        close(ours.run(steps), step_by_step(lambda steps=steps: theirs.run(steps)))
        for found, right in zip(ours.left(), theirs.left(), strict=True):
            close(found, right)


@pytest.mark.parametrize("number", range(50, 62))
def test_likelihood_is_trained_step_by_step(number):
    ours, theirs = Loop(number), Loop(number)
    for loop in (ours, theirs):
        loop.loss = NegativeLogLikelihood(loop.loss.l2)

    def run(loop):
        return train_nll(loop.policy, loop.data, loop.optimizer, 12, loss=loop.loss, **loop.options)

    assert native_steps(ours.policy, Likelihood(ours.loss), ours.data, ours.optimizer, None) is not None
    close(run(ours), step_by_step(lambda: run(theirs)))
    close(ours.left(), theirs.left())


@pytest.mark.parametrize("stop", [{"patience": 2, "min_delta": 1e-3}, {"tolerance": 0.5}, "callback"])
@pytest.mark.parametrize("number", range(40, 46))
def test_loops_end_where_they_would(stop, number):
    seen = []

    def callback(step, value):
        seen.append((step, value))
        return step == 5

    options = {"callback": callback} if stop == "callback" else stop
    ours, theirs = Loop(number, **options), Loop(number, **options)
    close(ours.run(30), step_by_step(lambda: theirs.run(30)))
    half = len(seen) // 2
    close(seen[:half], seen[half:])
    close(ours.left(), theirs.left())


def test_the_stream_goes_on_from_the_same_place():
    """A hundred steps a call draw as many batches and seeds as a hundred calls."""
    loop = Loop(3)
    for size in (4, None):
        drawn, single = BatchStream(loop.data, size, 0), BatchStream(loop.data, size, 0)
        for rows, seed in drawn.draw_several(101):
            batch, other = single.next()
            assert seed == other
            assert torch.equal(batch.inputs, loop.data.inputs if rows is None else loop.data.rows(rows).inputs)
        assert torch.equal(drawn.state()["generator"], single.state()["generator"])


def test_two_runs_give_the_same_bits_however_steps_are_shared_out():
    whole, parts = Loop(8), Loop(8)
    for loop in (whole, parts):
        loop.options |= {"batch_size": None}
        loop.run(1)
    whole.run(12)
    assert whole.native()
    # A stream of a second run begins anew: its seeds, too.
    copied = copy.deepcopy(whole.policy.state_dict())
    again = Loop(8)
    again.options |= {"batch_size": None}
    again.run(1)
    again.run(12)
    for name, value in again.policy.state_dict().items():
        assert torch.equal(value, copied[name])


def test_the_trainer_says_so(classes):
    ours, theirs = (bilevel(classes, inner_steps=20, inner_optimizer=torch.optim.Adam) for _ in range(2))
    history, other = ours.fit(3), step_by_step(lambda: theirs.fit(3))
    assert [step.native for step in history] == [True] * 3
    assert [step.native for step in other] == [False] * 3
    for one, two in zip(history, other, strict=True):
        close([one.inner_loss, one.outer_loss, one.gradient_norm], [two.inner_loss, two.outer_loss, two.gradient_norm])


def test_the_first_step_of_an_optimiser_is_not_native(classes):
    for keep, expected in ((True, [False, True, True]), (False, [False] * 3)):
        trainer = bilevel(classes, inner_steps=1, inner_optimizer=torch.optim.Adam, keep_inner_state=keep)
        assert [step.native for step in trainer.fit(3)] == expected


def test_what_native_calls_do_not_do_is_done_step_by_step():
    base = Loop(0)
    assert base.native()

    def taken(policy=None, optimizer=None, loss=None, reward=None):
        loop = Loop(0)
        loop.policy = policy or loop.policy
        parameters = list(loop.policy.parameters())
        loop.optimizer = optimizer(parameters) if optimizer else torch.optim.Adam(parameters)
        loop.loss, loop.reward = loss or PolicyGradient(), reward or loop.reward
        return loop.native()

    assert taken()
    assert not taken(optimizer=lambda p: torch.optim.Adam(p, amsgrad=True))
    assert not taken(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, maximize=True))
    assert not taken(optimizer=torch.optim.RMSprop)
    assert not taken(optimizer=torch.optim.LBFGS)
    assert not taken(optimizer=lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}]))
    hooked = torch.optim.Adam(base.policy.parameters())
    hooked.register_step_post_hook(lambda *a: None)
    assert not taken(policy=base.policy, optimizer=lambda p: hooked)

    def gaussian(network):
        return GaussianPolicy(network, None, base.data.target.shape[-1]).double()

    width, dim = base.data.inputs.shape[1], base.data.target.shape[-1]
    linear = lambda: nn.Linear(width, dim)  # noqa: E731
    if not isinstance(base.reward, MahalanobisReward):
        raise AssertionError("the first loop is meant to be a Gaussian's")
    assert taken(policy=gaussian(linear()))
    assert not taken(policy=gaussian(nn.Sequential(linear(), nn.Dropout(), nn.Linear(dim, dim))))
    assert not taken(policy=gaussian(nn.Sequential(linear(), nn.SiLU(), nn.Linear(dim, dim))))
    assert not taken(
        policy=gaussian(nn.Sequential(linear(), nn.Tanh(), nn.Linear(dim, 4), nn.ReLU(), nn.Linear(4, dim)))
    )
    assert not taken(policy=gaussian(nn.Sequential(linear(), nn.Tanh())))
    watched = gaussian(linear())
    watched.mean_network.register_forward_hook(lambda *a: None)
    assert not taken(policy=watched)
    tied = gaussian(nn.Sequential(linear(), nn.Tanh(), nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim)))
    tied.mean_network[4].weight = tied.mean_network[2].weight
    assert not taken(policy=tied)
    spectral = gaussian(nn.utils.parametrizations.weight_norm(linear()))
    assert not taken(policy=spectral)

    class Clipped(GaussianPolicy):
        def forward(self, inputs):
            mean, log_std = super().forward(inputs)
            return mean.clamp(-1, 1), log_std

    assert not taken(policy=Clipped(linear(), None, dim).double())

    class Weighted(PolicyGradient):
        def __call__(self, *arguments):
            return 2 * super().__call__(*arguments)

    assert not taken(loss=Weighted())
    fixed = LinearGaussian(width, dim, std="fixed").double()
    assert taken(policy=fixed)
    # The penalty is on parameters, of which a fixed std is none.
    assert not taken(policy=fixed, loss=PolicyGradient(l2=0.1))


def once(register, *arguments):
    return lambda loop: register(*arguments).remove


CHANGES = {
    "hook of a parameter": lambda loop: next(loop.policy.parameters()).register_hook(lambda g: 0 * g),
    "hook after it": lambda loop: next(loop.policy.parameters()).register_post_accumulate_grad_hook(lambda p: None),
    "hook before backward": lambda loop: loop.network.register_full_backward_pre_hook(lambda *a: None),
    "hook of all modules": once(nn.modules.module.register_module_forward_hook, lambda *a: None),
    "hook of all optimisers": once(register_optimizer_step_post_hook, lambda *a: None),
    "forward of a layer": lambda loop: setattr(loop.network, "forward", lambda x: 2 * x),
    "log_prob": lambda loop: setattr(loop.policy, "log_prob", lambda *a: None),
    "step": lambda loop: setattr(loop.optimizer, "step", lambda closure: closure()),
    "a penalty on more": lambda loop: loop.policy.register_parameter("more", nn.Parameter(torch.ones(2).double())),
    "frozen, with a gradient": lambda loop: loop.freeze(),
    "a tensor for entropy_coef": lambda loop: setattr(loop, "loss", PolicyGradient(torch.tensor(0.5).double())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_be_ignored_is_done_step_by_step(change):
    class Changed(Loop):
        network = property(lambda self: self.policy.network[0])

        def freeze(self):
            last = list(self.policy.parameters())[-1]
            last.grad = last.detach().clone()
            last.requires_grad_(False)

    loop = Changed(11)
    loop.loss = PolicyGradient(l2=0.1)
    assert loop.native()
    undo = CHANGES[change](loop)
    try:
        assert not loop.native()
    finally:
        if change.endswith(("all modules", "all optimisers")):
            undo()


def test_classes_that_change_something_are_done_step_by_step():
    class Sharper(LinearGaussian):
        def log_prob(self, inputs, target):
            return 2 * super().log_prob(inputs, target)

    class Twice(Likelihood):
        def __call__(self, *arguments):
            return 2 * super().__call__(*arguments)

    class Shifted(BatchStream):
        def next(self):
            batch, seed = super().next()
            return batch._replace(inputs=batch.inputs + 1), seed

    data, loss = Batch(torch.randn(9, 2), torch.randn(9, 1)), NegativeLogLikelihood()
    policy, sharper = LinearGaussian(2, 1), Sharper(2, 1)
    sharper.load_state_dict(policy.state_dict())
    torch.testing.assert_close(loss(sharper, data), 2 * loss(policy, data))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    adam = torch.optim.Adam(policy.parameters())
    assert not native_steps(policy, Likelihood(loss), data, adam, None).ready()
    assert not adam.state
    assert native_steps(policy, Likelihood(loss), data, optimizer, None) is not None
    assert native_steps(policy, Twice(loss), data, optimizer, None) is None
    with torch.inference_mode():
        assert native_steps(policy, Likelihood(loss), data, optimizer, None) is None
    right = loss(policy, Batch(data.inputs + 1, data.target)).detach()
    close(train(policy, Likelihood(loss), Shifted(data, None, 0), optimizer, 1)[0], float(right))


class Halving(lr_scheduler.ExponentialLR):
    """And the weight decay, too."""

    def step(self, *arguments):
        super().step(*arguments)
        self.optimizer.param_groups[0]["weight_decay"] *= 0.5


SCHEDULES = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=40),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.05, step_size_up=5),
    "warmed up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 5), lr_scheduler.OneCycleLR(o, 0.05, total_steps=40)], [5]
    ),
    "its own": lambda o: Halving(o, 0.9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_schedules_of_more_than_the_rate(schedule, adam):
    ours, theirs = Loop(0), Loop(0)
    for loop in (ours, theirs):
        options = {"weight_decay": 0.1, "lr": 0.01}
        parameters = loop.policy.parameters()
        loop.optimizer = (
            torch.optim.Adam(parameters, eps=1e-3, **options) if adam
            else torch.optim.SGD(parameters, momentum=0.5, **options)
        )  # fmt: skip
        loop.options["scheduler"] = SCHEDULES[schedule](loop.optimizer)
    assert ours.native()
    close(ours.run(30), step_by_step(lambda: theirs.run(30)))
    close(ours.left(), theirs.left())


@pytest.mark.parametrize("how", ["native", "step by step", "plateau", "cyclic"])
@pytest.mark.parametrize("reward", [None, MahalanobisReward(2, "full").double()])
def test_an_ensemble_is_its_members(how, reward):
    def members():
        torch.manual_seed(0)
        policies = [MLPGaussian(3, 2, hidden=hidden).double() for hidden in ((4,), (), (20, 20))]
        data = [Batch(torch.randn(50, 3).double(), torch.randn(50, 2).double()) for _ in policies]
        optimizers = [torch.optim.Adam(policy.parameters(), lr=0.01, eps=1e-3) for policy in policies]
        kinds = {"plateau": lr_scheduler.ReduceLROnPlateau, "cyclic": SCHEDULES["cyclic"]}
        kind = kinds.get(how, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 9))
        return policies, data, optimizers, [kind(optimizer) for optimizer in optimizers]

    policies, data, optimizers, schedulers = members()
    together = lambda: train_ensemble(  # noqa: E731
        policies, reward, data, optimizers, 130, batch_size=20, seed=5, schedulers=schedulers, max_grad_norm=1.0
    )
    found = step_by_step(together) if how == "step by step" else together()
    for number, (policy, rows, optimizer, scheduler) in enumerate(zip(*members(), strict=True)):
        options = {"batch_size": 20, "seed": 5 + number, "scheduler": scheduler, "max_grad_norm": 1.0}
        if reward is None:
            right, _ = train_nll(policy, rows, optimizer, 130, **options)
        else:
            right, _ = train_policy_gradient(policy, reward, rows, optimizer, 130, **options)
        close(found[number], right)
        close([p.detach() for p in policies[number].parameters()], [p.detach() for p in policy.parameters()])
        assert schedulers[number].state_dict() == scheduler.state_dict()


def test_ensembles_refuse_what_does_not_fit():
    policies = [LinearGaussian(1, 1), LinearGaussian(1, 1)]
    data = Batch(torch.randn(5, 1), torch.randn(5, 1))
    optimizers = [torch.optim.SGD(policy.parameters(), lr=0.1) for policy in policies]
    with pytest.raises(ValueError, match="optimizers: expected one for each of 2 policies, got 1"):
        train_ensemble(policies, None, data, optimizers[:1], 3)
    with pytest.raises(ValueError, match="data: expected one for each of 2 policies, got 3"):
        train_ensemble(policies, None, [data] * 3, optimizers, 3)
    with pytest.raises(ValueError, match="steps: expected an integer"):
        train_ensemble(policies, None, data, optimizers, -1)
    with pytest.raises(TypeError, match="loss: expected a NegativeLogLikelihood without a reward, got PolicyGradient"):
        train_ensemble(policies, None, data, optimizers, 3, loss=PolicyGradient())
    with pytest.raises(ValueError, match="policies: expected parameters of their own"):
        train_ensemble(policies[:1] * 2, None, data, optimizers[:1] * 2, 3)
    assert len(train_ensemble(policies, None, data, optimizers, 0)) == 2
    assert train_ensemble([], None, data, [], 3) == []
    far = [torch.optim.SGD(policy.mean_network.parameters(), lr=1e18) for policy in policies]
    with pytest.raises(NonFiniteError, match="parameters is not finite"):
        train_ensemble(policies, None, data, far, 2)


def test_frozen_parameters_stay():
    ours, theirs = Loop(0), Loop(0)
    for loop in (ours, theirs):
        first = next(loop.policy.parameters()).requires_grad_(False)
        loop.optimizer = torch.optim.Adam(list(loop.policy.parameters()), eps=1e-3)
        before = first.clone()
    ours.run(5)
    step_by_step(lambda: theirs.run(5))
    close([p.detach() for p in ours.policy.parameters()], [p.detach() for p in theirs.policy.parameters()])
    assert torch.equal(next(ours.policy.parameters()), before)


def test_a_state_of_another_type_is_left_to_the_optimiser():
    ours, theirs = Loop(0), Loop(0)
    for loop in (ours, theirs):
        loop.optimizer = torch.optim.SGD(loop.policy.parameters(), lr=0.01, momentum=0.5)
        loop.options |= {"scheduler": None}
        step_by_step(lambda loop=loop: loop.run(2))
        for state in loop.optimizer.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].float()
    ours.run(3)
    step_by_step(lambda: theirs.run(3))
    close(ours.left(), theirs.left())


def test_a_loss_that_is_not_finite_names_its_step():
    policy, data = MLPGaussian(2, 2, std="bounded"), Batch(torch.randn(9, 2), torch.randn(9, 2))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e30)
    with pytest.raises(NonFiniteError, match=r"the loss at step [1-9] is not finite"):
        train_policy_gradient(policy, MahalanobisReward(2), data, optimizer, 50)


def test_wrong_targets_are_named_as_ever():
    policy, reward = LinearCategorical(2, 3), OneHotMahalanobisReward(3)
    data = Batch(torch.randn(5, 2), torch.tensor([0, 1, 2, 3, 0]))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"categorical_policy_loss: target: .*3"):
        train_policy_gradient(policy, reward, data, optimizer, 3)
    with pytest.raises(ValueError, match=r"categorical_policy_loss: target: .*3"):
        policy.policy_loss(*data, reward)
