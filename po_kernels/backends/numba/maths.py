"""Elementary functions on lane values, with the algorithms of csrc/include/po_kernels/math.hpp."""

import numpy as np

from .lanes import (
    chain,
    from_bits,
    from_integer,
    helper,
    is_single,
    nearest,
    root_of_lanes,
    select,
    stop,
    to_bits,
    to_integer,
)

_INFINITY = np.inf
_LN2_HIGH_64, _LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LN2_HIGH_32, _LN2_LOW_32 = 0.693359375, -2.12194440e-4


@helper
def log1p_reduced(f):
    """log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], with a relative error of about an ulp also where f is small."""
    square = f * f
    if is_single(f):  # coefficients: Cephes, logf
        p = f * 7.0376836292e-2 - 1.1514610310e-1
        p = p * f + 1.1676998740e-1
        p = p * f - 1.2420140846e-1
        p = p * f + 1.4249322787e-1
        p = p * f - 1.6668057665e-1
        p = p * f + 2.0000714765e-1
        p = p * f - 2.4999993993e-1
        p = p * f + 3.3333331174e-1
        return f + (f * square * p - square * 0.5)
    # coefficients: fdlibm, log
    s = f / (f + 2.0)
    z = s * s
    r = z * 1.479819860511658591e-1 + 1.531383769920937332e-1
    r = r * z + 1.818357216161805012e-1
    r = r * z + 2.222219843214978396e-1
    r = r * z + 2.857142874366239149e-1
    r = r * z + 3.999999999940941908e-1
    r = r * z + 6.666666666666735130e-1
    half = square * 0.5
    return f - (half - s * (half + z * r))


@helper
def split(x):
    """(exponent, f) of a positive normal x = 2**exponent (1 + f), f as log1p_reduced wants it."""
    bits = to_bits(x)
    if is_single(x):
        k = (bits - 0x3F3504F3) >> 23
        return from_integer(k), from_bits(bits - (k << 23)) - 1.0
    k = (bits - 0x3FE6A09E667F3BCD) >> 52
    return from_integer(k), from_bits(bits - (k << 52)) - 1.0


@helper
def log(x):
    """For x > 0, subnormals included; -inf at 0, nan below."""
    v = stop(x)
    small = v < (1.17549435e-38 if is_single(v) else 2.2250738585072014e-308)
    exponent, f = split(select(small, v * (33554432.0 if is_single(v) else 18014398509481984.0), v))
    exponent = exponent - select(small, v * 0.0 + (25.0 if is_single(v) else 54.0), v * 0.0)
    if is_single(v):
        y = exponent * _LN2_HIGH_32 + (log1p_reduced(f) + exponent * _LN2_LOW_32)
    else:
        y = exponent * _LN2_HIGH_64 + (log1p_reduced(f) + exponent * _LN2_LOW_64)
    y = select(v < _INFINITY, y, v)  # inf and nan pass through
    y = select(v > 0.0, y, select(v < 0.0, np.nan, select(v == 0.0, -_INFINITY, v)))
    return chain(x, y, 1.0 / v)


@helper
def exp(x):
    """With gradual underflow, inf above the range and 0 at -inf."""
    v = stop(x)
    limit = (150.0 if is_single(v) else 1080.0) * 0.7  # beyond it the result is inf or 0
    clamped = select(v > limit, limit, select(v < -limit, -limit, v))
    n = nearest(clamped * 1.4426950408889634074)
    k = to_integer(select(n == n, n, 0.0))
    if is_single(v):  # coefficients: Cephes, expf
        r = clamped - n * _LN2_HIGH_32 - n * _LN2_LOW_32
        p = r * 1.9875691500e-4 + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
        p = p * r + 5.0000001201e-1
        y = p * (r * r) + r + 1.0
        half = k >> 1
        # Two factors of 2, each in range, so that results below the normal range and above it come out right.
        y = y * from_bits((half + 127) << 23) * from_bits((k - half + 127) << 23)
    else:  # coefficients: fdlibm, exp
        high = clamped - n * _LN2_HIGH_64
        low = n * _LN2_LOW_64
        r = high - low
        z = r * r
        p = z * 4.13813679705723846039e-08 - 1.65339022054652515390e-06
        p = p * z + 6.61375632143793436117e-05
        p = p * z - 2.77777777770155933842e-03
        p = p * z + 1.66666666666666019037e-01
        c = r - z * p
        y = (high - (low - r * c / (2.0 - c))) + 1.0
        half = k >> 1
        y = y * from_bits((half + 1023) << 52) * from_bits((k - half + 1023) << 52)
    y = select(v == v, y, v)
    return chain(x, y, y)


@helper
def square_root(x):
    y = root_of_lanes(stop(x))
    return chain(x, y, 0.5 / y)
