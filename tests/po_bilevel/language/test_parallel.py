"""Two processes by gloo take the steps of one that has both parts of the batch."""

import functools
import itertools

import pytest
import torch
import two_processes
from letters import Letters, letter_reward
from po_bilevel.hypergradients import FisherCG, MomentMatching
from po_bilevel.language import Decoder, Gate, Learning, Pairs, Sampling, SequenceTrainer, TokenPolicy

WORDS = ["a", "b", "aa", "ab", "ba", "bb"]
PROMPTS = ["".join(prompt) + " " for prompt in itertools.product("ab", repeat=2)] + ["a ", "b "]
# One, two and three answers of each, so that processes have other numbers of pairs.
PAIRS = Pairs.of(
    (prompt, WORDS[(7 * row + 2 * k) % 6]) for row, prompt in enumerate(PROMPTS) for k in range(1 + row % 3)
)
OUTER = Pairs.of((prompt, WORDS[(row + k) % 6]) for row, prompt in enumerate(PROMPTS) for k in range(1 + (row + 1) % 3))
UNEVEN = (
    Gate(lambda prompt, answer: prompt[0] == "a" and len(answer) != 1),
    Gate(lambda prompt, answer: 0.5 if "b" in answer else 1.0, "multiply"),
)
NOTHING = (Gate(lambda prompt, answer: False),)
PLATEAU = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.0, factor=0.5)
FISHER, MOMENTS = FisherCG(damping=0.5, tolerance=1e-12), MomentMatching()


def made(policy, *, gates=None, method=None, path=None, numbers=(), **options):
    reward = None if gates is None else letter_reward(gates)
    if method is not None:
        numbers = {"num_samples": 6, "num_prompts": 4, "outer_rows": 6} | dict(numbers)
        options["learning"] = Learning(torch.optim.Adam(reward.parameters(), lr=0.1), method, **numbers)
    arguments = {
        "reward": reward, "outer_pairs": OUTER, "inner_steps": 2, "num_prompts": 4, "sampling": Sampling(5, 3),
        "progress": False, "coefficient": 0.5, "checkpoint": path, "max_grad_norm": 0.5,
    }  # fmt: skip
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    return SequenceTrainer(policy, Letters(), PAIRS, sgd, **(arguments | options))


CASES = {
    "likelihood": {},
    "reward": {"gates": ()},
    "gates": {"gates": UNEVEN, "updates": 2},
    "grpo": {"gates": UNEVEN, "preset": "grpo", "options": {"entropy_coef": 0.01}},
    "dr_grpo": {"gates": UNEVEN, "preset": "dr_grpo", "sampling": Sampling(3, 5)},
    "dapo": {"gates": UNEVEN, "preset": "dapo"},
    "sum": {"gates": UNEVEN, "preset": "dapo", "options": {"aggregation": "token_sum"}},
    "top_p": {"gates": (), "sampling": Sampling(5, 3, 0.7, 0.8)},
    "plateau": {"inner_steps": 6, "scheduler": PLATEAU},
    "nothing": {"gates": NOTHING},
    "fisher": {"gates": (), "method": FISHER},
    "fisher, gates": {"gates": UNEVEN, "method": FISHER},
    "fisher, nothing": {"gates": NOTHING, "method": FISHER},
    "moments": {"gates": (), "method": MOMENTS},
    "moments, gates": {"gates": UNEVEN, "method": MOMENTS},
}
REFUSED = {
    "num_prompts": {"num_prompts": 3},
    "learning": {"gates": (), "method": FISHER, "numbers": {"num_prompts": 3}},
    "outer_rows": {"gates": (), "method": FISHER, "numbers": {"outer_rows": 5}},
    "accumulation": {"num_prompts": 2, "accumulation": 2},
}
TOLD = ("inner_loss", "outer_loss", "gradient_norm", "reward_mean", "kl", "entropy", "length", "kept", "num_products")


PARTS = [(name, 1) for name in CASES] + [(name, 2) for name in ("likelihood", "gates", "dapo", "moments, gates")]


def policy():
    torch.manual_seed(0)
    return TokenPolicy(Decoder(3, 8, width=16, layers=1, heads=2).double(), 0)


def results(wrap, barrier, path):
    """What each case ends at, with one part and with two; and after a checkpoint."""
    found = {}
    for name, accumulation in PARTS:
        trainer = made(wrap(policy()), accumulation=accumulation, **CASES[name])
        found[f"{name}, {accumulation}"] = ended(trainer, trainer.fit(2))
    for name in ("reward", "fisher, gates"):
        made(wrap(policy()), path=path, **CASES[name]).fit(1)
        barrier()
        trainer = made(wrap(policy()), **CASES[name])
        trainer.resume(path)
        found[f"{name}, resumed"] = ended(trainer, trainer.fit(1))
        barrier()
    return found | {"refused": refusals(wrap)}


def ended(trainer, history):
    reward = [] if trainer.reward is None else [p.detach() for p in trainer.reward.parameters()]
    told = [{name: getattr(step, name) for name in TOLD} for step in history]
    return [p.detach() for p in trainer.policy.parameters()] + reward, told


def refusals(wrap):
    found = {}
    for name, options in REFUSED.items():
        try:
            made(wrap(policy()), **options)
            found[name] = "nothing"
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("parallel")
    return two_processes.run(__file__, folder, lambda: results(lambda x: x, lambda: None, folder / "alone.pt"))


@pytest.mark.parametrize(
    "name", [*(f"{name}, {parts}" for name, parts in PARTS), "reward, resumed", "fisher, gates, resumed"]
)
def test_the_same_as_one_process(both, name):
    alone, *each = both
    parameters, told = alone[name]
    start = list(policy().parameters())
    if "nothing" not in name:
        assert any(not torch.equal(a, b) for a, b in zip(start, parameters, strict=False))
    for found in each:
        for a, b in zip(found[name][0], parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for step, right in zip(found[name][1], told, strict=True):
            for key, value in right.items():
                near = None if value is None else pytest.approx(value, rel=1e-8, abs=1e-10, nan_ok=True)
                assert step[key] == near, key
    # To the bit with each other: they would drift apart.
    for a, b in zip(each[0][name][0], each[1][name][0], strict=True):
        assert torch.equal(a, b)


def test_numbers_that_cannot_be_shared_out_are_refused(both):
    for said in [found["refused"] for found in both[1:]]:
        assert said["num_prompts"] == "num_prompts: expected a multiple of 2 processes, got 3"
        assert said["learning"] == "RewardLearner: num_prompts: expected a multiple of 2 processes, got 3"
        assert said["outer_rows"] == "RewardLearner: outer_rows: expected a multiple of 2 processes, got 5"
        assert "accumulation: expected parts of equal size of 1 prompts, got 2" in said["accumulation"]
