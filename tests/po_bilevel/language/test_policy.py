"""Policies of texts against all logits, against their own enumeration, and what they refuse."""

import copy

import pytest
import torch
from letters import END, Table, all_log_prob, completions, table_policy
from po_bilevel.language import Decoder, TokenPolicy, Tokens
from torch.nn.attention import SDPBackend, sdpa_kernel

import po_kernels as pk

PROMPTS = [[3, 1], [5], [2, 2, 6, 1]]
ANSWERS = [[4, 0], [1, 2, 3, 0], [0], [6, 6, 6], [3], [2, 5, 0]]  # two for each prompt


def decoder_policy(temperature=1.0, **options):
    torch.manual_seed(3)
    model = Decoder(vocabulary=7, context=12, width=8, layers=2, heads=2).double()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.4)
    return TokenPolicy(model, END, temperature=temperature, **options)


def by_all_logits(policy, prompt, answer):
    """Log-probability and entropy of an answer's tokens, of one row without padding, from all logits."""
    ids = torch.tensor([prompt + answer])
    hidden = policy.model(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt) - 1 : -1]
    head = policy.model.head()
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = head.scale * logits
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    every = torch.log_softmax(logits / policy.temperature, dim=-1)
    return every[torch.arange(len(answer)), torch.tensor(answer)], -(every.exp() * every).sum(dim=-1)


def toy_policy(temperature=1.0):
    """With all that a head may have."""
    torch.manual_seed(5)
    model = Table(5, vocabulary=7, width=4, bias=torch.randn(7).double(), scale=1.7, softcap=2.5)
    model.table.data.normal_()
    return TokenPolicy(model, END, temperature=temperature)


