"""The interpreter itself: instructions against what the manual of PTX says, and faults planted in real kernels."""

import re

import numpy as np
import pytest
import torch

from tests.ops.cases import LOSSES, draw

from .calls import Calls, Edit, program, simulated
from .machine import Counts, launch
from .memory import Fault, Memory

THREADS = 64

PTX = """
.version 8.8
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<9>;
  .shared .align 16 .b8 held[4096];
  ld.param.u64 %rd1, [kernel_param_0];
  ld.param.u64 %rd2, [kernel_param_1];
  mov.u32 %r0, %tid.x;
  mul.wide.u32 %rd3, %r0, 4;
  add.s64 %rd1, %rd1, %rd3;
  add.s64 %rd2, %rd2, %rd3;
  ld.global.b32 %r1, [%rd1];
  {body}
  st.global.b32 [%rd2], %r2;
  ret;
}}
"""


def ran(body: str, given: np.ndarray | None = None, blocks: int = 1) -> tuple[np.ndarray, Counts]:
    """What r2 is in each thread, of a number each in r1, the thread's own by default."""
    given = np.arange(THREADS, dtype="u4") if given is None else given
    found, memory = np.zeros(THREADS, "u4"), Memory()
    addresses = [array.ctypes.data for array in (given, found)]
    for name, address in zip(("given", "found"), addresses, strict=True):
        memory.add("global", name, address, 4 * THREADS, 4, None, name == "given")
    counts = launch(program(PTX.format(body=body), THREADS), memory, (blocks,), np.array(addresses, "u8").tobytes())
    return found, counts


def bits(x: float) -> int:
    return int(np.float32(x).view("u4"))


@pytest.mark.parametrize(
    ("body", "given", "expected"),
    [
        ("bfe.u32 %r2, %r1, 4, 8;", 0xABCDE, 0xCD),
        ("bfe.s32 %r2, %r1, 4, 8;", 0xABCDE, 0xFFFFFFCD),
        ("prmt.b32 %r2, %r1, 0x55667788, 0x7BA0;", 0x11223344, 0x55000044),
        ("mul.hi.u32 %r2, %r1, %r1;", 0xFFFFFFFF, 0xFFFFFFFE),
        ("mul.hi.s32 %r2, %r1, 2;", 0xFFFFFFFF, 0xFFFFFFFF),
        ("cvt.u64.u32 %rd4, %r1; mul.hi.u64 %rd4, %rd4, 0xFFFFFFFFFFFFFFFF; cvt.u32.u64 %r2, %rd4;", 7, 6),
        ("mad.lo.s32 %r2, %r1, %r1, -1;", 0x10001, 0x20000),
        ("shf.l.wrap.b32 %r2, 0x80000000, %r1, 4;", 0x1, 0x18),
        ("shr.s32 %r2, %r1, 40;", 0x80000000, 0xFFFFFFFF),
        ("shl.b32 %r2, %r1, 32;", 0x80000000, 0),
        ("div.s32 %r2, %r1, 2;", 0xFFFFFFF9, 0xFFFFFFFD),
        ("clz.b32 %r2, %r1;", 0xF0F, 20),
        ("fma.rn.f32 %r2, %r1, %r1, 0fBF800000;", bits(1 + 2**-12), bits(2**-11 + 2**-24)),
        ("max.f32 %r2, %r1, 0f3F800000;", bits(float("nan")), bits(1)),
        ("mul.rn.ftz.f32 %r2, %r1, 0f3F000000;", bits(2.0**-126), 0),
        ("cvt.rzi.s32.f32 %r2, %r1;", bits(-2.75), 0xFFFFFFFE),
        ("cvt.rni.f32.f32 %r2, %r1;", bits(2.5), bits(2)),
        ("cvt.rzi.s32.f32 %r2, %r1;", bits(1e20), 0x7FFFFFFF),
        ("cvt.rn.bf16.f32 %h1, %r1; cvt.u32.u16 %r2, %h1;", 0x3F808000, 0x3F80),
        ("cvt.rn.bf16x2.f32 %r2, %r1, 0f3F818000;", 0x3F808001, 0x3F813F82),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r2, {%h2, %h1};", 0x12345678, 0x56781234),
        ("setp.lt.f32 %p1, %r1, 0f00000000; selp.b32 %r2, 1, 2, %p1;", bits(float("nan")), 2),
        ("setp.geu.f32 %p1, %r1, 0f00000000; selp.b32 %r2, 1, 2, %p1;", bits(float("nan")), 1),
        ("setp.neu.f32 %p1|%p2, %r1, %r1; selp.b32 %r2, 1, 2, %p2;", bits(float("nan")), 2),
    ],
)  # fmt: skip
def test_arithmetic(body, given, expected):
    found, _ = ran(body, np.full(THREADS, given, "u4"))
    assert (found == expected).all(), hex(found[0])


