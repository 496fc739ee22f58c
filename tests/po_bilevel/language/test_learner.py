"""Hypergradients of a reward of texts, against enumeration of all completions and against dense linear algebra."""

import copy
import itertools

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
    set_to,
    table_policy,
)
from po_bilevel.hypergradients import FisherCG, ImplicitCG, MomentMatching
from po_bilevel.language import Decoder, Gate, Pairs, RewardLearner, Sampling, TokenPolicy
from po_bilevel.language.learner import nll
from po_bilevel.language.rollouts import rollout
from po_bilevel.language.texts import prompt_tokens

BETA, MOST = 0.5, 3
# With prompts that PAIRS has, in another order, and one that it has not; several answers, one of them twice.
OUTER = Pairs.of(
    [("b ", "ba"), ("a ", "b"), ("a ", "bb"), ("b ", "b"), ("  ", "a"), ("a ", "b"), (" ", "aa"), ("a ", "ab")]
)
SHARED = Pairs.of(pair for pair in OUTER.each() if pair[0] != "  ")


def learner(policy=None, reward=None, *, inner=PAIRS, outer=OUTER, rate=0.1, **options):
    policy = table_policy(4) if policy is None else policy
    reward = letter_reward() if reward is None else reward
    arguments = {
        "coefficient": BETA, "sampling": SAMPLING, "num_prompts": None, "outer_rows": None,
        "outer_optimizer": torch.optim.SGD(reward.parameters(), lr=rate),
    }  # fmt: skip
    return RewardLearner(policy, Letters(), reward, inner=inner, outer=outer, **(arguments | options))


def at_its_optimum(inner, outer):
    """A policy at p* ∝ p_0 exp(r/β) for each prompt, its reference, its reward, and F and dF/dφ where p* is known."""
    reference, policy, reward = table_policy(7, scale=0.5), table_policy(7), letter_reward()
    total, every = 0.0, [Letters().decode(ids) if ids[-1] == 0 else None for ids in completions(MOST)]
    for prompt, answers in zip(*inner, strict=True):
        base = all_log_prob(reference, prompt, MOST).detach()
        optimum = torch.log_softmax(base + enumerated_rewards(reward, answers, MOST) / BETA, 0)
        set_to(policy, prompt, optimum, MOST)
        torch.testing.assert_close(all_log_prob(policy, prompt, MOST), optimum.detach())
        wanted = dict(zip(*outer, strict=True))[prompt]
        total = total - sum(optimum[every.index(answer)] for answer in wanted) / outer.number
    (exact,) = torch.autograd.grad(total, list(reward.parameters()))
    return policy, reference, reward, exact, float(total.detach())


def test_rewards_of_several_answers_are_their_mean():
    policy, reward = table_policy(4), letter_reward()
    rows = [2, 0]
    found = rollout(policy, Letters(), reward, PAIRS, rows, Sampling(6, MOST), seed=3)
    rewards = found.rewards(reward)
    assert rewards.shape == (2, 6)
    assert found.texts == [Letters().decode(ids) for ids in found.completions.tokens.lists()]
    for number, row in enumerate(rows):
        by_text = enumerated_rewards(reward, PAIRS.answers[row], MOST)
        for ids, value in zip(found.completions.tokens.lists()[6 * number :], rewards[number], strict=False):
            torch.testing.assert_close(value, by_text[completions(MOST).index(ids)])


def sixteen_prompts(seed):
    """Two or three answers of each, any of those of one letter or two."""
    generator = torch.Generator().manual_seed(seed)
    number = lambda most: int(torch.randint(most, (), generator=generator))  # noqa: E731
    answers = ["".join(word) for size in (1, 2) for word in itertools.product("ab", repeat=size)]
    return Pairs.of(
        ("".join(prompt) + " ", answers[number(6)])
        for prompt in itertools.product("ab", repeat=4)
        for _ in range(2 + number(2))
    )


@pytest.mark.parametrize(
    ("method", "single", "together"),
    [(FisherCG(damping=5e-4, max_iterations=300), 0.98, 0.98), (MomentMatching(), 0.99, 0.999)],
)
def test_samples_point_along_the_exact_hypergradient(method, single, together):
    """64 completions of each prompt. Means of moments are within five of their standard errors; they have no bias."""
    inner, outer = sixteen_prompts(0), sixteen_prompts(1)
    policy, reference, reward, exact, outer_loss = at_its_optimum(inner, outer)
    made = learner(
        policy, reward, inner=inner, outer=outer, hypergradient=method, sampling=Sampling(64, MOST),
        reference=reference,
    )  # fmt: skip
    results = [made.evaluate() for _ in range(8)]
    gradients = torch.stack([result.gradient[0] for result in results])
    assert float(torch.cosine_similarity(gradients, exact[None], dim=1).median()) >= single
    assert float(torch.cosine_similarity(gradients.mean(dim=0), exact, dim=0)) >= together
    assert all(result.problems == () for result in results)
    assert all(result.outer_loss == pytest.approx(outer_loss) for result in results)
    if isinstance(method, MomentMatching):
        assert ((gradients.mean(dim=0) - exact).abs() <= 5 * gradients.std(dim=0) / len(results) ** 0.5).all()