@pytest.mark.parametrize("make", [decoder_policy, toy_policy])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_prob_and_entropy_are_those_of_all_logits(make, temperature):
    """With bias, scale and softcap; whatever the padding is of, and whatever stands there."""
    policy = make(temperature)
    prompts, answers = PROMPTS[:2] if make is toy_policy else PROMPTS, ANSWERS
    if make is toy_policy:
        answers = [[4, 0], [1, 2], [0], [6, 6]]
    before, after = Tokens.padded(prompts, left=True), Tokens.padded(answers)
    found = policy(before, after, entropy=True)
    for row, answer in enumerate(answers):
        log_prob, entropy = by_all_logits(policy, prompts[row // 2], answer)
        torch.testing.assert_close(found.log_prob[row, : len(answer)], log_prob, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.entropy[row, : len(answer)], entropy, rtol=1e-12, atol=1e-12)
        assert not found.log_prob[row, len(answer) :].any()
        assert not found.entropy[row, len(answer) :].any()
    torch.testing.assert_close(policy.log_prob(before, after), found.log_prob.sum(dim=1))
    # More padding, of tokens that there are none of, as -100 in labels.
    wider = [
        Tokens(torch.cat(ids, dim=1), torch.cat(mask, dim=1))
        for ids, mask in (
            ((torch.full((len(prompts), 2), -100), before.ids), (before.mask.new_zeros(len(prompts), 2), before.mask)),
            ((after.ids, torch.full((len(answers), 1), 99)), (after.mask, after.mask.new_zeros(len(answers), 1))),
        )
    ]
    again = policy(wider[0], Tokens(torch.where(wider[1].mask, wider[1].ids, -100), wider[1].mask), entropy=True)
    torch.testing.assert_close(again.log_prob[:, :-1], found.log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.entropy[:, :-1], found.entropy, rtol=1e-12, atol=1e-12)


def test_rows_do_not_depend_on_their_companions():
    policy = decoder_policy()
    found = policy.log_prob(Tokens.padded(PROMPTS, left=True), Tokens.padded(ANSWERS))
    for row, answer in enumerate(ANSWERS):
        alone = policy.log_prob(Tokens.padded([PROMPTS[row // 2]], left=True), Tokens.padded([answer]))
        torch.testing.assert_close(found[row], alone[0], rtol=1e-12, atol=1e-12)


def test_derivatives_of_first_and_second_order_and_in_forward_mode():
    """Of a weighted sum of log-probabilities and entropies, against those of all logits, in float64."""
    policy = decoder_policy(0.8)
    before, after = Tokens.padded(PROMPTS, left=True), Tokens.padded(ANSWERS)
    names, theta = zip(*policy.named_parameters(), strict=True)
    vector = [torch.randn_like(p) for p in theta]
    weight = torch.randn(len(ANSWERS), after.ids.shape[1]).double()

    def ours(*values):
        found = torch.func.functional_call(
            policy, dict(zip(names, values, strict=True)), (before, after, True)
        )  # fmt: skip
        return (weight * (found.log_prob - 0.3 * found.entropy)).sum()

    def oracle(*values):
        total = 0.0
        for row, answer in enumerate(ANSWERS):
            with torch.nn.utils.stateless._reparametrize_module(policy, dict(zip(names, values, strict=True))):
                log_prob, entropy = by_all_logits(policy, PROMPTS[row // 2], answer)
            total = total + (weight[row, : len(answer)] * (log_prob - 0.3 * entropy)).sum()
        return total

    results = []
    for function in (ours, oracle):
        with sdpa_kernel(SDPBackend.MATH):
            first = torch.autograd.grad(function(*theta), theta, create_graph=True)
            second = torch.autograd.grad(first, theta, vector)
        forward = torch.func.jvp(function, theta, tuple(vector))[1].detach()
        results.append([*first, *second, forward])
        # The fused attention has the same first derivative.
        torch.testing.assert_close(torch.autograd.grad(function(*theta), theta), first, rtol=1e-9, atol=1e-10)
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [decoder_policy, toy_policy])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.7}])
def test_completions_have_the_log_prob_that_they_were_drawn_with(make, options):
    """A cache of keys and values changes nothing, nor does the batch that a prompt stands in."""
    policy = make(0.9)
    prompts = Tokens.padded(PROMPTS[:2], left=True)
    found = policy.generate(prompts, num_samples=5, max_tokens=3, seed=4, **options)
    mask = found.tokens.mask
    for row, (ids, log_prob, support) in enumerate(
        zip(found.tokens.lists(), found.log_prob, found.log_support, strict=True)
    ):
        sampler = copy.copy(policy)
        sampler.temperature = options.get("temperature", 0.9)
        prompt = PROMPTS[row // 5]
        expected, _ = by_all_logits(sampler, prompt, ids)
        expected = expected - support[: len(ids)]
        torch.testing.assert_close(log_prob[: len(ids)], expected, rtol=1e-12, atol=1e-12)
        assert END not in ids[:-1]
        assert len(ids) == 3 or ids[-1] == END
    assert not found.log_prob[~mask].any()
    assert not found.log_support[~mask].any()
    if options == {}:
        assert torch.equal(found.log_support, torch.zeros_like(found.log_prob))
        torch.testing.assert_close(policy(prompts, found.tokens).log_prob, found.log_prob, rtol=1e-12, atol=1e-12)
    # The second prompt, as a part of a larger batch.
    part = policy.generate(
        Tokens.padded(PROMPTS[1:2], left=True), num_samples=5, max_tokens=3, seed=4, row_offset=1, **options
    )
    assert part.tokens.lists() == found.tokens.lists()[5:]
    torch.testing.assert_close(part.log_prob.sum(dim=1), found.log_prob[5:].sum(dim=1), rtol=1e-12, atol=1e-12)


def test_seeds():
    policy, prompts = table_policy(), Tokens.padded([[1]], left=True)
    drawn = [policy.generate(prompts, 50, 3, seed=seed).tokens.lists() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(5)
    unseeded = [policy.generate(prompts, 50, 3).tokens.lists() for _ in range(2)]
    torch.manual_seed(5)
    assert policy.generate(prompts, 50, 3).tokens.lists() == unseeded[0] != unseeded[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    """Pearson's statistic of 20000 draws over 15 completions: chi-square of 14 degrees, above 60 once in 10⁷."""
    policy = table_policy()
    every = completions(3)
    sampler = TokenPolicy(policy.model, END, temperature=temperature)
    expected = 20000 * all_log_prob(sampler, "ab", 3).detach().exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(20000.0).double())
    drawn = policy.generate(
        Tokens.padded([[1, 2]], left=True), 20000, 3, temperature=temperature, seed=0
    ).tokens.lists()
    counts = torch.tensor([drawn.count(ids) for ids in every], dtype=torch.float64)
    assert counts.sum() == 20000
    assert float(((counts - expected).square() / expected).sum()) < 60.0


def test_temperature_zero_takes_the_likeliest():
    policy = decoder_policy()
    prompts = Tokens.padded(PROMPTS, left=True)
    found = policy.generate(prompts, 2, 4, temperature=0.0)
    for row, ids in enumerate(found.tokens.lists()):
        prompt = PROMPTS[row // 2]
        for place, token in enumerate(ids):
            context = torch.tensor([prompt + ids[:place]])
            hidden = policy.model(context, torch.ones_like(context, dtype=torch.bool))[0, -1]
            assert token == int((hidden @ policy.model.head().weight.T).argmax())
    assert not found.log_prob.any()
    own = policy(prompts, found.tokens).log_prob.detach()
    torch.testing.assert_close(found.log_support, own, rtol=1e-12, atol=1e-12)


def one_token(probabilities, most=2):
    """A policy whose first token has these probabilities after the prompt [1]."""
    model = Table(most, vocabulary=len(probabilities))
    with torch.no_grad():
        model.table[2] = torch.tensor(probabilities, dtype=torch.float64).log().clamp(min=-1e4)
    return TokenPolicy(model, END)


@pytest.mark.parametrize(
    ("probabilities", "top_p", "kept"),
    [
        ([0.1, 0.5, 0.15, 0.25], 0.4, {1}),
        ([0.1, 0.5, 0.15, 0.25], 0.51, {1, 3}),
        ([0.1, 0.5, 0.15, 0.25], 0.8, {1, 3, 2}),
        ([0.1, 0.5, 0.15, 0.25], 0.95, {0, 1, 2, 3}),
        ([0.1, 0.5, 0.15, 0.25], 1e-9, {1}),
        ([0.25, 0.25, 0.25, 0.25], 0.5, {0, 1}),  # exact in binary; among equals the first
        ([0.0, 0.5, 0.5, 0.0], 0.9999, {1, 2}),
        ([0.125, 0.5, 0.125, 0.25], 0.75, {1, 3}),
    ],
)
def test_top_p_keeps_the_fewest_likeliest(probabilities, top_p, kept):
    """All of what is kept is drawn in 4000 draws but for one time in 10¹⁰⁰: each has a share of a tenth or more."""
    policy = one_token(probabilities)
    found = policy.generate(Tokens.padded([[1]], left=True), 4000, 1, top_p=top_p, seed=0)
    assert set(found.tokens.ids[:, 0].tolist()) == kept
    mass = sum(probabilities[token] for token in kept)
    torch.testing.assert_close(found.log_support.exp(), torch.full_like(found.log_support, mass))
    shares = torch.tensor(probabilities).double()[found.tokens.ids] / mass
    torch.testing.assert_close(found.log_prob.exp(), shares)


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"temperature": 0.6, "top_p": 0.8}, {"temperature": 1.7}])
def test_importance_weights_undo_how_tokens_were_drawn(options):
    """Under the sampler's law, weight · f has the mean of f under the policy on what could be drawn.

    By enumeration of the tokens that can be drawn: each has a log-probability under the sampler, and log_support.
    """
    policy = decoder_policy()
    prompts = Tokens.padded([PROMPTS[0]], left=True)
    found = policy.generate(prompts, 20000, 1, seed=1, **options)
    ids, first = found.tokens.ids[:, 0].unique(return_inverse=True)
    rows = [int((first == each).nonzero()[0]) for each in range(len(ids))]
    own = policy(prompts, found.tokens).log_prob.detach()
    weight = pk.importance_weights(
        own, found.log_prob, found.tokens.mask, level="token", mode="truncate", bounds=(None, None),
        log_support=found.log_support,
    )  # fmt: skip
    law = found.log_prob.exp()[rows, 0]
    # All of the sampler's mass is on what was drawn.
    torch.testing.assert_close(law.sum(), torch.ones_like(law.sum()), rtol=1e-9, atol=0.0)
    if "temperature" not in options:
        torch.testing.assert_close(weight, torch.ones_like(weight))
    f = torch.randn(7).double()[ids]
    p = torch.stack([by_all_logits(policy, PROMPTS[0], [int(token)])[0][0] for token in ids]).detach().exp()
    torch.testing.assert_close((law * weight[rows, 0] * f).sum(), (p / p.sum() * f).sum(), rtol=1e-9, atol=1e-12)


def test_an_end_is_a_part_of_the_completion_and_ends_it():
    policy = one_token([1.0, 0.0, 0.0])
    found = policy.generate(Tokens.padded([[1]], left=True), 3, 5, seed=0)
    assert found.tokens.lists() == [[END]] * 3
    assert found.tokens.ids.shape == (3, 1)  # nothing is computed once all have ended
    never = one_token([0.0, 1.0, 0.0], most=6)
    never.model.table.data[:] = never.model.table.data[2].clone()
    assert never.generate(Tokens.padded([[1]], left=True), 3, 5, seed=0).tokens.lists() == [[1] * 5] * 3


def test_tokens():
    rows = [[3, 1], [5], []]
    for left in (True, False):
        padded = Tokens.padded(rows, left=left)
        assert padded.lists() == rows
        assert padded.ids.shape == (3, 2)
        assert padded.rows(torch.tensor([1, 1])).lists() == [[5], [5]]
    assert Tokens.padded([]).ids.shape == (0, 0)
    assert Tokens.padded([[3, 1], [5]], left=True).mask.tolist() == [[True, True], [False, True]]
    read = Tokens.read(torch.tensor([[9, 9, 4], [1, 0, 9]]), pad=9, end=0)
    assert read.lists() == [[4], [1, 0]]
    with pytest.raises(ValueError, match=r"Tokens: pad: expected another token .* got 0 for both: give a mask"):
        Tokens.read(torch.tensor([[1, 0]]), pad=0, end=0)


def test_a_row_may_be_as_long_as_the_context_though_others_are_padded():
    """A long prompt with a short answer beside a short one with a long answer: neither is longer than the context."""
    policy = decoder_policy()
    prompts, answers = [[1] * 10, [2]], [[3, 0], [4] * 10 + [0]]
    found = policy.log_prob(Tokens.padded(prompts, left=True), Tokens.padded(answers))
    for row in range(2):
        log_prob, _ = by_all_logits(policy, prompts[row], answers[row])
        torch.testing.assert_close(found[row], log_prob.sum())
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected at most 11 tokens, so that 1 more.*of 12, got 12"):
        policy.log_prob(Tokens.padded([[1], [1] * 12], left=True), Tokens.padded([[3, 0], [0]]))


def test_bad_input():
    policy = decoder_policy()
    good, answers = Tokens.padded(PROMPTS, left=True), Tokens.padded(ANSWERS)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="TokenPolicy: temperature: expected a finite positive number, got"):
            decoder_policy(temperature)
    for end in (-1, 7, 0.5):
        with pytest.raises(ValueError, match=f"TokenPolicy: end: expected a token from 0 to 6, got {end}"):
            TokenPolicy(policy.model, end)
    with pytest.raises(ValueError, match=r"prompts\[2\]: expected at least one token.*mask \[0, 0\]"):
        policy.log_prob(Tokens.padded([[1, 2], [1], []], left=True), answers)
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*padding on the left only, got the mask \[1, 0\]"):
        policy.generate(Tokens.padded([[1, 2], [1]]), 1, 2)
    hole = Tokens(torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*got the mask \[1, 0, 1\]"):
        policy.generate(hole, 1, 2)
    for ids, mask in (((2, 3), (2, 2)), ((0, 3), (0, 3)), ((3,), (3,))):
        with pytest.raises(ValueError, match=r"prompts: expected (integer ids and a bool mask|at least one)"):
            policy.generate(Tokens(torch.ones(ids).long(), torch.ones(mask).bool()), 1, 2)
    for rows in (4, 0):
        with pytest.raises(ValueError, match=f"completions: expected a multiple of 3 rows.*got {rows}"):
            policy.log_prob(good, Tokens(answers.ids[:rows], answers.mask[:rows]))
    for mask in ([[False, True]] * 3, [[True, False, True]] * 3):
        wrong = torch.tensor(mask)
        with pytest.raises(ValueError, match=r"completions\[0\]: expected padding on the right only, got the mask"):
            policy.log_prob(good, Tokens(torch.ones_like(wrong).long(), wrong))
    with pytest.raises(ValueError, match=r"completions: expected integer ids and a bool mask of one shape"):
        policy.log_prob(good, Tokens(answers.ids, answers.mask[:, 1:]))
    for wrong in (Tokens(good.ids.double(), good.mask), Tokens(good.ids, good.mask.long())):
        with pytest.raises(ValueError, match="prompts: expected integer ids and a bool mask"):
            policy.generate(wrong, 1, 2)
    for token in (-1, 7):
        with pytest.raises(ValueError, match=rf"prompts\[1\]: expected tokens from 0 to 6, got {token}; look"):
            policy.generate(Tokens.padded([[1], [2, token]], left=True), 1, 2)
        with pytest.raises(ValueError, match=rf"completions\[2\]: expected tokens from 0 to 6, got {token}"):
            policy.log_prob(good, Tokens.padded([[1], [2], [token, 1]]))
    masked = Tokens(torch.tensor([[99, 1]]), torch.tensor([[False, True]]))
    assert policy.generate(masked, 1, 2).tokens.ids.shape[0] == 1
    with pytest.raises(ValueError, match=r"prompts\[2\]: expected at most 3 tokens, so that 9 more.* 12, got 4"):
        policy.generate(good, 1, 9)
    with pytest.raises(ValueError, match=r"completions: expected fewer tokens than the model's context of 12.*got 12"):
        policy.generate(good, 1, 12)
    for name, value in (("num_samples", 0), ("max_tokens", 0), ("num_samples", 1.5)):
        with pytest.raises(ValueError, match=f"generate: {name}: expected an integer of at least 1, got {value}"):
            policy.generate(good, **({"num_samples": 1, "max_tokens": 2} | {name: value}))
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="generate: temperature: expected a number of at least 0"):
            policy.generate(good, 1, 2, temperature=value)
    for value in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="generate: top_p: expected a number above 0 and at most 1"):
            policy.generate(good, 1, 2, top_p=value)
    for name in ("vocabulary", "context", "width", "layers", "heads"):
        with pytest.raises(ValueError, match=f"Decoder: {name}: expected an integer of at least 1, got 0"):
            Decoder(**({"vocabulary": 7, "context": 12, "width": 8, "layers": 2, "heads": 2} | {name: 0}))
    with pytest.raises(ValueError, match="Decoder: width: expected a multiple of 3 heads, got 8"):
        Decoder(7, 12, width=8, heads=3)