def test_float64():
    """A product and its rounding error, which fma gives."""
    x, y = 1 + 2.0**-30, 1 + 2.0**-40
    a, b = (f"0d{np.float64(v).view('u8'):016X}" for v in (x, y))
    body = f"""mul.rn.f64 %rd4, {a}, {b}; neg.f64 %rd5, %rd4; fma.rn.f64 %rd4, {a}, {b}, %rd5;
      cvt.rn.f32.f64 %r2, %rd4;"""
    assert ran(body)[0][0] == bits(2.0**-70)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("bfly.b32 %r2, %r1, 1, 31", lambda i: i ^ 1),
        ("down.b32 %r2, %r1, 4, 31", lambda i: np.where(i % 32 < 28, i + 4, i)),
        ("up.b32 %r2, %r1, 4, 0", lambda i: np.where(i % 32 < 4, i, i - 4)),
        ("idx.b32 %r2, %r1, 3, 31", lambda i: i - i % 32 + 3),
        ("bfly.b32 %r2, %r1, 1, 0x1f", lambda i: i ^ 1),
        ("idx.b32 %r2, %r1, 1, 0x1c1f", lambda i: i - i % 4 + 1),
    ],
)
def test_shuffles(how, expected):
    assert (ran(f"shfl.sync.{how}, -1;")[0] == expected(np.arange(THREADS))).all()


def test_threads_leave_a_loop_one_after_another():
    body = """mov.b32 %r2, 0; mov.b32 %r3, 0;
$again:
      setp.ge.u32 %p1, %r3, %r0; @%p1 bra $done;
      add.s32 %r3, %r3, 1; add.s32 %r2, %r2, %r3; bra $again;
$done:
      bar.sync 0;"""
    i = np.arange(THREADS)
    found, counts = ran(body)
    assert (found == i * (i + 1) // 2).all()
    assert counts.instructions > 4 * (32 + 64)  # of two warps, as often as the slowest thread of each


def test_local_memory_is_that_of_a_thread():
    body = ".local .align 4 .b8 own[8]; st.local.b32 [own+4], %r1; mov.u64 %rd4, own; ld.local.b32 %r2, [%rd4+4];"
    assert (ran(body)[0] == np.arange(THREADS)).all()


def stored(stride: int, size: int = 4) -> str:
    width = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    values = "{" + ", ".join(["%r1"] * (size // 4)) + "}"
    at = f"mul.lo.s32 %r3, %r0, {stride}; mov.b32 %r4, held; add.s32 %r4, %r4, %r3;"
    return f"{at} st.shared.{width} [%r4], {values};"


@pytest.mark.parametrize(
    ("stride", "size", "conflicts"), [(4, 4, 0), (8, 4, 2), (64, 4, 30), (8, 8, 0), (16, 16, 0), (32, 16, 8)]
)
def test_bank_conflicts(stride, size, conflicts):
    _, counts = ran(stored(stride, size) + "mov.b32 %r2, %r1;")
    assert counts.conflicts == conflicts
    assert counts.read == counts.written == 4 * THREADS


# ---- Faults ----

NEIGHBOUR = "xor.b32 %r3, %r3, {}; mov.b32 %r4, held; add.s32 %r4, %r4, %r3; ld.shared.b32 %r2, [%r4];"


PASSED = "setp.lt.u32 %p1, %r0, {}; @%p1 bra $on; {}\n$on:\n"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (stored(4) + "bar.sync 0;" + NEIGHBOUR.format(128), None),
        (stored(4) + "bar.warp.sync -1;" + NEIGHBOUR.format(4), None),
        (stored(4) + NEIGHBOUR.format(128), "race: a read after a write"),
        (stored(4) + "bar.warp.sync -1;" + NEIGHBOUR.format(128), "race: a read after a write"),
        (stored(4) + NEIGHBOUR.format(4), "race: a read after a write"),
        (stored(4) + "bar.sync 0;" + NEIGHBOUR.format(128) + stored(4).replace("%r1}", "%r2}"), "race: a write after"),
        (stored(0), "race: two writes"),
        (stored(4) + "bar.sync 0;" + NEIGHBOUR.format(256), "unwritten: byte 256 of shared"),
        (stored(64) + "bar.sync 0; ld.shared.b32 %r2, [held+4096];", "out of bounds: 4 bytes at byte 4096 of shared"),
        ("ld.global.b32 %r2, [%rd1+4];", "out of bounds: 4 bytes at byte 256 of given, 256 bytes, by thread 63"),
        ("ld.global.b32 %r2, [%rd1+2];", "misaligned"),
        ("ld.global.b32 %r2, [%rd2];", "unwritten: byte 0 of found"),
        ("ld.shared.b32 %r2, [%rd1];", "not in shared memory"),
        (PASSED.format(32, "bar.sync 0;") + "mov.b32 %r2, 0;", "divergent barrier: 32 threads"),
        (PASSED.format(9, "bar.sync 0;") + "bar.sync 0;", "divergent barrier: 55 threads"),
        (PASSED.format(9, "shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;"), "divergent barrier"),
    ],
)  # fmt: skip
def test_small_faults(body, complaint):
    if complaint is None:
        ran(body)
        return
    with pytest.raises(Fault, match=f"^{complaint}.*line"):
        ran(body)


def test_blocks_have_no_barrier_between_them():
    ran("mov.b32 %r2, %r1;", blocks=2)  # the same from both
    with pytest.raises(Fault, match=r"^race: two writes of byte 0 of found, threads 0 and 0 of two blocks"):
        ran("bar.sync 0; mov.u32 %r2, %ctaid.x; bar.sync 0;", blocks=2)


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"^line \d+: frob\.s32"):
        ran("frob.s32 %r2, %r1, %r1;")


