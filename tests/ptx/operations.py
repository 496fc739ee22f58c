"""What instructions compute, on arrays over threads. Registers are bits; functions take and return arrays of a type."""

import numpy as np

Array = np.ndarray
U2, U4, U8, I4, I8, F4, F8 = (np.dtype(name) for name in ("u2", "u4", "u8", "i4", "i8", "f4", "f8"))


def flush(x: Array) -> Array:
    """Subnormal numbers become zero, of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once; of float32 after a rounding to float64."""
    if a.dtype != F8:
        return (a.astype(F8) * b + c).astype(a.dtype)
    product = a * b
    high_a, high_b = (_high(x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    rest = total - product
    lost = (product - (total - rest)) + (c - rest)
    exact = total + (lost + error)
    return np.where(np.isfinite(exact), exact, total)


def _high(x: Array) -> Array:
    scaled = 134217729.0 * x  # 2^27 + 1, of Veltkamp
    return scaled - (scaled - x)


def high_product(a: Array, b: Array) -> Array:
    if a.dtype.itemsize == 4:
        wide = I8 if a.dtype == I4 else U8
        return (a.astype(wide) * b.astype(wide) >> wide.type(32)).astype(a.dtype)
    if a.dtype == I8:
        high = high_product(a.view(U8), b.view(U8)).view(I8)
        return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    low, half = U8.type(0xFFFFFFFF), U8.type(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by >= bits, a.dtype.type(0), a << (by % bits).astype(a.dtype))


def shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by >= bits, a.dtype.type(0), a >> (by % bits).astype(a.dtype))


def divide(a: Array, b: Array) -> Array:
    """Of integers towards zero; of zero all bits are set."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient += (quotient < 0) & (quotient * safe != a)
    return np.where(zero, a.dtype.type(0) - a.dtype.type(1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


def extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: a field of bits, extended by its sign if a is signed."""
    bits = 8 * a.dtype.itemsize
    position, length = position & 255, length & 255
    top = np.minimum(position + length, bits).astype(U4)
    raised = shift_left(a.view(f"u{a.dtype.itemsize}"), bits - top).view(a.dtype)
    found = shift_right(raised, (bits - top) + np.minimum(position, bits))
    return np.where(length == 0, a.dtype.type(0), found)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: bytes of b:a, or their signs."""
    both = a.astype(U8) | (b.astype(U8) << U8.type(32))
    found = np.zeros_like(a)
    for i in range(4):
        which = (selector >> U4.type(4 * i)) & U4.type(15)
        byte = (both >> ((which & U4.type(7)) * U4.type(8)).astype(U8)).astype(U4) & U4.type(255)
        byte = np.where(which & 8, np.where(byte & 128, U4.type(255), U4.type(0)), byte)
        found |= byte << U4.type(8 * i)
    return found


def funnel(a: Array, b: Array, by: Array, left: bool) -> Array:
    """shf.wrap: 32 bits of b:a, shifted."""
    by = (by & 31).astype(U8)
    both = a.astype(U8) | (b.astype(U8) << U8.type(32))
    return (shift_left(both, by) >> U8.type(32) if left else shift_right(both, by)).astype(U4)


def leading_zeros(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    count = np.full(a.shape, bits, U4)
    for i in range(bits):
        count[(a >> a.dtype.type(i)) & a.dtype.type(1) == 1] = bits - 1 - i
    return count


def to_bfloat16(x: Array) -> Array:
    """The bits of float32, rounded to even."""
    bits = x.view(U4)
    rounded = (bits + U4.type(0x7FFF) + ((bits >> U4.type(16)) & U4.type(1))) >> U4.type(16)
    return np.where(np.isnan(x), U4.type(0x7FFF), rounded).astype(U2)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(U4) << U4.type(16)).view(F4)


def round_to_integer(x: Array, how: str) -> Array:
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how](x)


def to_integer(x: Array, dtype: np.dtype, how: str) -> Array:
    """Saturated; nan is zero."""
    bounds = np.iinfo(dtype)
    x = round_to_integer(x.astype(F8), how)
    low, high = x <= float(bounds.min), x >= float(bounds.max)
    safe = np.where(low | high | np.isnan(x), 0.0, x).astype(dtype)
    return np.where(low, dtype.type(bounds.min), np.where(high, dtype.type(bounds.max), safe))


def shuffle_lanes(kind: str, by: Array, clamp: Array) -> tuple[Array, Array]:
    """The thread that each reads from, and whether that is in bounds (the manual's pseudocode of shfl.sync)."""
    thread = np.arange(len(by))
    lane, by, clamp = thread & 31, by.astype(I8), clamp.astype(I8)
    segment = (clamp >> 8) & 31
    highest, lowest = (lane & segment) | (clamp & 31 & ~segment), lane & segment
    by = by & 31
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[kind]
    inside = source >= highest if kind == "up" else source <= highest
    return thread - lane + np.where(inside, source, lane), inside


def multiply_matrices(shape: str, kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """mma.sync: a (m, k), b (k, n) and c (m, n) by fragments of a warp's threads."""
    m, n, k = {"m16n8k8": (16, 8, 8), "m8n8k4": (8, 8, 4)}[shape]
    lane = np.arange(32)
    group, rank = lane // 4, lane % 4
    warps = len(a[0]) // 32

    def gathered(parts: list[Array], rows: int, columns: int, at: list[tuple[Array, Array]]) -> Array:
        whole = np.zeros((warps, rows, columns))
        for part, (row, column) in zip(parts, at, strict=True):
            whole[:, row, column] = part.reshape(warps, 32)
        return whole

    if kind == "tf32":
        a, b = ([(x.view(U4) & U4.type(0xFFFFE000)).view(F4) for x in part] for part in (a, b))
    of_a = [(group + 8 * j, rank + 4 * i) for i in range(k // 4) for j in range(m // 8)]
    of_b = [(rank + 4 * i, group) for i in range(k // 4)]
    of_c = [(group + 8 * j, 2 * rank + i) for j in range(m // 8) for i in range(2)]
    result = gathered(a, m, k, of_a) @ gathered(b, k, n, of_b) + gathered(c, m, n, of_c)
    return [result[:, row, column].ravel().astype(c[0].dtype) for row, column in of_c]


def bank_passes(address: Array, threads: Array, size: int) -> int:
    """Of a shared access of `size` bytes a thread, passes beyond the least: words of one bank that differ."""
    parts = max(1, size // 4)
    group = threads // (32 // parts)  # threads that are served together
    words = (address.astype(I8)[:, None] + 4 * np.arange(parts)).ravel() // 4
    pairs = np.unique(np.repeat(group, parts) << 40 | words)
    counts = np.bincount((pairs >> 40) * 32 + pairs % 32)
    worst = np.append(counts, np.zeros(-len(counts) % 32, I8)).reshape(-1, 32).max(axis=1)
    return int((worst[worst > 0] - 1).sum())
