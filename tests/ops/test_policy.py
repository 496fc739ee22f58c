"""`policy_loss` against its definition, token by token, and its pitfalls and refusals by name."""

import itertools
import math

import pytest
import torch

import po_kernels as pk
from po_kernels.ops.policy import AGGREGATIONS, DIVERGENCES, PLACEMENTS, RATIOS, SURROGATES

LENGTHS = (4, 2, 0, 3)
B, T = len(LENGTHS), max(LENGTHS)
MASK = torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)
CU_SEQLENS = torch.tensor([0, *itertools.accumulate(LENGTHS)])


def batch(seed=0):
    """Log-probabilities whose ratios are on both sides of all bounds, and advantages of both signs, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_prob = -normal(B, T).abs()
    tensors = {"old_log_prob": log_prob + 0.5 * normal(B, T), "ref_log_prob": log_prob + 0.5 * normal(B, T)}
    return log_prob, normal(B), {**tensors, "entropy": normal(B, T).abs(), "mask": MASK}


def valid():
    """Every ratio with every surrogate that has no other of its own."""
    own = {"geo_mean": "sequence_mean", "vespo": "sequence_sum"}
    return [(r, s) for r in RATIOS for s in SURROGATES if r in ("token", own.get(s, r))]


def definition(log_prob, A, old, ref, entropy, lengths, weight, ratio, surrogate, clip, dual_clip, kl, kl_coef,
               kl_placement, entropy_coef, aggregation, max_length):  # fmt: skip
    """The value, by loops over sequences and tokens in Python's numbers."""
    sequences = []
    for b, n in enumerate(lengths):
        delta = [float(log_prob[b, t] - old[b, t]) for t in range(n)]
        x = [float(ref[b, t] - log_prob[b, t]) for t in range(n)]
        k = [{"k1": -y, "abs": abs(y), "k2": y * y / 2, "k3": math.exp(y) - y - 1}[kl] for y in x]
        a = float(A[b])
        if kl_placement == "reward":
            a -= kl_coef * sum(k)
        terms = []
        for t in range(n):
            u = {"token": delta[t], "sequence_sum": sum(delta)}.get(ratio, sum(delta) / n)
            rho = math.exp(u)
            if surrogate == "clip":
                term = max(-a * rho, -a * min(max(rho, 1 - clip[0]), 1 + clip[1]))
                term = min(term, -a * dual_clip) if dual_clip is not None and a < 0 else term
            elif surrogate == "is":
                term = -a * (rho if dual_clip is None else min(rho, dual_clip))
            elif surrogate == "sapo":
                tau = 1.0 if a > 0 else 1.05
                term = -a * 4 / tau / (1 + math.exp(-tau * (rho - 1)))
            elif surrogate == "geo_mean":
                held = [min(d, clip[1]) if a > 0 else max(d, -clip[0]) for d in delta]
                term = -a * math.exp(sum(held) / n)
            elif surrogate == "cispo":
                term = -a * min(max(rho, 1 - clip[0]), 1 + clip[1]) * float(log_prob[b, t])
            elif surrogate == "vespo":
                power, rate = (2, 3) if a >= 0 else (3, 2)
                w = math.exp(sum(delta))
                term = -a * w**power * math.exp(rate * (1 - w)) * float(log_prob[b, t])
            else:
                term = -a * float(log_prob[b, t])
            term *= float(weight[b, t])
            if kl_placement != "reward":
                term += kl_coef * k[t] * (rho if kl_placement == "loss_times_ratio" else 1.0)
            terms.append(term - entropy_coef * float(entropy[b, t]))
        sequences.append(terms)
    every = sum(map(sum, sequences))
    return {
        "token_mean": every / sum(lengths),
        "token_sum": every,
        "seq_mean_token_mean": sum(sum(s) / len(s) for s in sequences if s) / len(lengths),
        "seq_mean_token_sum": every / len(lengths),
        "seq_mean_token_sum_norm": every / len(lengths) / max_length,
    }[aggregation]