# ---- What Triton compiles ----


@pytest.mark.parametrize(
    "op", ["gaussian_log_prob", "categorical_log_prob", "token_log_prob", "group_advantage", "gae"]
)
def test_against_the_reference(op):
    """A few kernels, in both orders: `make test-ptx` has all."""
    pytest.importorskip("triton", reason="triton is not installed")
    from .every_triton_kernel import agrees

    calls = agrees(draw(op, 1, torch.float32, lead=(5,), dim=3, group=5))
    assert all(counts.instructions > 0 and counts.written > 0 for _, counts in calls.counts)


def run(op: str, edit: Edit) -> Calls:
    """First order of five rows, which are no multiple of a block's."""
    pytest.importorskip("triton", reason="triton is not installed")
    from .triton_calls import TritonCalls

    how = {"precision_kind": "diagonal", "estimator": "dice", "reduction": "mean"} if op in LOSSES else {}
    case = draw(op, 1, torch.float32, lead=(5,), dim=3, group=5, **how)
    with simulated(TritonCalls(80, edit)) as calls:
        torch.autograd.grad(case(*(inputs := case.inputs), backend="triton").sum(), inputs)
    return calls


def texts_of(op: str) -> list[str]:
    """The PTX of the launches of a call, each once."""
    found: dict[str, None] = {}
    run(op, lambda text: found.setdefault(text) or text)
    return list(found)


@pytest.mark.parametrize("op", ["gaussian_surrogate_loss", "gaussian_log_prob", "group_advantage"])
def test_each_barrier_is_missed(op):
    """But the first of a kernel, where it is before any store."""
    missed, number = [], 0
    for text in texts_of(op):
        for place in re.finditer(r"bar\.sync\s", text):
            number += 1
            without = text[: place.start()] + "//" + text[place.start() :]
            try:
                run(op, lambda each, text=text, without=without: without if each == text else each)
            except Fault as fault:
                missed += [fault] if str(fault).startswith("race") else []
    assert number >= 6
    assert len(missed) >= number - 1


@pytest.mark.parametrize("op", ["gaussian_surrogate_loss", "gaussian_log_prob", "categorical_log_prob"])
@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        (r"@%p\w+ (ld\.global)", r"\1", "out of bounds"),
        (r"@%p\w+ (st\.global)", r"\1", "out of bounds|race: two writes"),
        (r"(setp\.lt)(\.s64)", r"setp.le\2", "out of bounds"),
        (r"(st\.global\.b32 \[ %rd\d+ \+) 0", r"\1 4", "out of bounds|race|unwritten"),
        (r"(ld\.global\.b32 .*\[ %rd\d+ \+) 0", r"\1 4", "out of bounds"),
        (r"\bst\.shared", "//", "unwritten"),
    ],
    ids=["load-unmasked", "store-unmasked", "one-row-more", "store-off-by-one", "load-off-by-one", "shared-unwritten"],
)
def test_faults_of_masks_and_indices(op, pattern, replacement, complaint):
    with pytest.raises(Fault, match=f"^({complaint})"):
        run(op, lambda text: re.sub(pattern, replacement, text))


@pytest.mark.parametrize("threads", [16, 32])
def test_a_barrier_that_some_threads_pass_by(threads):
    passed = f"mov.u32 %rz0, %tid.x; setp.lt.u32 %pz0, %rz0, {threads}; @%pz0 bra $passed;\nbar.sync 0;\n$passed:\n"
    declared = ".reg .b32 %rz<1>;\n.reg .pred %pz<1>;\n.reg .pred"

    def edit(text: str) -> str:
        return re.sub(r"bar\.sync\s+0;", passed, text, count=1).replace(".reg .pred", declared, 1)

    with pytest.raises(Fault, match=r"^divergent barrier"):
        run("gaussian_surrogate_loss", edit)
