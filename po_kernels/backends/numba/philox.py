"""Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, with the counters of the reference's philox.py."""

import math

import numpy as np

from .maths import circle, log_uniform
from .rows import helper, inlined

_MASK = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32, _8 = np.uint64(32), np.uint64(8)


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
    """The 24 bits that a label is drawn with."""
    return np.int64(philox4x32(0, sample, row, seed)[0] >> _8)


@inlined
def _uniform(word):
    return (np.float64(np.int64(word >> _8)) + 0.5) * 2.0**-24


@helper
def standard_normals(seed, samples, rows, columns, out):
    """Of a sample and a row a column; out (D rounded up to blocks of 4, columns)."""
    for block in range(len(out) // 4):
        at = 4 * block
        for c in range(columns):
            w0, w1, w2, w3 = philox4x32(block, samples[c], rows[c], seed)
            radius = math.sqrt(-2.0 * log_uniform(_uniform(w0)))
            cosine, sine = circle(_uniform(w1))
            out[at, c] = radius * cosine
            out[at + 1, c] = radius * sine
            radius = math.sqrt(-2.0 * log_uniform(_uniform(w2)))
            cosine, sine = circle(_uniform(w3))
            out[at + 2, c] = radius * cosine
            out[at + 3, c] = radius * sine
