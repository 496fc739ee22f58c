"""Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller on lanes, as in csrc/include/po_kernels/philox.hpp."""

import numpy as np

from .lanes import from_word, helper, is_single, select, to_words, wide
from .maths import log1p_reduced, split, square_root

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32 = np.uint64(32)


@helper
def philox4x32(c0, c1, c2, c3, seed):
    """Counters are wide words below 2**32, the results words; the key is the same in all lanes."""
    k0, k1 = seed & _MASK, seed >> _32
    for _ in range(10):
        # What products leave above the low half is dropped where it is next used.
        p0, p1 = (c0 & _MASK) * _M0, (c2 & _MASK) * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1, (p0 >> _32) ^ c3 ^ k1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return to_words(c0), to_words(c1), to_words(c2), to_words(c3)


@helper
def log_uniform(word, out):
    """ln u for u = ((word >> 8) + 1/2) 2**-24, in the lanes that `out` points at.

    Both n = 2 (word >> 8) + 1 and 2**25 - n are exact in float32 up to 2**24, so u above 1/2 is taken as
    1 - (2**25 - n) 2**-25 and nothing is rounded before the logarithm.
    """
    n = ((word >> 8) << 1) | 1
    upper = n > (1 << 24)
    w = from_word(out, select(upper, (1 << 25) - n, n)) * (1.0 / 33554432.0)
    # Lower half: u = w. Upper half: u = 1 - w, or halved, (1 - 2 w) + 1 = 2 u, where that is nearer to 1.
    exponent, f = split(w)
    near_one = w < 0.29289321881345247560
    f = select(upper, select(near_one, -w, 1.0 - w * 2.0), f)
    exponent = select(upper, select(near_one, w * 0.0, w * 0.0 - 1.0), exponent)
    return exponent * 0.69314718055994530942 + log1p_reduced(f)


@helper
def circle(word, out):
    """cos and sin of 2 π u. The quadrant and the remainder are exact integers."""
    n = ((word >> 8) << 1) | 1
    quadrant = (n + (1 << 22)) >> 23
    # n - quadrant 2**23 lies in [-2**22, 2**22]; the shift keeps the conversion that of a non-negative integer.
    x = (from_word(out, n + (1 << 22) - (quadrant << 23)) - 4194304.0) * (6.28318530717958647692 / 33554432.0)
    z = x * x
    if is_single(x):  # coefficients: Cephes, sinf and cosf
        s = z * -1.9515295891e-4 + 8.3321608736e-3
        s = s * z - 1.6666654611e-1
        c = z * 2.443315711809948e-5 - 1.388731625493765e-3
        c = c * z + 4.166664568298827e-2
    else:  # coefficients: Cephes, sin and cos
        s = z * 1.58962301576546568060e-10 - 2.50507477628578072866e-8
        s = s * z + 2.75573136213857245213e-6
        s = s * z - 1.98412698295885953996e-4
        s = s * z + 8.33333333332211858878e-3
        s = s * z - 1.66666666666666307295e-1
        c = z * -1.13585365213876817300e-11 + 2.08757008419747316778e-9
        c = c * z - 2.75573141792967388112e-7
        c = c * z + 2.48015872888517045348e-5
        c = c * z - 1.38888888888730564116e-3
        c = c * z + 4.16666666666665929218e-2
    s = s * z * x + x
    c = c * (z * z) - z * 0.5 + 1.0
    swapped = (quadrant & 1) != 0
    a, b = select(swapped, s, c), select(swapped, c, s)
    return select(((quadrant + 1) & 2) != 0, -a, a), select((quadrant & 2) != 0, -b, b)


@helper
def standard_normals(seed, sample, row, dim, out):
    """One sample of `dim` of the rows in the lanes; dimension 4 k + i from block k."""
    low, high, which = row & _MASK, row >> _32, wide(out, sample)
    for block in range((dim + 3) // 4):
        at = 4 * block
        w0, w1, w2, w3 = philox4x32(wide(out, block), which, low, high, seed)
        radius = square_root(log_uniform(w0, out) * -2.0)
        cosine, sine = circle(w1, out)
        out[at] = cosine * radius
        if at + 1 < dim:
            out[at + 1] = sine * radius
        if at + 2 < dim:
            radius = square_root(log_uniform(w2, out) * -2.0)
            cosine, sine = circle(w3, out)
            out[at + 2] = cosine * radius
            if at + 3 < dim:
                out[at + 3] = sine * radius