GATES = {
    "none": (),
    "mask": (Gate(lambda prompt, answer: len(answer) != 2),),
    "multiply": (Gate(lambda prompt, answer: 0.25 if "b" in answer else 1.0, "multiply"),),
    "both": (Gate(lambda prompt, answer: prompt != "b " or "a" in answer),
             Gate(lambda prompt, answer: 0.5 * ("a" in answer), "multiply")),
}  # fmt: skip


def drawn(made, rows):
    """The completions of the next evaluation, by another copy of its stream; the rewards, and which are kept."""
    stream = copy.deepcopy(made._prompts)
    order, seed = stream.draw()
    assert sorted(order.tolist()) == sorted(rows)
    found = rollout(made.policy, Letters(), made.reward, made._inner, order.tolist(), made._sampling, seed)
    return order.tolist(), found


def rewards_by_hand(reward, found, answers, gates):
    """(G,) of a prompt's completions, and which are kept: m + f (r − m) with m the least reward of what is kept."""
    values, keep, factor = [], [], []
    for ids, text, prompt in found:
        by_text = enumerated_rewards(reward, answers, MOST)
        values.append(by_text[completions(MOST).index(ids)])
        keep.append(all(g(prompt, text) > 0 for g in gates if g.mode == "mask"))
        factor.append(torch.tensor([g(prompt, text) for g in gates if g.mode == "multiply"]).prod().double())
    values, factor, keep = torch.stack(values), torch.stack(factor), torch.tensor(keep)
    if keep.any():
        least = values[keep].min()
        values = least + factor * (values - least)
    return values, keep


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("kind", "rows"), [("table", None), ("table", 2), ("decoder", 2)])
def test_fisher_against_dense_algebra(gates, kind, rows):
    """(β Σ w ∇S ∇Sᵀ + δ) v = ∇F, and Σ w ∂A/∂φ ⟨∇S, v⟩ of what the gates keep, A = r less the mean of the others."""
    policy, reward, damping = table_policy(4, seed=1), letter_reward(GATES[gates]), 0.05
    if kind == "decoder":  # of two tensors that are learned, one of which is the head too, and others that are not
        policy = TokenPolicy(Decoder(3, 8, width=8, layers=1, heads=2).double(), 0)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(name.endswith(("embedding.weight", "out.weight")))
    made = learner(
        policy, reward, hypergradient=FisherCG(damping, 1e-12, 400), num_prompts=rows, sampling=Sampling(8, MOST)
    )  # fmt: skip
    order = copy.deepcopy(made._prompts).draw()[0].tolist()
    assert len(order) == (rows or 3)
    _, found = drawn(made, order)
    texts = list(zip(found.completions.tokens.lists(), found.texts, strict=True))
    log_prob, advantages = [], []
    for number, row in enumerate(order):
        prompt = PAIRS.prompts[row]
        group = [(ids, text, prompt) for ids, text in texts[8 * number : 8 * number + 8]]
        rewards, keep = rewards_by_hand(reward, group, PAIRS.answers[row], GATES[gates])
        rewards = rewards[keep]
        if len(rewards) > 1:
            advantages.append(rewards - (rewards.sum() - rewards) / (len(rewards) - 1))
        else:
            advantages.append(0.0 * rewards)
        lp = policy.log_prob(prompt_tokens(Letters(), [prompt]), found.completions.tokens.rows(
            torch.arange(8 * number, 8 * number + 8)))  # fmt: skip
        log_prob.append(lp[keep])
    log_prob, advantages = torch.cat(log_prob), torch.cat(advantages)
    if gates in ("mask", "both"):
        assert len(log_prob) < 8 * len(order)
    theta = [p for p in policy.parameters() if p.requires_grad]
    outer = nll(policy, Letters(), OUTER.each())()

    def gradient(x):
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(x, theta, retain_graph=True)])

    right, scores = gradient(outer), torch.stack([gradient(each) for each in log_prob])
    fisher = BETA * scores.mT @ scores / len(scores) + damping * torch.eye(len(right)).double()
    credit = scores @ torch.linalg.solve(fisher, right)
    (expected,) = torch.autograd.grad((advantages * credit).sum() / len(scores), list(reward.parameters()))
    result = made.evaluate()
    torch.testing.assert_close(result.gradient[0], expected, rtol=1e-9, atol=1e-12)
    assert result.outer_loss == pytest.approx(float(outer.detach()))
    assert result.converged


