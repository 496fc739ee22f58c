"""The trainer of policies of texts, against loops written by hand, enumerated optima, and runs without a break."""

import copy
import functools
import itertools
import math

import pytest
import torch
from letters import (
    PAIRS,
    SAMPLING,
    Letters,
    all_log_prob,
    completions,
    enumerated_rewards,
    letter_reward,
    table_policy,
)
from po_bilevel import NonFiniteError
from po_bilevel.callbacks import scalars
from po_bilevel.hypergradients import FisherCG, MomentMatching
from po_bilevel.language import (
    Decoder,
    Gate,
    Learning,
    Pairs,
    RewardLearner,
    Sampling,
    SequenceStep,
    SequenceTrainer,
    TokenPolicy,
)
from po_bilevel.language.rollouts import rollout
from po_bilevel.language.texts import answer_tokens, prompt_tokens
from po_bilevel.streams import RowStream

from po_kernels.ops.presets import PRESETS

BETA, MOST = 0.5, 3
SGD = functools.partial(torch.optim.SGD, lr=0.5)
HALF = Gate(lambda prompt, answer: len(answer) != 1)


def trainer(policy=None, reward=None, *, pairs=PAIRS, optimizer=SGD, **options):
    arguments = {
        "reward": reward, "coefficient": BETA, "inner_steps": 3, "num_prompts": 2, "sampling": SAMPLING,
        "max_grad_norm": None, "progress": False,
    }  # fmt: skip
    return SequenceTrainer(
        table_policy(4) if policy is None else policy, Letters(), pairs, optimizer, **(arguments | options)
    )


def decoder_policy(width=16):
    torch.manual_seed(0)
    return TokenPolicy(Decoder(3, 8, width=width, layers=1, heads=2).double(), 0)


def close(first, second, tolerance=1e-12):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_likelihood_reaches_the_distribution_of_the_answers():
    """The frequencies, from which the best policy of a table differs by nothing."""
    made = trainer(decoder_policy(), outer_pairs=PAIRS, num_prompts=100, inner_steps=150, optimizer=lambda p: (
        torch.optim.Adam(p, lr=0.02)))  # fmt: skip
    history = made.fit(3)
    every = completions(MOST)
    for prompt, answers in zip(*PAIRS, strict=True):
        p = all_log_prob(made.policy, prompt, MOST).detach().exp()
        target = torch.zeros_like(p)
        for answer in answers:
            target[every.index([*Letters().encode(answer), 0])] += 1.0 / len(answers)
        assert 0.5 * float((p - target).abs().sum()) < 0.01
    # Nats a pair: the entropy of the answers, given the prompt.
    entropy = -(3 * torch.tensor(1 / 3).log() + 2 * torch.tensor(2 / 3).log() + torch.tensor(1 / 3).log()) / 7
    assert history[-1].outer_loss == pytest.approx(float(entropy), abs=0.01)
    assert history[-1].reward_mean is None
    assert history[-1].inner_steps == 150


@pytest.mark.parametrize(
    ("make", "options", "rate", "number", "bound"),
    [
        (functools.partial(table_policy, 4, scale=0.5), {}, 0.1, 24, 0.01),
        (functools.partial(table_policy, 4, scale=0.5),
         {"preset": "dice", "options": {"kl": "k1", "kl_placement": "reward"}}, 0.1, 24, 0.01),
        (functools.partial(decoder_policy, 32), {}, 0.01, 128, 0.04),
    ],
)  # fmt: skip
def test_policy_gradient_reaches_the_tilted_reference(make, options, rate, number, bound):
    """p* ∝ p_0 e^{r/β}, in total variation, for a mean of the rewards of several answers.

    At p* all completions have the same r − β log p/p_0, so that the gradient has no noise there: what is left is how
    far the steps have come.
    """
    made = trainer(
        make(), letter_reward(), sampling=Sampling(number, MOST), num_prompts=3, inner_steps=150,
        optimizer=lambda p: torch.optim.Adam(p, lr=rate), scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(
            o, 1.0, 0.02, 150), **options)  # fmt: skip
    reference = copy.deepcopy(made.policy)
    made.fit(1)
    for prompt, answers in zip(*PAIRS, strict=True):
        tilted = all_log_prob(reference, prompt, MOST) + enumerated_rewards(made.reward, answers, MOST) / BETA
        p, right = all_log_prob(made.policy, prompt, MOST).exp(), torch.softmax(tilted, 0)
        assert 0.5 * float((p - right).detach().abs().sum()) < bound


