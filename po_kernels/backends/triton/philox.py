"""Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, in Triton: the integers of every other backend.

Key = the 64-bit seed; counter = (dimension block of 4, sample, row low word, row high word).
"""

import triton
import triton.language as tl


@triton.jit
def words(seed, block, sample, row):
    """The four words of each counter; block and sample uint32, row int64, mutually broadcastable; seed a scalar.

    The first rounds run on the shapes as they are, before they are broadcast to the one of the result.
    """
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block, sample, low, high)


@triton.jit
def log_uniform(word, T: tl.constexpr):
    """ln u of u = ((word >> 8) + 1/2) 2^-24."""
    n = ((word >> 8) << 1) | 1  # u = n 2^-25
    if tl.float64 == T:
        return tl.log(n.to(T) * 2.9802322387695312e-08)
    else:
        # n is exact in float32 up to 2^24: from there on u is taken as 1 - w, so that nothing is rounded before the
        # logarithm, or halved, 2 u = (1 - 2 w) + 1, where that is nearer to 1.
        upper = n > 16777216
        w = tl.where(upper, 33554432 - n, n).to(T) * 2.9802322387695312e-08
        bits = w.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        near_one = w < 0.29289321881345247
        exponent = tl.where(upper, tl.where(near_one, 0.0, -1.0), k.to(T))
        lower_f = (bits - (k << 23)).to(T, bitcast=True) - 1
        f = tl.where(upper, tl.where(near_one, -w, 1 - 2 * w), lower_f)
        # ln(1 + f), coefficients: Cephes, logf.
        p = tl.fma(f, 7.0376836292e-2, -1.1514610310e-1)
        p = tl.fma(p, f, 1.1676998740e-1)
        p = tl.fma(p, f, -1.2420140846e-1)
        p = tl.fma(p, f, 1.4249322787e-1)
        p = tl.fma(p, f, -1.6668057665e-1)
        p = tl.fma(p, f, 2.0000714765e-1)
        p = tl.fma(p, f, -2.4999993993e-1)
        p = tl.fma(p, f, 3.3333331174e-1)
        square = f * f
        rest = tl.fma(f * square, p, square * -0.5)
        return tl.fma(exponent, 0.69314718055994530942, f + rest)


@triton.jit
def circle(word, T: tl.constexpr):
    """cos and sin of 2 pi u."""
    n = ((word >> 8) << 1) | 1
    if tl.float64 == T:
        angle = n.to(T) * 1.8725351414619643e-07  # 2 pi 2^-25
        return tl.cos(angle), tl.sin(angle)
    else:
        # The quadrant and the remainder, in [-2^22, 2^22], are exact integers.
        quadrant = (n + 4194304) >> 23
        x = (n - (quadrant << 23)).to(tl.int32, bitcast=True).to(T) * 1.8725351414619643e-07
        z = x * x
        # Coefficients: Cephes, sinf and cosf.
        s = tl.fma(z, -1.9515295891e-4, 8.3321608736e-3)
        s = tl.fma(s, z, -1.6666654611e-1)
        s = tl.fma(s * z, x, x)
        c = tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3)
        c = tl.fma(c, z, 4.166664568298827e-2)
        c = tl.fma(c * z, z, tl.fma(z, -0.5, 1.0))
        swapped = (quadrant & 1) != 0
        cosine = tl.where(swapped, s, c)
        sine = tl.where(swapped, c, s)
        cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
        sine = tl.where((quadrant & 2) != 0, -sine, sine)
        return cosine, sine


@triton.jit
def normal_pair(radius_word, angle_word, T: tl.constexpr):
    radius = tl.sqrt(-2 * log_uniform(radius_word, T))
    cosine, sine = circle(angle_word, T)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, sample, row, dim, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Standard normals (BLOCK_D, B, G) of sample (1, 1, G) and row (1, B, 1); zero from dimension `dim` on."""
    block = tl.arange(0, BLOCK_D // 4).to(tl.uint32)[:, None, None]
    x0, x1, x2, x3 = words(seed, block, sample.to(tl.uint32), row)
    z0, z1 = normal_pair(x0, x1, T)
    z2, z3 = normal_pair(x2, x3, T)
    z = tl.permute(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (0, 3, 4, 1, 2))
    z = tl.reshape(z, (BLOCK_D, row.shape[1], sample.shape[2]))
    return tl.where(tl.arange(0, BLOCK_D)[:, None, None] < dim, z, 0)
