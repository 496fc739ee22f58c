"""Numbers with or without a tangent, in Triton.

The rows are written once for two kinds of numbers: tensors, and pairs (value, tangent) of them that carry a derivative
along. A tensor beside pairs is a constant. On pairs, the code of a gradient gives the derivative of that gradient:
there is no second-order code to write. `value` drops a derivative, `output` is what a kernel stores.

Names in capitals are compile-time constants, and K is all of those of a launch, see `launch.Constants`: K.T is the
dtype that is computed with, and K.DUAL says whether numbers are pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

LEAST = tl.constexpr((2.0**-126, 2.0**-1022))  # normal numbers of float32 and float64; their inverses are normal too
LIFT = tl.constexpr(2.0**64)
RUN = tl.constexpr(64)  # terms in an accumulator of float32


class Pair(NamedTuple):
    """An input in memory, and its tangent of the same strides; without one the input again, which is not read.

    Strides are arguments of their own: in a tuple they have 32 bits, which takes more registers, and those that depend
    on the number of rows would have kernels compiled anew.
    """

    value: Any
    tangent: Any

    def of(self, change: Callable[[Any], Any]) -> "Pair":
        """Both as they are to lie in memory, once where they are the same."""
        value = change(self.value)
        return Pair(value, value if self.tangent is self.value else change(self.tangent))


@triton.jit
def value(a):
    return a if isinstance(a, tl.tensor) else a[0]


@triton.jit
def output(a, K: tl.constexpr):
    """The value, or on pairs the tangent, which a constant among them has not."""
    if isinstance(a, tl.tensor):
        return tl.zeros_like(a) if K.DUAL else a
    else:
        return a[1]


@triton.jit
def constant(a, K: tl.constexpr):
    """A tensor as a number that a loop may change."""
    return (a, tl.zeros_like(a)) if K.DUAL else a


@triton.jit
def times(a, c):
    """c has no derivative."""
    return a * c if isinstance(a, tl.tensor) else (a[0] * c, a[1] * c)


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
def mul_add(a, b, c):
    """a b + c, of tensors rounded once. A compiler that may fuse at will would let threads differ in the same sum."""
    if isinstance(a, tl.tensor) and isinstance(b, tl.tensor) and isinstance(c, tl.tensor):
        return tl.fma(a, b, c)
    elif isinstance(a, tl.tensor) and isinstance(b, tl.tensor):
        return tl.fma(a, b, c[0]), c[1]
    elif isinstance(c, tl.tensor):
        return add(mul(a, b), c)
    elif isinstance(b, tl.tensor):
        return tl.fma(a[0], b, c[0]), tl.fma(a[1], b, c[1])
    elif isinstance(a, tl.tensor):
        return tl.fma(b[0], a, c[0]), tl.fma(b[1], a, c[1])
    else:
        return tl.fma(a[0], b[0], c[0]), tl.fma(a[0], b[1], tl.fma(a[1], b[0], c[1]))


@triton.jit
def negative(a):
    return -a if isinstance(a, tl.tensor) else (-a[0], -a[1])


@triton.jit
def sub(a, b):
    return add(a, negative(b))


@triton.jit
def square(a):
    return a * a if isinstance(a, tl.tensor) else (a[0] * a[0], 2 * a[0] * a[1])


@triton.jit
def inverse(a):
    if isinstance(a, tl.tensor):
        return 1 / a
    else:
        y = 1 / a[0]
        return y, -y * y * a[1]


@triton.jit
def divide(a, b):
    """a / b, where the inverse of b may be inf: b may be subnormal."""
    if isinstance(b, tl.tensor):
        return a / b if isinstance(a, tl.tensor) else (a[0] / b, a[1] / b)
    elif isinstance(a, tl.tensor):
        y = divide(a, b[0])
        return y, divide(-y * b[1], b[0])
    else:
        y = divide(a[0], b[0])
        return y, divide(a[1] - y * b[1], b[0])


@triton.jit
def power_of_two(x):
    """One near x, which is not negative; a normal number, as its inverse is."""
    if x.dtype == tl.float64:
        power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        return tl.minimum(tl.maximum(power, LEAST[1]), 1 / LEAST[1])
    else:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        return tl.minimum(tl.maximum(power, LEAST[0]), 1 / LEAST[0])


@triton.jit
def exp(a):
    if isinstance(a, tl.tensor):
        return tl.exp(a)
    else:
        y = tl.exp(a[0])
        return y, y * a[1]


@triton.jit
def log(a):
    return tl.log(a) if isinstance(a, tl.tensor) else (tl.log(a[0]), a[1] / a[0])


@triton.jit
def total(a, AXIS: tl.constexpr):
    """The sum over an axis, which is kept."""
    if isinstance(a, tl.tensor):
        return tl.sum(a, axis=AXIS, keep_dims=True)
    else:
        return tl.sum(a[0], axis=AXIS, keep_dims=True), tl.sum(a[1], axis=AXIS, keep_dims=True)


@triton.jit
def split(x):
    """x as a sum of 11 bits, which tensor cores read, and the rest, which is none where x is not finite."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, tl.where(high == x, 0, x - high)


@triton.jit
def matrices(x, EACH: tl.constexpr):
    """The samples of x (BLOCK_D, B, G) as columns of two matrices, a thread's two in each, or of one, given twice."""
    COUNT: tl.constexpr = x.shape[1] * x.shape[2]
    if EACH == 2:
        return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, COUNT // 2)), (0, 2, 1)))
    else:
        whole = tl.reshape(x, (x.shape[0], COUNT))
        return whole, whole