@pytest.mark.parametrize(("ratio", "surrogate"), valid())
def test_the_value_is_that_of_the_definition(ratio, surrogate):
    for seed, (kl, placement, aggregation) in enumerate(itertools.product(DIVERGENCES, PLACEMENTS, AGGREGATIONS)):
        log_prob, A, rest = batch(seed)
        weight = torch.rand(B, T, dtype=torch.float64)
        chosen = {
            "kl": kl, "kl_placement": placement, "aggregation": aggregation, "ratio": ratio, "surrogate": surrogate,
            "clip": (0.2, 0.3), "dual_clip": 1.5 if surrogate in ("clip", "is") and seed % 2 else None,
            "kl_coef": 0.3, "entropy_coef": 0.1, "max_length": 5,
        }  # fmt: skip
        found = pk.policy_loss(log_prob, A, **rest, weight=weight, **chosen)
        expected = definition(log_prob, A, *list(rest.values())[:3], LENGTHS, weight, **chosen)
        assert math.isclose(found.item(), expected, rel_tol=1e-12, abs_tol=1e-13), chosen


@pytest.mark.parametrize(("ratio", "surrogate"), valid())
def test_packed_sequences_are_those_of_rows(ratio, surrogate):
    """Values, gradients and statistics; the first token of a segment knows nothing of the segment before."""
    log_prob, A, rest = batch()
    weight = torch.rand(B, T, dtype=torch.float64)
    chosen = {"ratio": ratio, "surrogate": surrogate, "kl_coef": 0.3, "entropy_coef": 0.1, "return_stats": True}

    def rows(x, A, aggregation):
        return pk.policy_loss(x, A, **rest, weight=weight, max_length=9, **chosen, aggregation=aggregation)

    def packed(x, A, aggregation):
        others = {name: y[MASK] for name, y in rest.items() if name != "mask"}
        return pk.policy_loss(
            x[MASK], A, **others, weight=weight[MASK], cu_seqlens=CU_SEQLENS, max_length=9, **chosen,
            aggregation=aggregation,
        )  # fmt: skip

    for aggregation in AGGREGATIONS:
        results = []
        for function in (rows, packed):
            inputs = log_prob.clone().requires_grad_(), A.clone().requires_grad_()
            loss, stats = function(*inputs, aggregation)
            results.append([loss, *torch.autograd.grad(loss, inputs), *stats])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_actions_are_sequences_of_one_token():
    log_prob, A, rest = batch()
    flat = {name: x.reshape(-1) for name, x in rest.items()}
    for ratio in RATIOS:
        for aggregation in ("token_mean", "token_sum"):
            chosen = {"ratio": ratio, "aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.01}
            found = pk.policy_loss(log_prob.reshape(-1), A.repeat_interleave(T), **flat, **chosen)
            columns = {name: x.reshape(-1, 1) for name, x in rest.items()}
            same = pk.policy_loss(log_prob.reshape(-1, 1), A.repeat_interleave(T), **columns, **chosen)
            assert torch.equal(found, same)
            if ratio == "token":
                torch.testing.assert_close(found, pk.policy_loss(log_prob, A, **rest, **chosen), rtol=1e-13, atol=0)


def test_advantages_and_weights_of_sequences_or_tokens():
    log_prob, A, rest = batch()
    w = torch.rand(B, dtype=torch.float64)
    for surrogate in ("clip", "is", "sapo", "cispo", "vespo", "reinforce"):
        expected = pk.policy_loss(log_prob, A, **rest, weight=w, surrogate=surrogate)
        spread = [x.unsqueeze(1).expand(B, T) for x in (A, w)]
        found = pk.policy_loss(log_prob, spread[0], **rest, weight=spread[1], surrogate=surrogate)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_no_old_policy_is_the_same_policy():
    log_prob, A, rest = batch()
    rest.pop("old_log_prob")
    for ratio, surrogate in valid():
        results = []
        for old in (None, log_prob):
            x = log_prob.clone().requires_grad_()
            loss = pk.policy_loss(x, A, **rest, old_log_prob=old, ratio=ratio, surrogate=surrogate, kl_coef=0.1)
            results.append((loss, *torch.autograd.grad(loss, x)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


def test_log_ratios_are_held():
    log_prob, A, rest = batch()
    x = (log_prob + 5.0).requires_grad_()
    loss = pk.policy_loss(x, A.abs(), **rest, surrogate="is", log_ratio_max=1.0, aggregation="token_sum")
    torch.testing.assert_close(loss, -math.e * (A.abs() * MASK.sum(1)).sum(), rtol=1e-13, atol=0)
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_normalizer_carries_counts_of_other_batches(aggregation):
    """Two batches add up to their union, with the counts of all, as accumulation and ranks need it."""
    log_prob, A, rest = batch()
    tokens = aggregation == "token_mean"
    count = None if aggregation == "token_sum" else sum(LENGTHS) if tokens else B
    parts = []
    for half in (slice(0, 1), slice(1, B)):
        few = {name: x[half] for name, x in rest.items()}
        for each in [count] if count is None else [torch.tensor(count), float(count)]:
            part = pk.policy_loss(
                log_prob[half], A[half], **few, aggregation=aggregation, normalizer=each, max_length=6
            )
        parts.append(part)
    whole = pk.policy_loss(log_prob, A, **rest, aggregation=aggregation, max_length=6)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=0)


def test_max_length_is_by_default_the_width():
    log_prob, A, rest = batch()
    chosen = {"aggregation": "seq_mean_token_sum_norm", **rest}
    assert torch.equal(pk.policy_loss(log_prob, A, **chosen), pk.policy_loss(log_prob, A, **chosen, max_length=T))


def test_statistics():
    log_prob, A, rest = batch()
    weight = torch.rand(B, T, dtype=torch.float64)
    _, stats = pk.policy_loss(
        log_prob, A, **rest, weight=weight, dual_clip=1.5, kl_coef=0.3, kl_placement="loss", entropy_coef=0.1,
        return_stats=True,
    )  # fmt: skip
    delta, x = ((y - log_prob)[MASK] for y in (2 * log_prob - rest["old_log_prob"], rest["ref_log_prob"]))
    ratio, a, w = delta.exp(), A.unsqueeze(1).expand(B, T)[MASK], weight[MASK]
    k3 = x.exp() - x - 1
    expected = {
        "ratio_mean": ratio.mean(), "ratio_max": ratio.max(),
        "clip_fraction_low": ((ratio < 0.8) & (a < 0)).double().mean(),
        "clip_fraction_high": (((ratio > 1.2) & (a > 0)) | ((ratio > 1.5) & (a < 0))).double().mean(),
        "kl_k1": -x.mean(), "kl_k3": k3.mean(), "entropy": rest["entropy"][MASK].mean(),
        "effective_sample_size": (ratio * w).sum() ** 2 / (ratio * w).square().sum(),
        "tokens": torch.tensor(sum(LENGTHS)),
        "objective": (ratio * w * a - 0.3 * k3 + 0.1 * rest["entropy"][MASK]).mean(), "non_finite": torch.tensor(0),
    }  # fmt: skip
    assert 0 < expected["clip_fraction_low"] < 1
    assert 0 < expected["clip_fraction_high"] < 1
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=1e-12, atol=0)
    without = pk.policy_loss(log_prob, A, old_log_prob=rest["old_log_prob"], return_stats=True)[1]
    delta = log_prob - rest["old_log_prob"]
    torch.testing.assert_close(without.kl_k3, (delta.exp() - delta - 1).mean(), rtol=1e-12, atol=0)
    assert without.entropy.isnan()


def test_what_is_not_finite_is_counted():
    log_prob, A, rest = batch()
    log_prob[0, 0] = math.nan
    log_prob[3, 2] = math.inf
    assert pk.policy_loss(log_prob, A, **rest, surrogate="is", return_stats=True)[1].non_finite == 2


# The pitfalls, by name.


@pytest.mark.parametrize(("ratio", "surrogate"), valid())
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_exp_before_mask(ratio, surrogate, poison):
    """What stands in masked places, in any tensor, reaches neither the loss nor a derivative."""
    log_prob, A, rest = batch()
    chosen = {"ratio": ratio, "surrogate": surrogate, "kl_coef": 0.2, "entropy_coef": 0.1, "mask": MASK}
    results = []
    for fill in (0.0, poison):
        x, a, *others = (y.masked_fill(~MASK, fill).requires_grad_() for y in (log_prob, A.unsqueeze(1).expand(B, T),
                          *(rest[n] for n in ("ref_log_prob", "entropy", "old_log_prob"))))  # fmt: skip
        by_token = ratio == "token" and surrogate != "geo_mean"
        a = a if by_token else torch.where(MASK.any(1), A, fill).requires_grad_()
        loss = pk.policy_loss(
            x, a, ref_log_prob=others[0], entropy=others[1], old_log_prob=others[2].detach(),
            weight=torch.ones(B, T, dtype=torch.float64).masked_fill(~MASK, fill), **chosen,
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, (x, a, *others[:2]))))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("ratio", "surrogate"), valid())
def test_all_masked(ratio, surrogate):
    log_prob, A, rest = batch()
    x, a = log_prob.requires_grad_(), A.requires_grad_()
    for aggregation in AGGREGATIONS:
        chosen = {**rest, "mask": torch.zeros_like(MASK), "aggregation": aggregation, "kl_coef": 0.1}
        loss, stats = pk.policy_loss(x, a, ratio=ratio, surrogate=surrogate, **chosen, return_stats=True)
        for y in (loss, *torch.autograd.grad(loss, (x, a)), stats.objective, stats.ratio_max, stats.tokens):
            assert torch.equal(y, torch.zeros_like(y))