@pytest.mark.parametrize("gates", GATES)
def test_moments_by_hand(gates):
    """A prompt counts as often as it has pairs; of its completions those that are kept, all alike.

    The data's own answers pass all gates. Prompts that one of both has not are left out, and the outer loss is the mean
    over the pairs of the others.
    """
    policy, reward = table_policy(4, seed=1), letter_reward(GATES[gates])
    made = learner(policy, reward, hypergradient=MomentMatching(), sampling=Sampling(5, MOST))
    order, found = drawn(made, range(3))
    texts = list(zip(found.completions.tokens.lists(), found.texts, strict=True))
    data, sampled, count = 0.0, 0.0, 0
    for number, row in enumerate(order):
        prompt, answers = PAIRS.prompts[row], PAIRS.answers[row]
        group = [(ids, text, prompt) for ids, text in texts[5 * number : 5 * number + 5]]
        rewards, keep = rewards_by_hand(reward, group, answers, GATES[gates])
        wanted = dict(zip(*OUTER, strict=True))[prompt]
        if not keep.any():
            continue  # nothing is known of what the policy does there
        by_text = enumerated_rewards(reward, answers, MOST)
        data = data + sum(by_text[completions(MOST).index([*Letters().encode(a), 0])] for a in wanted)
        sampled = sampled + len(wanted) * rewards[keep].mean()
        count += len(wanted)
    (expected,) = torch.autograd.grad(-(data - sampled) / (BETA * count), list(reward.parameters()))
    result = made.evaluate()
    torch.testing.assert_close(result.gradient[0], expected, rtol=1e-10, atol=1e-12)
    assert result.outer_loss == pytest.approx(float(nll(policy, Letters(), SHARED.each())().detach()))


@pytest.mark.parametrize("method", [FisherCG(damping=0.05), MomentMatching()])
def test_what_gates_leave_nothing_of(method):
    """Of a prompt: it tells nothing. Of all: there is no direction, and the reward stays."""
    only_a = Gate(lambda prompt, answer: prompt == "a ")
    reward = letter_reward((only_a,))
    made = learner(reward=reward, hypergradient=method, sampling=Sampling(6, MOST))
    alone = learner(
        reward=letter_reward(), hypergradient=method, sampling=Sampling(6, MOST),
        inner=Pairs.of(pair for pair in PAIRS.each() if pair[0] == "a "),
    )  # fmt: skip
    found, expected = made.evaluate(), alone.evaluate()
    assert found.gradient[0].isfinite().all()
    assert found.gradient[0].any()
    assert expected.gradient[0].any()
    nothing = learner(reward=letter_reward((Gate(lambda prompt, answer: False),)), hypergradient=method)
    before = nothing.reward.precision().detach().clone()
    done = nothing.step()
    assert done.gradient_norm == 0.0
    assert done.problems == ()
    assert torch.equal(nothing.reward.precision().detach(), before)


def test_steps_lower_the_outer_loss_of_the_optimum():
    """Fifty steps, each at the policy that is optimal for the reward of then: the reward learns to rank the data."""
    policy, reference, reward, *_ = at_its_optimum(PAIRS, SHARED)
    made = learner(
        policy, reward, outer=SHARED, hypergradient=MomentMatching(), sampling=Sampling(64, MOST), rate=0.3,
        reference=reference,
    )  # fmt: skip
    losses = []
    for _ in range(50):
        for prompt, answers in zip(*PAIRS, strict=True):
            base = all_log_prob(reference, prompt, MOST).detach()
            set_to(policy, prompt, torch.log_softmax(base + enumerated_rewards(reward, answers, MOST) / BETA, 0), MOST)
        losses.append(made.step())
    assert [step.step for step in losses] == list(range(50))
    assert losses[-1].outer_loss < losses[0].outer_loss - 0.05
    assert losses[-1].inner_steps == 0
    assert torch.equal(losses[0].reward, letter_reward().shown())


def test_bad_input():
    for options, error, message in (
        ({"hypergradient": ImplicitCG()}, TypeError, "hypergradient: expected FisherCG or MomentMatching, got Implic"),
        ({"sampling": Sampling(4, 3, 0.5)}, ValueError, "sampling: expected the policy's own temperature and top_p 1"),
        ({"sampling": Sampling(4, 3, None, 0.9)}, ValueError, "sampling: expected the policy's own temperature"),
        ({"sampling": Sampling(1, 3)}, ValueError, "sampling: expected at least 2 samples of a prompt, .*got 1"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm: expected a positive number or None, got 0.0"),
        ({"num_prompts": 0}, ValueError, "num_prompts: expected an integer of at least 1, got 0"),
        ({"outer_rows": 0}, ValueError, "outer_rows: expected an integer of at least 1, got 0"),
        ({"coefficient": 0.0}, ValueError, "coefficient: expected a finite positive number, got 0"),
        ({"hypergradient": MomentMatching(), "outer": Pairs.of([("  ", "a")])}, ValueError, "got none; use FisherCG"),
        ({"outer_optimizer": torch.optim.SGD(table_policy().parameters())}, ValueError, "lacks matrix.raw"),
        ({"policy": table_policy().model}, TypeError, "policy: expected a TokenPolicy, got Table"),
    ):
        with pytest.raises(error, match=message):
            learner(**options)
    frozen = letter_reward()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="reward: expected parameters that require grad, got none to learn"):
        learner(reward=frozen, outer_optimizer=torch.optim.SGD(table_policy().parameters()))
    policy = table_policy()
    policy.model.table.data[:] = float("nan")
    with pytest.raises(ValueError, match="categorical_sample: logits: expected numbers"):
        learner(policy).evaluate()
    assert isinstance(learner(TokenPolicy(table_policy().model, 0, temperature=2.0)).evaluate().outer_loss, float)
