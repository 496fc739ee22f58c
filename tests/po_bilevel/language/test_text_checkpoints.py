"""Runs of texts that go on to the bit, also after they were killed, and what autograd holds meanwhile."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from letters import PAIRS, SAMPLING, Letters, letter_reward, table_policy
from po_bilevel import UsageError
from po_bilevel.hypergradients import FisherCG, MomentMatching
from po_bilevel.language import Decoder, Learning, Pairs, RewardLearner, Sampling, SequenceTrainer, TokenPolicy
from problems import graphs_held

OUTER = Pairs.of([("a ", "b"), ("b ", "b"), (" ", "aa"), (" ", "b")])
KINDS = ("likelihood", "reward", "fisher", "moments")


def run(kind, start=0, **options):
    """A run with all that has a state: Adam, a schedule, samples, prompts, and Adam of the reward with a warm start."""
    torch.manual_seed(start)
    policy = TokenPolicy(Decoder(3, 8, width=16, layers=1, heads=2), 0)
    reward = None if kind == "likelihood" else letter_reward().float()
    if kind in ("fisher", "moments"):
        method = FisherCG(damping=0.05) if kind == "fisher" else MomentMatching()
        adam = torch.optim.Adam(reward.parameters(), lr=0.1)
        options = {"learning": Learning(adam, method, num_samples=6, num_prompts=2, outer_rows=3)} | options
    arguments = {
        "reward": reward, "outer_pairs": OUTER, "inner_steps": 3, "num_prompts": 2, "sampling": SAMPLING, "updates": 2,
        "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9), "progress": False, "coefficient": 0.5,
    }  # fmt: skip
    adam = lambda p: torch.optim.Adam(p, lr=0.05)  # noqa: E731
    return SequenceTrainer(policy, Letters(), PAIRS, adam, **(arguments | options))


def same_steps(first, second):
    for a, b in zip(first, second, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other), name
            else:
                assert value == other or (math.isnan(value) and math.isnan(other)), name


def same_bits(first, second):
    same_steps(first.history, second.history)
    for part in ("policy", "reward"):
        if getattr(first, part) is not None:
            for a, b in zip(getattr(first, part).parameters(), getattr(second, part).parameters(), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_and_two_more_are_four(kind, tmp_path):
    path = tmp_path / "run.pt"
    whole = run(kind)
    whole.fit(4)
    first = run(kind, checkpoint=path)
    first.fit(2)
    again = run(kind, start=1, checkpoint=path)  # other parameters to begin with, and another reference
    same_steps(again.resume(path), first.history)
    again.fit(2)
    same_bits(whole, again)
    told = again.history[3]
    for name in ("reward_mean", "kl", "entropy", "length", "kept"):
        value = getattr(told, name)
        assert value is None if kind == "likelihood" else math.isfinite(value), name
    assert (told.reward is None) == (kind == "likelihood")
    assert torch.equal(told.reward, whole.history[0].reward) if kind == "reward" else True
    if kind in ("fisher", "moments"):
        assert not torch.equal(told.reward, again.history[2].reward)
        assert (told.num_products > 0) == (kind == "fisher")


WORKER = """
import sys
sys.path[:0] = [{here!r}, {above!r}]
import torch
torch.set_num_threads(1)
from test_text_checkpoints import run
made = run("fisher", checkpoint={path!r})
if {resume}:
    made.resume({path!r})
