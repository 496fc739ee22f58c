"""Philox4x32-10 in plain torch: the definition of every random number in the package.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Key = the 64-bit seed; counter = (dimension block of 4, sample, row low word, row high word).
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Any, ...], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors holding 32-bit words, mutually broadcastable, or integers.
        key: two such.

    Returns:
        four of the broadcast shape, each in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps in int64, but its bits are right; the mask undoes the sign extension.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream_key(seed: Tensor, stream: int) -> Tensor:
    """The key of a stream of random numbers other than stream 0, which has the seed itself.

    It is two words of Philox under the seed, at a counter that no sample has: its sample number is 2**32 - 1.

    Args:
        seed: int64, each entry by itself.
        stream: from 1 to 2**63 - 1.
    """
    number: Any = seed
    if not seed.ndim and not torch.compiler.is_compiling() and seed.device.type == "cpu":
        # In integers of Python, of which a hundred operations take a few microseconds, if the number is at hand: that
        # of a fake tensor, or of one within a transform, is not.
        with contextlib.suppress(RuntimeError):
            number = int(seed)
    low, high, _, _ = _words(number & _MASK, (number >> 32) & _MASK, stream)
    if isinstance(number, int):
        return torch.tensor((high << 32 | low) - (2**64 if high >> 31 else 0), dtype=torch.int64, device="cpu")
    return high << 32 | low


def _words(low: Any, high: Any, stream: int) -> tuple[Any, ...]:
    return philox4x32((_MASK, _MASK, stream & _MASK, stream >> 32), (low, high))


def random_bits(
    seed: Tensor, num_samples: int, num_rows: int, num_blocks: int, row_offset: int, device: torch.device
) -> Tensor:
    """Words of every (sample, row, block), shape (num_samples, num_rows, num_blocks, 4), int64."""
    seed = seed.to(device)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    block = torch.arange(num_blocks, device=device).view(1, 1, -1)
    sample = torch.arange(num_samples, device=device).view(-1, 1, 1)
    row = torch.arange(num_rows, device=device).view(1, -1, 1) + row_offset
    words = philox4x32((block, sample, row & _MASK, (row >> 32) & _MASK), key)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def uniform(bits: Tensor) -> Tensor:
    """((x >> 8) + 1/2) * 2**-24, in float64: never 0, never 1, exact."""
    return ((bits >> 8).double() + 0.5) * 2.0**-24


def uniform53(first: Tensor, second: Tensor) -> Tensor:
    """((first >> 5) * 2**26 + (second >> 6)) * 2**-53, in float64: in [0, 1), exact."""
    return ((first >> 5) << 26 | second >> 6).double() * 2.0**-53


def normal(seed: Tensor, num_samples: int, num_rows: int, dim: int, row_offset: int, like: Tensor) -> Tensor:
    """Standard normals by Box-Muller, shape (num_samples, num_rows, dim), dtype and device of `like`.

    Computed in float64 and rounded once, so that every dtype sees the same numbers.
    """
    bits = random_bits(seed, num_samples, num_rows, (dim + 3) // 4, row_offset, like.device)
    u = uniform(bits)
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = (2.0 * math.pi) * u[..., 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-3)[..., :dim].to(like.dtype)


def categorical(logits: Tensor, seed: Tensor, num_samples: int, row_offset: int) -> Tensor:
    """Labels by inversion of the distribution function, shape (num_samples, num_rows), int64.

    A label is the number of classes whose distribution function, in float64, is not above a uniform of 53 bits, made of
    the first two words of block 0: 24 bits could not reach the rare classes of a vocabulary. Backends differ in how
    they round that function, and so draw another label once in some 10**12.

    Args:
        logits: (num_rows, num_classes); -inf masks a class.
    """
    weights = torch.softmax(logits.detach().double(), dim=-1)
    distribution = torch.cumsum(weights, dim=-1)
    # From the last class with mass on, it is beyond every uniform.
    index = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(weights > 0, index, -1).amax(dim=-1, keepdim=True)
    distribution = torch.where(index >= last, 2.0, distribution)
    bits = random_bits(seed, num_samples, logits.shape[0], 1, row_offset, logits.device)
    u = uniform53(bits[..., 0, 0], bits[..., 0, 1])
    return torch.searchsorted(distribution, u.t().contiguous(), right=True).t().contiguous()