def test_a_clipped_ratio_that_overflows_has_no_gradient():
    """0 · inf is nan: the ratio of a token that a bound holds is not exponentiated at all."""
    for surrogate, A in (("clip", 1.0), ("clip", -1.0), ("is", 1.0), ("sapo", 1.0), ("sapo", -1.0), ("cispo", 1.0)):
        log_prob = torch.full((1, 1), 200.0, requires_grad=True)
        dual = 3.0 if surrogate in ("clip", "is") else None
        loss = pk.policy_loss(
            log_prob, torch.tensor([A]), old_log_prob=torch.zeros(1, 1), surrogate=surrogate, dual_clip=dual
        )
        expected = -A * 1.2 if surrogate == "cispo" else 0.0
        torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], torch.full((1, 1), expected))
        assert loss.isfinite()


def test_half_precision_is_computed_in_float32():
    log_prob, A, rest = batch()
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in rest.items()}
    x = log_prob.bfloat16().requires_grad_()
    found = pk.policy_loss(x, A.bfloat16(), **half, kl_coef=0.1)
    full = {name: y.float() if y.is_floating_point() else y for name, y in half.items()}
    assert found.dtype == torch.float32
    assert torch.equal(found, pk.policy_loss(x.float(), A.bfloat16().float(), **full, kl_coef=0.1))
    assert torch.autograd.grad(found, x)[0].dtype == torch.bfloat16