made.fit({steps}, lambda step: print("step", step.step, flush=True))
torch.save([made.policy.state_dict(), made.reward.state_dict()], {path!r} + ".end")
"""


def started(path, steps, *, resume=False):
    here = Path(__file__).parent
    code = WORKER.format(here=str(here), above=str(here.parent), path=str(path), resume=resume, steps=steps)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_run_ends_at_the_same_bits(tmp_path):
    """Killed somewhere after its third step, in the middle of one or of a checkpoint; resumed in a new process."""
    path = tmp_path / "run.pt"
    process = started(path, 10_000)
    try:
        for line in process.stdout:
            if line == "step 2\n":
                break
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
        process.stdout.close()
    whole = run("fisher")
    found = run("fisher", start=1)
    done = len(found.resume(path))
    assert done >= 2
    resumed = started(path, 2, resume=True)
    assert resumed.wait(timeout=120) == 0
    resumed.stdout.close()
    whole.fit(done + 2)
    policy, reward = torch.load(f"{path}.end")
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, policy[name]), name
    assert torch.equal(whole.reward.matrix.raw, reward["matrix.raw"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": 0.4}, "steps was"),
        ({"inner_steps": 4}, "steps was"),
        ({"sampling": Sampling(5, 3)}, r"sampling was \(4, 3, None, 1.0\) and is \(5, 3"),
        ({"sampling": SAMPLING._replace(top_p=0.9)}, r"sampling was"),
        ({"preset": "grpo"}, "options was"),
        ({"options": {"entropy_coef": 0.1}}, "options was"),
        ({"outer_pairs": PAIRS}, "outer_pairs was"),
        ({"advantage": "mean"}, "advantage was 'loo' and is 'mean'"),
        ({"seed": 1}, "steps was"),
        ({"learning": None}, "learning was"),
        ({"scheduler": None}, "scheduler was"),
        ({"accumulation": 2}, "steps was"),
    ],
)
def test_changed_arguments_are_named(options, message, tmp_path):
    path = tmp_path / "run.pt"
    run("fisher", checkpoint=path).fit(1)
    made = run("fisher", **options)
    before = [p.detach().clone() for p in made.policy.parameters()]
    with pytest.raises(UsageError, match=message):
        made.resume(path)
    assert made.history == []
    assert all(torch.equal(a, b) for a, b in zip(before, made.policy.parameters(), strict=True))


def test_other_texts_rewards_and_policies_are_named(tmp_path):
    path = tmp_path / "run.pt"
    run("reward", checkpoint=path).fit(1)
    made = run("reward")
    pairs = Pairs(PAIRS.prompts, (*PAIRS.answers[:-1], ("bb",)))

    class Other(Letters):
        def encode(self, text):
            return [" ba".index(letter) for letter in text]

    for policy, reward, data, message in (
        (made.policy, made.reward, pairs, "pairs was"),
        (TokenPolicy(made.policy.model, 0, temperature=0.5), made.reward, PAIRS, "policy was .*temperature=1.0.* is "),
        (TokenPolicy(made.policy.model, 1), made.reward, PAIRS, "policy was .*end=0.* is .*end=1"),
        (TokenPolicy(Decoder(3, 8, width=16, layers=1, heads=4), 0), made.reward, PAIRS, "policy was .*heads=2"),
        (TokenPolicy(Decoder(3, 8, width=16, layers=2, heads=2), 0), made.reward, PAIRS, "policy"),
        (made.policy, None, PAIRS, "reward was"),
        (made.policy, made.reward, PAIRS, "tokens was"),
    ):
        other = SequenceTrainer(
            policy, Other() if message == "tokens was" else Letters(), data,
            lambda p: torch.optim.Adam(p, lr=0.05), reward=reward, outer_pairs=OUTER,
            inner_steps=3, num_prompts=2, sampling=SAMPLING, updates=2, progress=False, coefficient=0.5,
            scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        )  # fmt: skip
        with pytest.raises(UsageError, match=message):
            other.resume(path)


def test_memory_does_not_grow_with_products():
    """The bytes that autograd graphs hold at once while a hypergradient of K products is taken, for two K."""
    peaks, products = [], []
    for most in (2, 20):
        policy, reward = table_policy(4), letter_reward()
        learner = RewardLearner(
            policy, Letters(), reward, inner=PAIRS, outer=OUTER, coefficient=0.5, sampling=Sampling(16, 3),
            outer_optimizer=torch.optim.SGD(reward.parameters(), lr=0.1),
            hypergradient=FisherCG(damping=1e-4, tolerance=1e-14, max_iterations=most - 1),
        )  # fmt: skip
        with graphs_held() as held:
            products.append(learner.evaluate().num_products)
        peaks.append(held[1])
    assert products[0] == 2
    assert products[1] >= 15
    assert peaks[0] == peaks[1] > 0
