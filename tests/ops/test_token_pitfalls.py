"""What goes wrong elsewhere between the logits of a language model and its loss, by name, and the Hessian of both."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import grad
from torch.func import hessian

import po_kernels as pk

from .bounds import near
from .cases import DEVICE, fused, serving
from .test_policy_derivatives import PREFIX, STRING_TERMS, STRINGS, expected_reward, log_probs, policy_and_rewards

EVERYWHERE = pytest.mark.parametrize("backend", serving("token_log_prob"))


@EVERYWHERE
def test_the_hessian_of_the_expected_reward_through_both_ops(backend):
    """By enumeration of all strings, V = T = 3: of logits, as second derivatives of the two in reverse mode."""
    logits, rewards = policy_and_rewards()
    right = hessian(expected_reward)(logits, rewards).reshape(39, 39)
    weight = log_probs(logits).sum(1).exp() * 27
    logits.requires_grad_()
    log_prob = pk.token_log_prob(logits[PREFIX], STRINGS, backend=backend).log_prob
    loss = pk.policy_loss(
        log_prob, rewards, weight=weight, ratio="sequence_sum", surrogate="is", aggregation="seq_mean_token_mean"
    )
    (first,) = grad(loss, logits, create_graph=True)
    found = torch.stack([grad(g, logits, retain_graph=True)[0].flatten() for g in first.flatten()])
    near(-found, right, 3 * STRING_TERMS, right.abs().max().item())


def test_the_end_of_a_string_counts_where_it_is_also_the_padding():
    """The expected reward of strings that end by themselves has the policy's gradient only if the end is a token."""
    end = 2
    strings = torch.tensor([[end, end], *itertools.product(range(2), range(3))])
    ended = strings == end
    logits, rewards = torch.randn(3, 3, dtype=torch.float64).requires_grad_(), torch.randn(7, dtype=torch.float64)
    prefix = torch.stack([torch.full((7,), end), strings[:, 0]], 1)
    log_prob = pk.token_log_prob(logits[prefix], strings).log_prob
    errors = []
    # All up to the first end, and what a comparison with the padding leaves.
    for mask in (ended.cumsum(1) - ended.long() == 0, ~ended):
        p = log_prob.masked_fill(ended.cumsum(1) - ended.long() > 0, 0.0).sum(1).exp()
        (right,) = grad((p * rewards).sum(), logits, retain_graph=True)
        loss = pk.policy_loss(
            log_prob, rewards, weight=7 * p.detach(), mask=mask, surrogate="is", aggregation="seq_mean_token_sum"
        )
        (found,) = grad(loss, logits, retain_graph=True)
        errors.append((found + right).abs().max() / right.abs().max())
    assert errors[0] < 50 * torch.finfo(torch.float64).eps  # a sum over 7 strings of some operations
    assert errors[1] > 0.1


def test_a_temperature_in_one_of_two_policies_shows_in_the_ratio():
    logits, ids = torch.randn(4, 5, 9), torch.randint(9, (4, 5))
    new, other = (pk.token_log_prob(logits, ids, temperature=t).log_prob for t in (0.7, 1.0))
    for old, same in ((new.clone(), True), (other, False)):
        _, stats = pk.policy_loss(new, torch.randn(4), old_log_prob=old, return_stats=True)
        assert (stats.ratio_mean == 1.0) == same
        assert (stats.kl_k3 == 0.0) == same


@EVERYWHERE
def test_the_cap_comes_before_the_temperature(backend):
    logits, ids = 5 * torch.randn(3, 8, dtype=torch.float64), torch.tensor([0, 3, 7])
    found = pk.token_log_prob(logits, ids, temperature=0.5, softcap=2.0, backend=backend).log_prob
    first, last = (torch.log_softmax(z, -1).gather(-1, ids[:, None])[:, 0] for z in (
        2.0 * torch.tanh(logits / 2.0) / 0.5, 2.0 * torch.tanh(logits / 0.5 / 2.0)
    ))  # fmt: skip
    near(found, first, 8 + 24)
    assert (found - last).abs().max() > 0.1


@EVERYWHERE
def test_what_all_logits_have_in_common_is_in_no_derivative(backend):
    """That of the log-sum-exp is exp(z - lse) elsewhere, with the rounding of lse."""
    z = torch.linspace(0.0, 2.0, 33)
    z = z + 2.0**20 - 2.0**20  # what such a number leaves of the others
    ids, direction = torch.tensor([4]), torch.cos(torch.arange(33.0))
    products = []
    for logits in (z.double()[None], z[None] + 2.0**20):
        logits.requires_grad_()
        lse = pk.token_log_prob(logits, ids, return_lse=True, backend=backend).lse
        (p,) = grad(lse.sum(), logits, create_graph=True)
        products.append((p, *grad((p * direction).sum(), logits)))
    for right, found in zip(*products, strict=True):
        near(found, right, 33)