def test_loss_0_on_policy_is_right():
    """Standardised advantages have the mean 0: the value says nothing, the gradient does, and so do the statistics."""
    rewards = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    A = pk.group_advantage(rewards, "standardized")
    loss, stats = pk.policy_loss(x, A, return_stats=True)
    assert abs(loss.item()) < 1e-15
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], (-A / 12).unsqueeze(1).expand(4, 3), rtol=1e-14, atol=0)
    assert stats.ratio_mean == stats.ratio_max == 1


def test_sequence_weight_by_sum_or_mean():
    delta = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    for ratio, u in (("sequence_sum", 0.6), ("sequence_mean", 0.2)):
        loss = pk.policy_loss(delta, -torch.ones(1).double(), old_log_prob=0 * delta, surrogate="is", ratio=ratio)
        assert math.isclose(loss.item(), math.exp(u), rel_tol=1e-14)


A2, LP = torch.zeros(2), torch.zeros(2, 3)
GRAD = torch.zeros(2, 3, requires_grad=True)
BAD = [
    ({"log_prob": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "log_prob: expected a floating tensor"),
    ({"log_prob": torch.zeros(2, 3, 1)}, ValueError, "log_prob: expected shape"),
    ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \(2,\) or \(2, 3\), got \(3,\)"),
    ({"advantages": torch.zeros(2, dtype=torch.int64)}, TypeError, "advantages: expected a floating tensor"),
    ({"advantages": torch.zeros(2).double()}, TypeError, "advantages: expected torch.float32 like log_prob"),
    ({"old_log_prob": A2}, ValueError, "old_log_prob: expected shape"),
    ({"old_log_prob": GRAD}, ValueError, "old_log_prob: .* requires grad"),
    ({"weight": GRAD}, ValueError, "weight: .* requires grad"),
    ({"mask": GRAD}, ValueError, "mask: .* requires grad"),
    ({"mask": LP + 0.5}, ValueError, "mask: expected True and False, or 0 and 1"),
    ({"mask": torch.ones(2)}, ValueError, "mask: expected shape"),
    ({"mask": [1]}, TypeError, "mask: expected a tensor"),
    *[
        ({"ratio": r, "advantages": LP}, ValueError, rf"advantages: expected shape \(2,\), one a sequence, .*{r}")
        for r in RATIOS[1:]
    ],
    ({"surrogate": "geo_mean", "advantages": LP}, ValueError, "advantages: .*geo_mean"),
    ({"surrogate": "vespo", "ratio": "sequence_mean"}, ValueError, "ratio: .*vespo"),
    ({"ratio": "sequence"}, ValueError, "ratio: expected one of 'token'"),
    ({"surrogate": "ppo"}, ValueError, "surrogate: expected one of 'clip'"),
    ({"kl": "k4"}, ValueError, "kl: expected one of"),
    ({"kl_placement": "loss "}, ValueError, "kl_placement: expected one of"),
    ({"aggregation": "mean"}, ValueError, "aggregation: expected one of"),
    ({"dual_clip": 1.1}, ValueError, "dual_clip: expected a number of at least 1 . ε_h = 1.2, got 1.1"),
    ({"dual_clip": 0.0, "surrogate": "is"}, ValueError, "dual_clip: expected a positive number"),
    ({"dual_clip": 3.0, "surrogate": "sapo"}, ValueError, "dual_clip: expected None"),
    ({"clip": 0.2}, TypeError, "clip: expected two numbers"),
    ({"clip": (-0.1, 0.2)}, ValueError, "clip: expected numbers of at least 0"),
    ({"clip": (None, 0.2)}, TypeError, "clip: expected a real number"),
    ({"clip": (1.5, 2.0), "surrogate": "cispo"}, ValueError, "clip: expected bounds of the ratio itself"),
    ({"tau": (0.0, 1.0)}, ValueError, "tau: expected a positive number"),
    ({"log_ratio_max": 0.0}, ValueError, "log_ratio_max: expected a positive number"),
    ({"max_length": "abc"}, TypeError, "max_length: expected an integer"),
    ({"normalizer": torch.tensor(math.nan)}, ValueError, "normalizer: expected a number above 0"),
    ({"kl_coef": 0.1}, ValueError, "ref_log_prob: expected a tensor"),
    ({"kl_coef": math.nan}, ValueError, "kl_coef: expected a finite number"),
    ({"entropy_coef": 0.1}, ValueError, "entropy: expected a tensor"),
    ({"entropy_coef": torch.ones(2), "entropy": LP}, ValueError, r"entropy_coef: expected shape \(\)"),
    ({"entropy_coef": torch.tensor(math.inf), "entropy": LP}, ValueError, "entropy_coef: expected a finite"),
    ({"normalizer": 0}, ValueError, "normalizer: expected a number above 0"),
    ({"normalizer": torch.tensor(0)}, ValueError, "normalizer: expected a number above 0"),
    ({"normalizer": torch.ones((), requires_grad=True)}, ValueError, "normalizer: .* requires grad"),
    ({"normalizer": 2.0, "aggregation": "token_sum"}, ValueError, "normalizer: expected None"),
    ({"max_length": 0, "aggregation": "seq_mean_token_sum_norm"}, ValueError, "max_length: expected an integer"),
    ({"return_stats": 1}, TypeError, "return_stats: expected True or False"),
    ({"cu_seqlens": torch.tensor([0, 2])}, ValueError, r"log_prob: expected shape \(N,\)"),
]
PACKED = {"log_prob": torch.zeros(6), "advantages": torch.zeros(2)}
BAD += [
    ({**PACKED, "cu_seqlens": torch.tensor(ends)}, ValueError, "cu_seqlens: expected integers that go from 0 to 6")
    for ends in ([0, 2, 5], [0, 2, 7], [1, 2, 6], [0, 7, 6])
]
BAD += [
    ({**PACKED, "cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens: expected an integer tensor"),
    ({**PACKED, "cu_seqlens": torch.tensor([0, 2, 6]), "mask": torch.ones(6)}, ValueError, "mask: expected None with"),
    ({**PACKED, "cu_seqlens": torch.tensor([0, 2, 6]), "aggregation": "seq_mean_token_sum_norm"}, ValueError,
     "max_length: expected an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="policy_loss: " + message):
        pk.policy_loss(**{"log_prob": LP, "advantages": A2, **change})


def test_bad_values_that_cannot_be_read_make_nan():
    """Under a transform, as on a device, the loss of a mask of fractions or of wrong segments is nan."""

    def masked(mask):
        return pk.policy_loss(torch.zeros(2, 3), torch.ones(2), mask=mask)

    def packed(ends):
        return pk.policy_loss(torch.zeros(6), torch.ones(2), cu_seqlens=ends)

    good, bad = torch.ones(2, 3), torch.full((2, 3), 0.5)
    assert torch.func.vmap(masked)(torch.stack([good, bad])).isnan().tolist() == [False, True]
    ends = torch.tensor([[0, 2, 6], [0, 2, 5]])
    assert torch.func.vmap(packed)(ends).isnan().tolist() == [False, True]


def test_no_advantage_and_an_endless_ratio():
    """A sequence without an advantage adds nothing, however far it is from the old policy."""
    log_prob = torch.zeros(2, 100, requires_grad=True)
    A, old = torch.tensor([0.0, 1.0]), torch.full((2, 100), -1.0)
    for name in ("rloo", "dice"):
        first = old.clone()
        first[1] = 0.0
        loss = pk.policy_loss(log_prob, A, old_log_prob=first, **pk.policy_loss_preset(name))
        (gradient,) = torch.autograd.grad(loss, log_prob)
        assert loss == -0.5
        assert (gradient[0] == 0).all()
        assert torch.allclose(gradient[1], torch.tensor(-0.5), rtol=1e-6)  # of a mean of 100 numbers
    far = torch.stack([torch.full((100,), -90.0), torch.zeros(100)])
    loss = pk.policy_loss(log_prob, A, old_log_prob=far, surrogate="geo_mean", aggregation="seq_mean_token_mean")
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert loss == -0.5
    assert (gradient[0] == 0).all()
    # A divergence of zero is none, too.
    options = {"ref_log_prob": torch.zeros(1, 100), "kl_coef": 0.1, "ratio": "sequence_sum"}
    loss = pk.policy_loss(log_prob[:1], torch.ones(1), old_log_prob=old[:1], **options)
    assert loss == -1.2
    assert torch.autograd.grad(loss, log_prob)[0].isfinite().all()


@pytest.mark.parametrize("delta", [-50.0, 50.0])
def test_effective_sample_size_of_equal_weights(delta):
    found = pk.policy_loss(
        torch.zeros(1, 4), torch.ones(1), old_log_prob=torch.full((1, 4), -delta), return_stats=True
    )[1]
    assert found.effective_sample_size == 4.0


def test_a_masked_weight_reaches_no_gradient():
    A = torch.ones(2, requires_grad=True)
    weight = torch.tensor([1.0, math.nan])
    for mask in (torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([1, 0])):
        loss = pk.policy_loss(torch.zeros(mask.shape), A, weight=weight, mask=mask)
        assert torch.autograd.grad(loss, A)[0].tolist() == [-1.0, 0.0]


def test_tensors_of_inference_mode_are_taken():
    with torch.inference_mode():
        mask, weight, count = torch.rand(3, 4) < 0.7, torch.rand(3, 4), torch.tensor(3.0)
    log_prob = torch.randn(3, 4, requires_grad=True)
    pk.policy_loss(log_prob, torch.randn(3), mask=mask, weight=weight, normalizer=count).backward()
    assert log_prob.grad.isfinite().all()