def by_hand(policy, reward, *, steps, updates=1, gates=(), sampling=SAMPLING, advantage="loo"):
    """The loop for two prompts a step as one would write it: RLOO with the divergence in the reward.

    Returns:
        what the history tells of the last step.
    """
    stream, optimizer, reference = RowStream(3, 2, 0, drop_last=True), SGD(policy.parameters()), copy.deepcopy(policy)
    for _ in range(steps // updates):
        rows, number = stream.draw()
        with torch.no_grad():
            found = rollout(policy, Letters(), reward, PAIRS, rows.tolist(), sampling, number)
            tokens, index = found.completions.tokens, torch.arange(2).repeat_interleave(sampling.num_samples)
            old = policy(found.prompts, tokens).log_prob
            kl = (old - reference(found.prompts, tokens).log_prob).sum(dim=1)
            values = found.rewards(reward).reshape(-1)
            keep = torch.tensor([all(gate("", text) > 0 for gate in gates) for text in found.texts])
            advantages = torch.zeros_like(values)
            for prompt in (0, 1):
                of = keep & (index == prompt)
                gained = (values - BETA * kl)[of]
                if advantage == "loo" and len(gained) > 1:
                    advantages[of] = gained - (gained.sum() - gained) / (len(gained) - 1)
                elif advantage == "mean" and len(gained):
                    advantages[of] = gained - gained.mean()
            weight = (old - found.completions.log_prob - found.completions.log_support).exp().clamp(max=2.0)
        for _ in range(updates):
            new = policy(found.prompts, tokens, entropy=True)
            ratio = (new.log_prob - old).sum(dim=1).exp()
            clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            share = (weight * tokens.mask).sum(dim=1) / tokens.mask.sum(dim=1)  # of a sequence, spread over its tokens
            loss = -(clipped * share)[keep].sum() / keep.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {
        "inner_loss": float(loss.detach()), "reward_mean": float(values[keep].mean().detach()),
        "kl": float(kl[keep].mean()), "entropy": float(new.entropy.detach().sum() / tokens.mask.sum()),
        "length": float(tokens.mask.sum()) / len(keep), "kept": float(keep.double().mean()),
    }  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("make", [functools.partial(table_policy, 4), decoder_policy])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"updates": 2}, {"updates": 3}, {"gates": (HALF,)}, {"gates": (HALF,), "updates": 2}, {"advantage": "mean"},
        {"sampling": Sampling(5, MOST, None, 0.7)}, {"sampling": Sampling(4, MOST, 0.6)},
        {"sampling": Sampling(4, MOST, 2.0, 0.8), "updates": 2},
    ],
)  # fmt: skip
def test_steps_are_those_of_a_loop(make, options, accumulation):
    """Also with the batch in parts, several steps on the same completions, gates, and samplers of other laws."""
    options = dict(options)
    gates = options.pop("gates", ())
    made = trainer(make(), letter_reward(gates), inner_steps=6, accumulation=accumulation, **options)
    (done,) = made.fit(1)
    policy = make()
    expected = by_hand(policy, letter_reward(gates), steps=6, gates=gates, **options)
    close(made.policy, policy)
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), make().parameters(), strict=True))
    assert {name: getattr(done, name) for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (done.step, done.inner_steps, done.num_products) == (0, 6, 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_in_one_part_and_in_two(preset):
    """With completions that gates leave out unevenly, and off-policy in the second step on them."""
    made = [
        trainer(
            decoder_policy(), letter_reward((HALF,)), preset=preset, accumulation=parts, inner_steps=4, updates=2,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05), options={"entropy_coef": 0.01},
            sampling=Sampling(5, MOST, None, 0.9),
        )
        for parts in (1, 2)
    ]  # fmt: skip
    first, second = (each.fit(1)[0] for each in made)
    close(made[0].policy, made[1].policy, 1e-11)
    assert any(not torch.equal(a, b) for a, b in zip(
        made[0].policy.parameters(), decoder_policy().parameters(), strict=True))  # fmt: skip
    for name in ("inner_loss", "reward_mean", "kl", "entropy", "length", "kept"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-9), name


def test_what_gates_leave_out_has_no_divergence_and_no_bonus():
    """Where both are in the loss they are of the tokens that are kept, and so is the number that it is divided by."""
    made = trainer(
        decoder_policy(), letter_reward((HALF,)), preset="dapo", inner_steps=2, options={"entropy_coef": 0.1}
    )
    policy, reward, stream = decoder_policy(), letter_reward((HALF,)), RowStream(3, 2, 0, drop_last=True)
    optimizer, reference = SGD(policy.parameters()), copy.deepcopy(policy)
    for _ in range(2):
        rows, seed = stream.draw()
        found = rollout(policy, Letters(), reward, PAIRS, rows.tolist(), SAMPLING, seed)
        tokens, keep = found.completions.tokens, found.keep
        assert not keep.all()
        new, values = policy(found.prompts, tokens, entropy=True), found.rewards(reward).detach()
        advantages = torch.zeros_like(values)
        for prompt in (0, 1):
            kept = values[prompt, keep[prompt]]
            if len(kept) > 1:
                advantages[prompt, keep[prompt]] = (kept - kept.mean()) * len(kept) / (len(kept) - 1)
        less = reference(found.prompts, tokens).log_prob.detach() - new.log_prob
        mask = tokens.mask & keep.reshape(-1, 1)
        ratio = (new.log_prob - new.log_prob.detach()).exp()
        terms = -advantages.reshape(-1, 1) * ratio + BETA * (less.exp() - less - 1) - 0.1 * new.entropy
        optimizer.zero_grad()
        (terms[mask].sum() / mask.sum()).backward()
        optimizer.step()
    made.fit(1)
    close(made.policy, policy)


def test_likelihood_in_one_part_and_in_two():
    made = [trainer(decoder_policy(), num_prompts=6, accumulation=parts, outer_pairs=PAIRS) for parts in (1, 3)]
    first, second = (each.fit(1)[0] for each in made)
    close(made[0].policy, made[1].policy)
    assert first.inner_loss == pytest.approx(second.inner_loss)
    policy, stream = decoder_policy(), RowStream(7, 6, 0, drop_last=True)
    optimizer = SGD(policy.parameters())
    for _ in range(3):
        pairs = [PAIRS.each()[row] for row in stream.draw()[0].tolist()]
        answers = answer_tokens(Letters(), [answer for _, answer in pairs])
        log_prob = policy.log_prob(prompt_tokens(Letters(), [prompt for prompt, _ in pairs]), answers)
        optimizer.zero_grad()
        (-log_prob.sum() / answers.mask.sum()).backward()
        optimizer.step()
    close(made[0].policy, policy)


def test_a_reward_is_learned_at_the_policy_of_the_end():
    """Outer steps of the trainer are those of a `RewardLearner` of the next seed after its inner steps."""
    for method in (FisherCG(damping=0.05), MomentMatching()):
        reward, outer = letter_reward(), Pairs.of([("a ", "b"), ("b ", "b"), (" ", "aa")])
        learning = Learning(torch.optim.Adam(reward.parameters(), lr=0.1), method, num_samples=6)
        made = trainer(decoder_policy(), reward, learning=learning, outer_pairs=outer)
        other, policy, plain = letter_reward(), decoder_policy(), None
        learner = RewardLearner(
            policy, Letters(), other, inner=PAIRS, outer=outer, coefficient=BETA, hypergradient=method, seed=1,
            outer_optimizer=torch.optim.Adam(other.parameters(), lr=0.1), sampling=Sampling(6, MOST),
            reference=copy.deepcopy(policy),
        )  # fmt: skip
        plain = trainer(policy, other)
        for _ in range(3):
            done = made.fit(1)[-1]
            plain.fit(1)
            step = learner.step()
            close(made.policy, policy)
            close(reward, other)
            for name in ("inner_loss", "outer_loss", "gradient_norm", "num_products", "converged", "step"):
                assert getattr(done, name) == pytest.approx(getattr(step, name)), name
        assert len(made.history) == 3
        assert not torch.equal(made.history[0].reward, made.history[2].reward)


@pytest.mark.parametrize(("policy", "of_reward"), list(itertools.product(
    (torch.float64, torch.float32, torch.bfloat16), (torch.float64, torch.float32))))  # fmt: skip
@pytest.mark.parametrize("method", [FisherCG(damping=0.5, max_iterations=5), MomentMatching()])
def test_a_reward_may_be_of_another_dtype_than_the_policy(policy, of_reward, method):
    """As one is whose U was computed in double precision."""
    reward = letter_reward((HALF,)).to(of_reward)
    learning = Learning(torch.optim.SGD(reward.parameters(), lr=0.1), method, num_samples=6)
    made = trainer(decoder_policy().to(policy), reward, learning=learning, outer_pairs=PAIRS)
    done = made.fit(2)[-1]
    assert done.gradient_norm > 0
    assert done.reward.dtype == reward.matrix.raw.dtype == of_reward


def test_samples_are_of_the_policy_in_evaluation_mode():
    """Dropout belongs to the step, not to what is sampled, compared with the reference and rewarded."""

    class Dropping(Decoder):
        def forward(self, ids, mask):
            return torch.nn.functional.dropout(super().forward(ids, mask), 0.5, self.training)

        def extend(self, ids, mask, cache=None):
            hidden, cache = super().extend(ids, mask, cache)
            return torch.nn.functional.dropout(hidden, 0.5, self.training), cache

    torch.manual_seed(0)
    policy = TokenPolicy(Dropping(3, 8, width=16, layers=1, heads=2).double(), 0)
    made = trainer(policy, letter_reward(), inner_steps=1, num_prompts=3)
    # The reference is the policy as it is: of what both sample with, the divergence is nothing.
    assert made.fit(1)[0].kl == pytest.approx(0.0, abs=1e-12)
    assert policy.training


def test_callbacks_stop_and_are_told():
    told = []
    made = trainer(reward=letter_reward())
    made.fit(5, callback=[told.append, lambda step: step.step == 1])
    assert [step.step for step in told] == [0, 1]
    assert made.history == told
    assert made.history[0].outer_loss != made.history[0].outer_loss  # nan without outer pairs


def test_a_loss_that_is_no_number_stops_and_names_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    for reward in (None, letter_reward()):
        made = trainer(decoder_policy(), reward, checkpoint=path)
        made.fit(2)
        before = path.read_bytes()
        made._optimizer.param_groups[0]["lr"] = float("inf")
        with pytest.raises(NonFiniteError, match=r"outer step 2: the .* inner step 0 .*run\.pt, after 2 outer steps"):
            made.fit(2)
        assert path.read_bytes() == before
        assert len(made.history) == 2


def test_bad_input():
    reward, outer = letter_reward(), PAIRS
    learning = Learning(torch.optim.SGD(reward.parameters(), lr=0.1))
    frozen = letter_reward()
    frozen.requires_grad_(False)
    for options, message in (
        ({"reward": reward, "learning": learning, "outer_pairs": outer, "advantage": "standardized"}, "'loo'.*scale"),
        ({"reward": reward, "learning": learning}, "learning: expected a reward, outer_pairs and a positive"),
        ({"reward": reward, "learning": learning, "outer_pairs": outer, "coefficient": 0.0}, "learning: expected"),
        ({"learning": learning, "outer_pairs": outer}, "learning: expected a reward"),
        ({"reward": frozen, "learning": learning, "outer_pairs": outer}, "expected parameters that require grad"),
        ({"reward": reward, "learning": learning._replace(num_prompts=0), "outer_pairs": outer}, "num_prompts: exp"),
        ({"num_prompts": 3, "accumulation": 2}, "accumulation: expected parts of equal size of 3 prompts, got 2"),
        ({"inner_steps": 0}, "inner_steps: expected an integer of at least 1, got 0"),
        ({"updates": 0}, "updates: expected an integer of at least 1, got 0"),
        ({"num_prompts": 0}, "num_prompts: expected an integer of at least 1, got 0"),
        ({"coefficient": -0.1}, "coefficient: expected a finite number of at least 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a positive number"),
        ({"preset": "grpp"}, "policy_loss_preset: name: expected one of"),
        ({"checkpoint": "/absent/run.pt"}, "checkpoint: expected a file in a folder that exists"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: expected one that takes a gradient at a time, got LBFGS"),
        ({"options": {"clip": 0.2}}, "options: expected None without a reward"),
        ({"reference": table_policy()}, "reference: expected None without a reward"),
        ({"reward": reward, "reference": table_policy(), "coefficient": 0.0}, "a reference only with a positive coeff"),
        ({"reward": reward, "options": {"kl_coef": 1.0, "mask": 1}}, "options: expected others .* got mask, kl_coef"),
        ({"reward": reward, "options": {"kl": "k4"}}, "kl: expected one of .*got 'k4'"),
        ({"reward": reward, "advantage": "best"}, "expected one of .*'loo'.*got 'best'"),
        ({"reward": reward, "sampling": Sampling(1, MOST)}, "group_advantage: .*at least 2"),
        ({"reward": reward, "sampling": Sampling(4, MOST, 0.0)}, "sampling: expected a temperature above 0"),
        (
            {"reward": reward, "learning": learning, "outer_pairs": outer, "advantage": "min"},
            "advantage: expected 'loo', 'mean' or 'none' where a reward is learned, got 'min'$",
        ),
        ({"reward": reward, "learning": learning._replace(num_samples=1), "outer_pairs": outer}, "at least 2 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(**options)
    for options, message in (
        ({"reward": reward, "options": {"clipp": 0.2}}, "'clipp'"),
        ({"policy": table_policy().model}, "policy: expected a TokenPolicy, got Table"),
        ({"pairs": PAIRS.each()}, "pairs: expected Pairs, got list"),
        ({"pairs": None}, "pairs: expected Pairs, got NoneType"),
        ({"outer_pairs": PAIRS.each()}, "outer_pairs: expected Pairs, got list"),
        ({"reward": len}, "reward: expected TextReward, got builtin_function"),
    ):
        with pytest.raises(TypeError, match=message):
            trainer(**options)
    with pytest.raises(ValueError, match=r"completions: expected fewer tokens than the model's context of 8"):
        trainer(decoder_policy(), reward, sampling=Sampling(4, 9)).fit(1)
    for made in (trainer(), trainer(reward=reward)):
        with pytest.raises(ValueError, match="keep_best: expected False where no reward is learned"):
            made.fit(1, keep_best=True)


@pytest.mark.parametrize("same", [True, False])
def test_a_reference_of_the_policys_parameters_is_a_copy_of_it(same):
    policy = decoder_policy()
    reference = policy if same else TokenPolicy(policy.model, 0, temperature=2.0)
    made = trainer(policy, letter_reward(), reference=reference, num_prompts=3)
    assert made.fit(2)[-1].kl != 0.0
    assert all(p.requires_grad for p in policy.parameters())


def test_a_reward_is_learned_without_a_baseline():
    reward = letter_reward()
    learning = Learning(torch.optim.SGD(reward.parameters(), lr=0.1))
    assert trainer(None, reward, learning=learning, outer_pairs=PAIRS, advantage="none").fit(1)[0].gradient_norm > 0


def test_the_reward_of_nothing_is_not_zero():
    step = trainer(None, letter_reward((Gate(lambda prompt, answer: False),))).fit(1)[0]
    assert step.kept == 0.0
    assert math.isnan(step.reward_mean)


def test_trackers_are_given_what_a_step_of_texts_tells():
    step = SequenceStep(
        step=3, inner_loss=1.0, outer_loss=math.nan, inner_steps=2, reward=torch.tensor([4.0, 5.0]), reward_norm=1.0,
        gradient_norm=0.5, residual_norm=None, num_products=0, converged=None, negative_curvature=False, problems=(),
        reward_mean=-1.5, kl=0.25, entropy=None,
    )  # fmt: skip
    assert scalars(step) == {
        "inner_loss": 1.0, "inner_steps": 2.0, "gradient_norm": 0.5, "num_products": 0.0, "negative_curvature": 0.0,
        "reward_mean": -1.5, "kl": 0.25, "reward/0": 4.0, "reward/1": 5.0,
    }  # fmt: skip