@EVERYWHERE
def test_rows_beyond_what_32_bits_address(backend):
    """Half the numbers are never read, and take no memory."""
    size = 2**31 + 70
    on_the_cpu = DEVICE == "cpu"
    memory = torch.from_numpy(np.zeros(size, dtype=np.int16)) if on_the_cpu else torch.zeros(size, dtype=torch.int16)
    rows = memory.view(torch.bfloat16).as_strided((3, 70), (2**30, 1))
    rows[2] = torch.randn(70).bfloat16()
    logits = rows.requires_grad_()
    ids = torch.tensor([0, 1, 69])
    found = pk.token_log_prob(logits, ids, backend=backend).log_prob
    alone = logits[2:].detach().clone().requires_grad_()
    right = pk.token_log_prob(alone, ids[2:], backend=backend).log_prob
    assert torch.equal(found[2:], right)
    assert torch.equal(grad(found.sum(), logits)[0][2:], grad(right.sum(), alone)[0])


@EVERYWHERE
def test_more_rows_than_a_grid_has_along_its_second_axis(backend):
    logits, ids = torch.randn(2**16 + 5, 2), torch.randint(2, (2**16 + 5,))
    found = pk.token_log_prob(logits, ids, backend=backend).log_prob
    assert torch.equal(found[-5:], pk.token_log_prob(logits[-5:], ids[-5:], backend=backend).log_prob)


@pytest.mark.parametrize("backend", fused("token_log_prob"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_whose_difference_is_out_of_range(backend, dtype):
    """Divided by the temperature it is not."""
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[0.6 * largest, -0.6 * largest]], dtype=dtype, requires_grad=True)
    found = pk.token_log_prob(logits, torch.tensor([1]), temperature=0.2 * largest, entropy=True, backend=backend)
    p = torch.tensor(6.0, dtype=torch.float64).exp().reciprocal()
    p = p / (1 + p)
    near(found.log_prob, p.log().to(dtype)[None], 4, 6.0)  # two quotients and their difference, of 6, and a logarithm
    # exp has the error of its exponent of 6, and the sums of two terms some of their own.
    near(found.entropy, -(p * p.log() + (1 - p) * (1 - p).log()).to(dtype)[None], 16, 1.0)
    (slope,) = torch.autograd.grad(found.log_prob * (0.2 * largest), logits)
    near(slope[0], torch.stack([p - 1, 1 - p]).to(dtype), 8, 1.0)


@pytest.mark.parametrize("backend", fused("token_log_prob"))
def test_the_entropy_of_what_is_almost_certain(backend):
    """What a backward pass is given is as accurate as what it would find: the top's gradient is a small difference."""
    if DEVICE != "cpu":
        pytest.skip("sums on a device are in float32, whose rounding is as large as such an entropy")
    logits = torch.tensor([[0.0, -15.2, -16.1, -15.7]], requires_grad=True)
    right = logits.detach().double().requires_grad_()
    found, expected = (
        grad(pk.token_log_prob(x, torch.tensor([0]), entropy=True, backend=name).entropy.sum(), x)[0]
        for x, name in ((logits, backend), (right, "reference"))
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("op", ["token_log_prob", "linear_token_log_prob"])
def test_a_second_derivative_of_a_compiled_function(op):
    x, weight, ids = (
        torch.randn(4, 13, dtype=torch.float64).requires_grad_(),
        torch.randn(9, 13, dtype=torch.float64),
        torch.tensor([0, 3, 8, 5]),
    )

    def f(x):
        found = pk.token_log_prob(x, ids, entropy=True) if op == "token_log_prob" else pk.linear_token_log_prob(
            x, weight, ids, entropy=True
        )  # fmt: skip
        return (found.log_prob * found.entropy).sum()

    products = []
    for function in (f, torch.compile(f, backend="eager")):
        (first,) = grad(function(x), x, create_graph=True)
        products.append(grad((first * torch.arange(52, dtype=torch.float64).view(4, 13)).sum(), x)[0])
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-10)


def test_results_that_are_changed_in_place_change_no_gradient():
    """A backward pass reads nothing that a caller has: log-probabilities of a rollout are often normalised in place."""
    logits, ids = torch.randn(4, 13, dtype=torch.float64).requires_grad_(), torch.tensor([0, 3, 12, 5])
    gradients = []
    for factor in (1, 5):
        found = pk.token_log_prob(logits, ids, entropy=True)
        for value in found.entropy.data, found.log_prob.data:  # autograd does not see what is done to these
            value.mul_(factor)
        gradients.append(grad(found.log_prob.sum() + found.entropy.sum(), logits)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", serving("linear_token_log_prob"))
def test_forward_then_reverse_through_a_head_without_bias(backend):
    hidden, weight, ids = (
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(5, 3, dtype=torch.float64),
        torch.randint(5, (4,)),
    )

    def slope(w):
        def f(w):
            found = pk.linear_token_log_prob(hidden, w, ids, entropy=True, backend=backend)
            return (found.log_prob * found.entropy).sum()

        return torch.func.jvp(f, (w,), (torch.ones_like(w),))[1]

    def plain(logits, ids):
        log_p = torch.log_softmax(logits, -1)
        return (log_p.gather(-1, ids[:, None])[:, 0] * -(log_p.exp() * log_p).sum(-1)).sum()

    def right(w):
        return torch.func.jvp(lambda w: plain(hidden @ w.mT, ids), (w,), (torch.ones_like(w),))[1]

    torch.testing.assert_close(torch.func.grad(slope)(weight), torch.func.grad(right)(weight), rtol=1e-10, atol=1e-10)