@triton.jit
def product(before, a, b):
    """before + a bᵀ of float32 matrices."""
    high, low = split(a)
    b_high, b_low = split(b)
    before = tl.dot(low, tl.trans(b_high), before, input_precision="tf32")
    before = tl.dot(high, tl.trans(b_low), before, input_precision="tf32")
    return tl.dot(high, tl.trans(b_high), before, input_precision="tf32")


@triton.jit
def add_product(before, a, b, EACH: tl.constexpr):
    a0, a1 = matrices(a, EACH)
    b0, b1 = matrices(b, EACH)
    before = product(before, a0, b0)
    if EACH == 2:
        before = product(before, a1, b1)
    return before


@triton.jit
def add_products(before, a, b, K: tl.constexpr):
    """before + Σ_bg a bᵀ, (BLOCK_D, BLOCK_D), for float32 tiles (BLOCK_D, B, G); on pairs that of the tangent.

    Of the products of what `split` makes, the one left out is at most 2^-22 of the whole, and so is what tensor cores
    do not read of the rest of either factor: at most 3 2^-22 = 6 eps of each product.
    """
    if not K.DUAL:
        return add_product(before, a, b, K.EACH)
    elif isinstance(a, tl.tensor):
        return add_product(before, a, b[1], K.EACH)
    elif isinstance(b, tl.tensor):
        return add_product(before, a[1], b, K.EACH)
    else:
        return add_product(add_product(before, a[0], b[1], K.EACH), a[1], b[0], K.EACH)


@triton.jit
def square_product(before, x):
    high, low = split(x)
    before = tl.dot(high, tl.trans(2 * low), before, input_precision="tf32")
    return tl.dot(high, tl.trans(high), before, input_precision="tf32")


@triton.jit
def add_squares(before, x, EACH: tl.constexpr):
    """before + Σ_bg x xᵀ as far as its symmetric part, with the error of `add_products`."""
    x0, x1 = matrices(x, EACH)
    before = square_product(before, x0)
    if EACH == 2:
        before = square_product(before, x1)
    return before


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
    return tl.where(mask, a, 0) if isinstance(a, tl.tensor) else (tl.where(mask, a[0], 0), tl.where(mask, a[1], 0))


@triton.jit
def zeros(SHAPE: tl.constexpr, K: tl.constexpr):
    return constant(tl.zeros(SHAPE, K.T), K)


@triton.jit
def nothing(SHAPE: tl.constexpr, K: tl.constexpr):
    """Where sums begin: -0, to which a compiler adds by doing nothing, as 0 + -0 is 0."""
    return constant(tl.full(SHAPE, -0.0, K.T), K)


@triton.jit
def no_sum(SHAPE: tl.constexpr, K: tl.constexpr):
    """`nothing` for a sum over chunks: in float64 where they are too many for one accumulator."""
    return constant(tl.full(SHAPE, -0.0, tl.float64 if K.LONG else K.T), K)


@triton.jit
def rounded(a, K: tl.constexpr):
    return a.to(K.T) if isinstance(a, tl.tensor) else (a[0].to(K.T), a[1].to(K.T))


@triton.jit
def alone(mask, a):
    """`masked` for a sum over a single entry."""
    if isinstance(a, tl.tensor):
        return tl.where(mask, a, -0.0)
    else:
        return tl.where(mask, a[0], -0.0), tl.where(mask, a[1], -0.0)


@triton.jit
def load(x, offsets, mask, OTHER: tl.constexpr, K: tl.constexpr):
    """Reads an input: on pairs its tangent too."""
    if K.DUAL:
        return tl.load(x.value + offsets, mask, OTHER), tl.load(x.tangent + offsets, mask, 0)
    else:
        return tl.load(x.value + offsets, mask, OTHER)


@triton.jit
def load_whole(x, offsets, K: tl.constexpr):
    """`load` where all is inside."""
    if K.DUAL:
        return tl.load(x.value + offsets), tl.load(x.tangent + offsets)
    else:
        return tl.load(x.value + offsets)


@triton.jit
def dimensions(SHAPE: tl.constexpr):
    """The number of its dimension for each entry of a tile."""
    return tl.arange(0, SHAPE[0])[:, None, None] + tl.zeros(SHAPE, tl.int32)


@triton.constexpr_function
def is_thin(d):
    """Whether dimensions (BLOCK_D, 1, 1) are not those of each sample."""
    return d.shape[1] * d.shape[2] == 1


@triton.jit
def load_vector(x, offset, inside, d, K: tl.constexpr):
    """A vector of each row, which begins at `offset` (1, B, 1), as a tile of the shape of d; zero beyond K.dim.

    Where d has a number for each sample, the vector is read by components: read as a whole it would lie across threads,
    and Triton would lay the tiles of samples likewise.
    """
    if is_thin(d):
        return load(x, offset + d, inside & (d < K.dim), 0, K)
    else:
        result = zeros(d.shape, K)
        for i in tl.static_range(K.dim):
            result = choose(d == i, load(x, offset + i, inside, 0, K), result)
        return result


@triton.jit
def number(x, K: tl.constexpr):
    """An option that the kernel takes in float64, as a tensor."""
    return tl.full((), x, K.T)


@triton.jit
def accumulate(pointer, offsets, mask, x):
    """Adds to memory that belongs to this program. All its threads see the sum before any goes on."""
    tl.store(pointer + offsets, tl.load(pointer + offsets, mask, 0) + x, mask)
    tl.debug_barrier()
