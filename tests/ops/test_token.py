"""Token statistics against torch.distributions, autograd in float64, and at the sizes of vocabularies."""

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

import po_kernels as pk
from po_kernels import dispatch
from po_kernels.backends.contract import IGNORED, NUM_TOKEN_STATS, OPS, OpConfig

from .bounds import near
from .cases import DEVICE, draw, fused, largest, serving

F64 = {"dtype": torch.float64}
INF = float("inf")
ROWS = pytest.mark.parametrize("backend", serving("token_log_prob"))
HEAD = pytest.mark.parametrize("backend", serving("linear_token_log_prob"))
HALF = (torch.bfloat16, torch.float16)
ONLY_1 = [False, True, False]
# Roundings of a row of V logits: a sum of V terms, each of a dozen operations, and as many to put a result together.
# What multiplies exp z errs by |z| in place of 1.
A_FEW = 24


def eager(logits, ids, temperature=1.0, softcap=None):
    """(3, N), with -inf as a mask."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    z = logits / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    entropy = -(log_p.exp() * log_p.masked_fill(z == -INF, 0)).sum(-1)
    return torch.stack([log_p.gather(-1, ids[:, None])[:, 0], entropy, z.logsumexp(-1)])


def every(logits, ids, **options):
    return torch.stack(pk.token_log_prob(logits, ids, entropy=True, return_lse=True, **options))


@ROWS
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"temperature": 1.7, "softcap": 3.0}])
@pytest.mark.parametrize("classes", [1, 2, 7, 1025, 3000])
def test_values_and_derivatives(backend, classes, options):
    logits = (3 * torch.randn(4, classes, **F64)).requires_grad_()
    ids = torch.randint(classes, (4,))
    cotangent, direction = torch.randn(3, 4, **F64).requires_grad_(), torch.randn(4, classes, **F64)
    orders = []
    for found in (every(logits, ids, backend=backend, **options), eager(logits, ids, **options)):
        (first,) = grad(found, logits, cotangent, create_graph=True)
        orders.append((found, first, *grad((first * direction).sum(), (logits, cotangent))))
    z = 1 + largest([logits]) / options.get("temperature", 1.0)
    for x, y in zip(*orders, strict=True):
        near(x, y, classes + A_FEW, z * max(1.0, largest([y])))


@ROWS
def test_distributions(backend):
    logits, ids = torch.randn(5, 9, **F64), torch.randint(9, (5,))
    policy = torch.distributions.Categorical(logits=logits / 0.8)
    found = pk.token_log_prob(logits, ids, temperature=0.8, entropy=True, backend=backend)
    near(found.log_prob, policy.log_prob(ids), 9 + A_FEW)
    near(found.entropy, policy.entropy(), 9 + A_FEW)
    assert found.lse is None


@ROWS
@pytest.mark.parametrize("classes", [5, 2100])
def test_masks(backend, classes):
    """A column, a whole first block, and the taken token at -inf: finite where it should be, never nan."""
    logits = torch.randn(4, classes, **F64)
    logits[0, 2] = -INF
    logits[1, : classes - 1] = -INF
    logits[2, 3] = -INF
    logits.requires_grad_()
    ids = torch.tensor([1, classes - 1, 3, 0])
    found = every(logits, ids, backend=backend)
    right = eager(logits, ids)
    assert found[0, 2] == -INF
    assert found[:, 1].detach().tolist()[:2] == [0.0, 0.0]
    near(found, right, classes + A_FEW)
    cotangent = torch.randn(3, 4, **F64)
    (first,) = grad(found, logits, cotangent, create_graph=True)
    p = torch.softmax(logits.detach(), -1)
    log_p = torch.log_softmax(logits.detach(), -1).masked_fill(p == 0, 0)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    alpha, beta, gamma = cotangent[..., None]
    one_hot = torch.nn.functional.one_hot(ids, classes)
    near(first, alpha * (one_hot - p) - beta * p * (log_p + entropy) + gamma * p, classes + A_FEW)
    (second,) = grad((first * torch.randn(4, classes, **F64)).sum(), logits)
    assert second.isfinite().all()
    assert (second[logits == -INF] == 0).all()


@ROWS
def test_all_masked_and_ids_out_of_range(backend):
    logits = torch.zeros(3, 4)
    logits[1] = -INF
    if DEVICE != "cpu":  # where values are not read
        assert every(logits, torch.zeros(3, dtype=torch.int64), backend=backend)[:2].isnan().any(0).tolist() == ONLY_1
        found = every(torch.zeros(3, 4), torch.tensor([0, -1, 3]), backend=backend)
        assert found[:2].isnan().all(0).tolist() == ONLY_1
        return
    with pytest.raises(ValueError, match=r"token_log_prob: logits: expected a logit above -inf .* row 1"):
        pk.token_log_prob(logits, torch.zeros(3, dtype=torch.int64), backend=backend)
    for bad in (-1, 4, -(2**63)):
        with pytest.raises(ValueError, match=r"token_log_prob: token_ids: .* from 0 to 3, .*got -?\d+ in row 2"):
            pk.token_log_prob(torch.zeros(3, 4), torch.tensor([0, 3, bad]), backend=backend)


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_ignored(backend, dtype):
    """Zero, also of a row that could not be computed, and zero gradients."""
    logits = torch.randn(3, 6).to(dtype)
    logits[1] = float("nan")
    logits.requires_grad_()
    found = every(logits, torch.tensor([1, -100, 2]), ignore_index=-100, backend=backend)
    assert (found[:, 1] == 0).all()
    assert found.isfinite().all()
    (first,) = grad(found.sum(), logits)
    assert (first[1] == 0).all()
    assert first.isfinite().all()
    assert (first[0] != 0).any()


@ROWS
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_read_as_such(backend, dtype):
    """Sums are in float32: as of the same numbers in float32, but for the rounding of what is put out in half."""
    logits = (4 * torch.randn(3, 1500)).to(dtype)
    logits[0, 0], logits[1, 7] = -INF, 1e-7
    ids, cotangent, direction = torch.tensor([3, 7, 1499]), torch.randn(3, 3), torch.randn(3, 1500).to(dtype)
    results = []
    for x in (logits, logits.double()):
        x = x.clone().requires_grad_()
        found = every(x, ids, softcap=None, backend=backend if x.dtype == dtype else "reference")
        (first,) = grad(found, x, cotangent.to(found.dtype), create_graph=True)
        (second,) = grad((first * direction.to(x.dtype)).sum(), x)
        results.append((found, first, second))
    (found, first, second), right = results
    assert found.dtype == torch.float32
    assert first.dtype == second.dtype == dtype
    # Float32 rounds by 2^-24 of the largest number: a dozen operations, of logits up to 16 where log p is 10.
    rounded = 2 * 12 * 2.0**-24 * 16 / 10
    assert (found - right[0]).abs().max() < rounded * right[0].abs().max()
    # A gradient is then rounded to half precision, once: by half an eps, and as much as was to be rounded has erred.
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    assert ((first - right[1]).abs() <= 0.5 * eps * right[1].abs() + rounded * right[1].abs().max() + least).all()
    # What multiplies the direction, a gradient, was rounded to half precision in neither.
    rounded *= largest([direction])
    assert ((second - right[2]).abs() <= 0.5 * eps * right[2].abs() + rounded * right[2].abs().max() + least).all()


@pytest.mark.parametrize("backend", fused("token_log_prob"))
@pytest.mark.parametrize("dtype", HALF)
def test_every_number_in_half_precision(backend, dtype):
    """Read and rounded as torch does, to the bit: a row of all there are but nan and inf, and small ones alone."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers.abs() < 1e4)]
    small = numbers[numbers.abs() < 1e-3]
    for row in (numbers, small, numbers[:77]):
        logits = torch.stack([row, row.flip(0)])
        ids, gradients = torch.tensor([0, len(row) // 2]), []
        for x in (logits, logits.float()):
            x = x.clone().requires_grad_()
            found = every(x, ids, backend=backend)
            gradients.append((found, *grad(found, x, torch.full_like(found, 1.7))))
        (found, first), (right, first_in_float32) = gradients
        if DEVICE == "cpu":
            assert torch.equal(found, right)
            assert torch.equal(first, first_in_float32.to(dtype))
        else:  # a thread reads twice as many halves at once, so that sums are in another order
            near(found, right, len(row) + A_FEW)
            near(first, first_in_float32, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)


@ROWS
@pytest.mark.parametrize("classes", [50_000, 151_936])
def test_vocabularies(backend, classes):
    """Sums of equal and of random numbers, in float32, to some units in the last place."""
    logits = torch.stack([torch.full((classes,), 0.3), torch.randn(classes)])
    ids = torch.tensor([0, classes - 1])
    found, right = every(logits, ids, backend=backend), eager(logits.double(), ids)
    # Of equal numbers two halves of an ulp, for log and sum; in plain torch log p, about 12, is rounded by half an ulp
    # of 8 eps, which is an error of all p, twice. As much again where numbers differ.
    rel = (8 if backend == "reference" else 2) * torch.finfo(torch.float32).eps
    assert found[1, 0].item() == pytest.approx(math.log(classes), rel=rel)
    assert torch.allclose(found.double(), right, rtol=2 * rel, atol=0)


@ROWS
def test_large_logits(backend):
    logits = torch.tensor([[1e4, 1e4 - 1.0, -1e4], [3e38, -3e38, 0.0]], requires_grad=True)
    found = every(logits, torch.tensor([1, 0]), backend=backend)
    right = eager(logits.double(), torch.tensor([1, 0]))
    # Differences of such logits are exact: exp, sum, log and a product are rounded, and the result.
    assert torch.allclose(found.double(), right, rtol=5 * torch.finfo(torch.float32).eps, atol=0)
    assert all(g.isfinite().all() for g in grad(found[:2].sum(), logits))


@ROWS
def test_logits_as_far_apart_as_numbers_can_be(backend):
    logits = torch.full((1, 3000), -1e308, **F64)
    logits[0, 2000] = 1e308
    logits.requires_grad_()
    found = pk.token_log_prob(logits, torch.tensor([2000]), entropy=True, backend=backend)
    assert (found.log_prob.item(), found.entropy.item()) == (0.0, 0.0)
    assert grad(found.log_prob + found.entropy, logits)[0].isfinite().all()


@ROWS
def test_a_row_depends_on_no_other(backend):
    if DEVICE != "cpu" and backend == "reference":
        pytest.skip("of torch's own kernels there a row may depend on how many there are")
    logits, ids = torch.randn(37, 1100), torch.randint(1100, (37,))
    together = every(logits, ids, backend=backend)
    for row in (0, 17, 36):
        assert torch.equal(every(logits[row : row + 1], ids[row : row + 1], backend=backend)[:, 0], together[:, row])


@ROWS
def test_logits_are_not_written(backend):
    logits = torch.randn(3, 40, requires_grad=True)
    before = logits.detach().clone()
    every(logits, torch.tensor([1, 2, 3]), backend=backend).sum().backward()
    assert torch.equal(logits, before)


def linear(hidden, weight, bias, ids, **options):
    return torch.stack(
        pk.linear_token_log_prob(hidden, weight, ids, bias=bias, entropy=True, return_lse=True, **options)
    )


@HEAD
@pytest.mark.parametrize("rows", [0, 1, 5, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_head(backend, rows, with_bias):
    """Value, gradients and second derivatives in all inputs, over several chunks, against plain torch."""
    hidden, weight = torch.randn(rows, 6, **F64).requires_grad_(), torch.randn(11, 6, **F64).requires_grad_()
    bias = torch.randn(11, **F64).requires_grad_() if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    ids = torch.randint(11, (rows,))
    cotangent, directions = torch.randn(3, rows, **F64).requires_grad_(), [torch.randn_like(x) for x in inputs]
    orders = []
    for found in (
        linear(hidden, weight, bias, ids, temperature=0.7, chunk_rows=4, backend=backend),
        eager(torch.nn.functional.linear(hidden, weight, bias), ids, 0.7),
    ):
        first = grad(found, inputs, cotangent, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        orders.append([found, *first, *grad(along, [*inputs, cotangent])])
    # Products over 6 dimensions, statistics over 11 classes, and products over 11 or as many rows.
    z = 1 + largest([hidden @ weight.mT]) / 0.7
    for x, y in zip(*orders, strict=True):
        near(x, y, 6 + 11 + 11 + A_FEW, z * max(1.0, largest([y])))


@HEAD
def test_some_inputs_of_a_linear_head(backend):
    """Second derivatives where only some inputs have a gradient, and where only some of it is moved."""
    case = draw("linear_token_log_prob", 3, lead=(5,), dim=7, group=4, chunk_rows=2)
    for name in case.tensors:
        x = case.tensors[name].clone().requires_grad_()
        rest = {key: value for key, value in case.tensors.items() if key != name}

        def run(x, rest=rest, name=name):
            found = pk.linear_token_log_prob(**rest, **{name: x}, **case.constants, **case.options, backend=backend)
            return found.log_prob + 0.3 * found.entropy

        assert gradcheck(run, x)
        assert gradgradcheck(run, x)


@HEAD
def test_ignored_rows_of_a_linear_head(backend):
    """What stands there reaches no gradient."""
    hidden, weight = torch.randn(3, 4, **F64), torch.randn(5, 4, **F64).requires_grad_()
    hidden[1] = float("nan")
    hidden.requires_grad_()
    found = linear(hidden, weight, None, torch.tensor([0, -7, 1]), ignore_index=-7, backend=backend)
    for g in grad(found.sum(), [hidden, weight]):
        assert g.isfinite().all()


@HEAD
def test_tied_weights(backend):
    weight, ids = torch.randn(12, 5, **F64).requires_grad_(), torch.tensor([3, 0, 11])
    results = []
    for log_prob in (
        lambda hidden: pk.linear_token_log_prob(hidden, weight, ids, backend=backend).log_prob,
        lambda hidden: eager(hidden @ weight.mT, ids)[0],
    ):
        (first,) = grad(log_prob(weight[[1, 3, 3]].tanh()).sum(), weight, create_graph=True)
        results.append((first, grad(first.square().sum(), weight)[0]))
    for x, y in zip(*results, strict=True):  # products over 5 dimensions, and statistics over 12 classes, both twice
        near(x, y, 2 * (5 + 12 + A_FEW))


@pytest.mark.parametrize("backend", fused("token_log_prob"))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backward_pass_that_knows_the_value(backend, softcap, dtype):
    """It has the gradient of one that finds the value again, also of rows whose logits have much in common."""
    row, kernel = OPS["token_log_prob"], dispatch.kernel("token_log_prob", backend)
    logits = 3 * torch.randn(5, 700, dtype=dtype) + torch.tensor([0, 100, -1000, 0, 0], dtype=dtype)[:, None]
    logits[1, :600] = -INF
    ids, config = torch.tensor([3, 650, 699, IGNORED, 0]), OpConfig(temperature=0.7, softcap=softcap)
    cotangent = torch.randn(NUM_TOKEN_STATS, 5, dtype=dtype)

    def gradient(known):
        return list(kernel(row.request([logits], [ids, known], None, cotangent, None, [True], False, config)))

    value, _, right = gradient(None)
    again, _, found = gradient(value)
    assert torch.equal(value[:3], again[:3])
    largest = cotangent.abs().sum() * (1 + value[1].abs().max()) / 0.7
    near(found, right, 100, largest.item())


@pytest.mark.skipif("native" not in fused("token_log_prob"), reason="the extension was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_a_gradient_takes_the_place_of_logits_as_they_lie(dtype):
    row, kernel = OPS["token_log_prob"], dispatch.kernel("token_log_prob", "native")
    for classes in (32, 33):
        memory = torch.randn(3, 64).to(dtype)
        logits, beyond = memory[:, :classes], memory[:, classes:].clone()
        ids = torch.tensor([0, IGNORED, classes - 1])
        right, found = (
            kernel(row.request([logits], [ids, None], None, None, None, [True], False, OpConfig(overwrite=overwrite)))[
                2
            ]
            for overwrite in (False, True)
        )
        assert found.data_ptr() == memory.data_ptr()
        assert torch.equal(found, right)
        assert torch.equal(memory[:, classes:], beyond)


@pytest.mark.parametrize("backend", fused("linear_token_log_prob"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "classes"), [(48, 1000), (577, 1023), (17, 5), (7, 257), (5, 4099), (1, 2)])
def test_a_row_of_a_linear_head_depends_on_no_other(backend, dtype, size, classes):
    """To the bit, nor on its place: the same row 140 times and alone, in results and gradients of both orders."""
    row, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((1, size), (classes, size), (classes,)))
    along, ids = torch.randn(1, size).to(dtype), torch.randint(classes, (1,))

    def results(rows):
        hidden = row.repeat(rows, 1).requires_grad_()
        found = linear(hidden, weight, bias, ids.repeat(rows), backend=backend)
        (first,) = grad(found.sum(), hidden, create_graph=backend != "numba")
        second = grad((first * along).sum(), hidden) if backend != "numba" else ()  # the reference's there
        return [found.mT, first, *second]

    for many, one in zip(results(140), results(1), strict=True):
        assert torch.equal(many, one.expand_as(many))


@HEAD
@pytest.mark.skipif(DEVICE != "cpu", reason="values on a device are not read")
def test_a_linear_head_names_rows(backend):
    hidden, weight, bias = torch.zeros(5, 3), torch.zeros(4, 3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"linear_token_log_prob: token_ids: .* from 0 to 3, .*got 4 in row 3"):
        pk.linear_token_log_prob(hidden, weight, torch.tensor([0, 1, 2, 4, 1]), chunk_rows=2, backend=backend)
    with pytest.raises(ValueError, match=r"linear_token_log_prob: hidden, weight: .* row 0"):
        ids = torch.zeros(5, dtype=torch.int64)
        pk.linear_token_log_prob(hidden, weight, ids, bias=bias - INF, chunk_rows=2, backend=backend)


BAD = {
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected a positive number, got -1.0"),
    "ids": ({"token_ids": torch.zeros(2)}, TypeError, "token_ids: expected an integer tensor, got torch.float32"),
    "shape": (
        {"token_ids": torch.tensor([1], device=DEVICE)},
        ValueError,
        r"token_ids: expected shape \(2,\), got \(1,\)",
    ),
    "logits": ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits: expected a floating tensor"),
    "empty": ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: expected shape \(\*, V\) with V of at least 1"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an integer"),
    "entropy": ({"entropy": 1}, TypeError, "entropy: expected True or False"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, error, message = BAD[name]
    arguments = {"logits": torch.zeros(2, 3), "token_ids": torch.tensor([0, 2]), **changes}
    with pytest.raises(error, match=f"token_log_prob: {message}"):
        pk.token_log_prob(**arguments)


@ROWS
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 126), (torch.bfloat16, 126), (torch.float64, 1022)])
def test_scales_at_the_ends_of_the_dtype(backend, dtype, bits):
    """Scales are taken as far as they and their reciprocals are normal numbers, and named by every backend beyond."""
    least, most = 2.0**-bits, 2.0**bits
    logits, ids = torch.tensor([[0.0, 1.0, -1.0]], dtype=dtype, requires_grad=True), torch.tensor([1])
    plain = torch.log_softmax(logits.detach().double(), -1)[0, 1].item()
    for options, right in (
        ({"temperature": least}, 0.0), ({"temperature": most}, -math.log(3)), ({"softcap": least}, -math.log(3)),
        ({"softcap": most}, plain), ({"softcap": most, "temperature": most}, -math.log(3)),
    ):  # fmt: skip
        found = every(logits, ids, backend=backend, **options)
        assert found[0].item() == pytest.approx(right, rel=1e-6)  # some units of float32
        assert found.isfinite().all()
        assert grad(found[0], logits)[0].isfinite().all()
    for options in (
        {"temperature": least / 2}, {"temperature": most * 2}, {"softcap": least / 2}, {"softcap": most * 2},
        {"softcap": least, "temperature": 2.0}, {"softcap": most, "temperature": 0.5},
    ):  # fmt: skip
        for op, arguments in (("token_log_prob", ()), ("linear_token_log_prob", (torch.eye(3, dtype=dtype),))):
            message = rf"{op}: {next(iter(options))}.*: expected a number from .* got"
            with pytest.raises(ValueError, match=message):
                getattr(pk, op)(logits, *arguments, ids, backend=backend, **options)


def test_bad_heads():
    hidden, ids = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"linear_token_log_prob: weight: expected shape \(V, 3\)"):
        pk.linear_token_log_prob(hidden, torch.zeros(4, 2), ids)
    with pytest.raises(ValueError, match=r"linear_token_log_prob: bias: expected shape \(4,\), got \(3,\)"):
        pk.linear_token_log_prob(hidden, torch.zeros(4, 3), ids, bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"linear_token_log_prob: chunk_rows: expected an integer of at least 1"):
        pk.linear_token_log_prob(hidden, torch.zeros(4, 3), ids, chunk_rows=0)
