"""Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, with the counters of the reference's philox.py.

The logarithm and the circle are polynomials: where libm is called, a loop over columns is not vector code.
"""

import math

import numpy as np

from .rows import helper, inlined

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32, _26, _8, _6, _5 = np.uint64(32), np.uint64(26), np.uint64(8), np.uint64(6), np.uint64(5)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


@inlined
def philox4x32(block, sample, row, seed):
    """Four words below 2**32."""
    c0, c1, c2, c3 = np.uint64(block), np.uint64(sample), row & _MASK, row >> _32
    k0, k1 = seed & _MASK, seed >> _32
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@inlined
def random_bits(sample, row, seed):
    """The 53 bits that a label is drawn with."""
    x0, x1, _, _ = philox4x32(0, sample, row, seed)
    return np.int64(x0 >> _5 << _26 | x1 >> _6)


@inlined
def _uniform(word):
    return (np.float64(np.int64(word >> _8)) + 0.5) * 2.0**-24


@inlined
def _log(u):
    """ln u of a uniform number, which is normal and has 25 bits at most; coefficients: fdlibm."""
    bits = np.float64(u).view(np.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    f = np.int64(bits - (k << 52)).view(np.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    r = (z * 1.479819860511658591e-1 + 1.531383769920937332e-1) * z + 1.818357216161805012e-1
    r = ((r * z + 2.222219843214978396e-1) * z + 2.857142874366239149e-1) * z + 3.999999999940941908e-1
    r = r * z + 6.666666666666735130e-1
    half = 0.5 * f * f
    n = np.float64(k)
    return n * _LN2_HIGH + (f - (half - (s * (half + z * r) + n * _LN2_LOW)))


@inlined
def _circle(u):
    """cos and sin of 2 π u. The quadrant and the remainder are exact; coefficients: Cephes."""
    quadrant = math.floor(4.0 * u + 0.5)
    x = (4.0 * u - quadrant) * (0.5 * math.pi)
    z = x * x
    s = (z * 1.58962301576546568060e-10 - 2.50507477628578072866e-8) * z + 2.75573136212857245213e-6
    s = ((s * z - 1.98412698295885953996e-4) * z + 8.33333333332211858878e-3) * z - 1.66666666666666307295e-1
    s = s * z * x + x
    c = (z * -1.13585365213876817300e-11 + 2.08757008419747316778e-9) * z - 2.75573141792967388112e-7
    c = ((c * z + 2.48015872888517045348e-5) * z - 1.38888888888730564116e-3) * z + 4.16666666666665929218e-2
    c = c * (z * z) - z * 0.5 + 1.0
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    cosine, sine = s if odd else c, c if odd else s
    left = (quadrant == 1.0) | (quadrant == 2.0)
    below = (quadrant == 2.0) | (quadrant == 3.0)
    return -cosine if left else cosine, -sine if below else sine


@helper
def standard_normals(seed, samples, rows, columns, out):
    """Of a sample and a row a column; out (D rounded up to blocks of 4, columns)."""
    for block in range(len(out) // 4):
        at = 4 * block
        for c in range(columns):
            w0, w1, w2, w3 = philox4x32(block, samples[c], rows[c], seed)
            radius = math.sqrt(-2.0 * _log(_uniform(w0)))
            cosine, sine = _circle(_uniform(w1))
            out[at, c] = radius * cosine
            out[at + 1, c] = radius * sine
            radius = math.sqrt(-2.0 * _log(_uniform(w2)))
            cosine, sine = _circle(_uniform(w3))
            out[at + 2, c] = radius * cosine
            out[at + 3, c] = radius * sine
