"""exp, and the logarithm and the circle of Box-Muller: where libm is called the loop over rows is not vector code.

math.log serves where a row needs a few of them.
"""

import math

import numpy as np

from .rows import inlined

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_ROUND = 6755399441055744.0  # 1.5 · 2**52: x + _ROUND has the nearest integer to x in its low bits
_ROUND_BITS = 0x4338000000000000


@inlined
def exp(x):
    """With gradual underflow, inf above the range and 0 at -inf; coefficients: fdlibm."""
    bounded = min(max(x, -750.0), 750.0)  # beyond, the result is 0 or inf
    shifted = bounded * 1.4426950408889634074 + _ROUND
    n, k = shifted - _ROUND, np.float64(shifted).view(np.int64) - _ROUND_BITS
    high, low = bounded - n * _LN2_HIGH, n * _LN2_LOW
    r = high - low
    z = r * r
    p = z * 4.13813679705723846039e-08 - 1.65339022054652515390e-06
    p = p * z + 6.61375632143793436117e-05
    p = p * z - 2.77777777770155933842e-03
    p = p * z + 1.66666666666666019037e-01
    c = r - z * p
    y = 1.0 + (high - (low - r * c / (2.0 - c)))
    # Two factors of 2**k, each in range, so that results below the normal range and above it come out right.
    half = k >> 1
    y = y * np.int64((half + 1023) << 52).view(np.float64) * np.int64((k - half + 1023) << 52).view(np.float64)
    return y if x == x else x


@inlined
def log_uniform(u):
    """ln u of a uniform number, which is normal and has 25 bits at most; coefficients: fdlibm."""
    bits = np.float64(u).view(np.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    f = np.int64(bits - (k << 52)).view(np.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    r = z * 1.479819860511658591e-1 + 1.531383769920937332e-1
    r = r * z + 1.818357216161805012e-1
    r = r * z + 2.222219843214978396e-1
    r = r * z + 2.857142874366239149e-1
    r = r * z + 3.999999999940941908e-1
    r = r * z + 6.666666666666735130e-1
    half = 0.5 * f * f
    n = np.float64(k)
    return n * _LN2_HIGH + (f - (half - (s * (half + z * r) + n * _LN2_LOW)))


@inlined
def circle(u):
    """cos and sin of 2 π u. The quadrant and the remainder are exact; coefficients: Cephes."""
    quadrant = math.floor(4.0 * u + 0.5)
    x = (4.0 * u - quadrant) * (0.5 * math.pi)
    z = x * x
    s = z * 1.58962301576546568060e-10 - 2.50507477628578072866e-8
    s = s * z + 2.75573136212857245213e-6
    s = s * z - 1.98412698295885953996e-4
    s = s * z + 8.33333333332211858878e-3
    s = s * z - 1.66666666666666307295e-1
    s = s * z * x + x
    c = z * -1.13585365213876817300e-11 + 2.08757008419747316778e-9
    c = c * z - 2.75573141792967388112e-7
    c = c * z + 2.48015872888517045348e-5
    c = c * z - 1.38888888888730564116e-3
    c = c * z + 4.16666666666665929218e-2
    c = c * (z * z) - z * 0.5 + 1.0
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    cosine, sine = s if odd else c, c if odd else s
    left = (quadrant == 1.0) | (quadrant == 2.0)
    below = (quadrant == 2.0) | (quadrant == 3.0)
    return -cosine if left else cosine, -sine if below else sine
