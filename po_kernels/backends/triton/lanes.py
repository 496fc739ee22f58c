"""Numbers with or without a tangent, in Triton.

The rows are written once for two kinds of numbers: tensors, and pairs (value, tangent) of them that carry a derivative
along. A tensor beside pairs is a constant. On pairs, the code of a gradient gives the derivative of that gradient:
there is no second-order code to write. `value` drops a derivative, `output` is what a kernel stores.

Names in capitals are compile-time constants; T is the dtype that is computed with.
"""

import triton
import triton.language as tl


@triton.jit
def value(a):
    if isinstance(a, tl.tensor):
        return a
    else:
        return a[0]


@triton.jit
def output(a, DUAL: tl.constexpr):
    """The value, or on pairs the tangent, which a constant among them has not."""
    if isinstance(a, tl.tensor):
        if DUAL:
            return tl.zeros_like(a)
        else:
            return a
    else:
        return a[1]


@triton.jit
def constant(a, DUAL: tl.constexpr):
    """A tensor as a number that a loop may change."""
    if DUAL:
        return a, tl.zeros_like(a)
    else:
        return a


@triton.jit
def times(a, c):
    """c has no derivative."""
    if isinstance(a, tl.tensor):
        return a * c
    else:
        return a[0] * c, a[1] * c


@triton.jit
def plus(a, c):
    """c has no derivative."""
    if isinstance(a, tl.tensor):
        return a + c
    elif isinstance(c, tl.tensor):
        return a[0] + c, a[1] + tl.zeros_like(c)  # of the shape that both have together
    else:
        return a[0] + c, a[1]


@triton.jit
def mul(a, b):
    if isinstance(b, tl.tensor):
        return times(a, b)
    elif isinstance(a, tl.tensor):
        return times(b, a)
    else:
        return a[0] * b[0], a[0] * b[1] + a[1] * b[0]


@triton.jit
def add(a, b):
    if isinstance(b, tl.tensor):
        return plus(a, b)
    elif isinstance(a, tl.tensor):
        return plus(b, a)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def negative(a):
    if isinstance(a, tl.tensor):
        return -a
    else:
        return -a[0], -a[1]


@triton.jit
def sub(a, b):
    return add(a, negative(b))


@triton.jit
def square(a):
    if isinstance(a, tl.tensor):
        return a * a
    else:
        return a[0] * a[0], 2 * a[0] * a[1]


@triton.jit
def inverse(a):
    if isinstance(a, tl.tensor):
        return 1 / a
    else:
        y = 1 / a[0]
        return y, -y * y * a[1]


@triton.jit
def exp(a):
    if isinstance(a, tl.tensor):
        return tl.exp(a)
    else:
        y = tl.exp(a[0])
        return y, y * a[1]


@triton.jit
def log(a):
    if isinstance(a, tl.tensor):
        return tl.log(a)
    else:
        return tl.log(a[0]), a[1] / a[0]


@triton.jit
def square_root(a):
    if isinstance(a, tl.tensor):
        return tl.sqrt(a)
    else:
        y = tl.sqrt(a[0])
        return y, 0.5 * a[1] / y


@triton.jit
def total(a, AXIS: tl.constexpr):
    """The sum over an axis, which is kept."""
    if isinstance(a, tl.tensor):
        return tl.sum(a, axis=AXIS, keep_dims=True)
    else:
        return tl.sum(a[0], axis=AXIS, keep_dims=True), tl.sum(a[1], axis=AXIS, keep_dims=True)


@triton.jit
def choose(mask, a, b):
    """a and b of one kind."""
    if isinstance(a, tl.tensor):
        return tl.where(mask, a, b)
    else:
        return tl.where(mask, a[0], b[0]), tl.where(mask, a[1], b[1])


@triton.jit
def masked(mask, a):
    """Zero, with no derivative, where the mask is not set, whatever stands there."""
    if isinstance(a, tl.tensor):
        return tl.where(mask, a, 0)
    else:
        return tl.where(mask, a[0], 0), tl.where(mask, a[1], 0)


@triton.jit
def or_one(mask, a):
    """The constant 1 where the mask is not set."""
    if isinstance(a, tl.tensor):
        return tl.where(mask, a, 1)
    else:
        return tl.where(mask, a[0], 1), tl.where(mask, a[1], 0)


@triton.jit
def shaped(a, SHAPE: tl.constexpr):
    if isinstance(a, tl.tensor):
        return tl.reshape(a, SHAPE)
    else:
        return tl.reshape(a[0], SHAPE), tl.reshape(a[1], SHAPE)


@triton.jit
def load(pointer, tangent, offsets, mask, OTHER: tl.constexpr, DUAL: tl.constexpr, T: tl.constexpr):
    """Reads an input and, on pairs, its tangent, which has the same strides."""
    if DUAL:
        return (
            tl.load(pointer + offsets, mask, OTHER).to(T),
            tl.load(tangent + offsets, mask, 0).to(T),
        )
    else:
        return tl.load(pointer + offsets, mask, OTHER).to(T)


@triton.jit
def number(x, T: tl.constexpr):
    """An option that the kernel takes in float64, as a tensor."""
    return tl.full((), x, T)


@triton.jit
def accumulate(pointer, offsets, mask, x):
    """Adds to memory that belongs to this program. All its threads see the sum before any goes on."""
    tl.store(pointer + offsets, tl.load(pointer + offsets, mask, 0) + x, mask)
    tl.debug_barrier()
