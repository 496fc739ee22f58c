// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller.
// Key = 64-bit seed; counter = (dimension block of 4, sample, row low word, row high word).
#pragma once

#include "po_kernels/several.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// One 32-bit word a lane; the key is the same in all lanes. The rounds run on wide words, whatever form of a word
// the lanes multiply best.
template <class W>
PK_FN void philox4x32(W& c0, W& c1, W& c2, W& c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  auto w0 = widen(c0), w1 = widen(c1), w2 = widen(c2), w3 = widen(c3);
  PK_UNROLL
  for (int round = 0; round < 10; ++round) {
    decltype(w0) high0, low0, high1, low1;
    multiply_wide(w0, 0xD2511F53u, high0, low0);
    multiply_wide(w2, 0xCD9E8D57u, high1, low1);
    w0 = high1 ^ w1 ^ k0;
    w1 = low1;
    w2 = high0 ^ w3 ^ k1;
    w3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  c0 = narrow(w0);
  c1 = narrow(w1);
  c2 = narrow(w2);
  c3 = narrow(w3);
}

// -2 ln u for u = (w + 1/2) 2^-24, w = word >> 8. As 2^exponent (1 + f), u is taken apart without rounding: w + 1/2,
// which is rounded above 2^23, only decides on the exponent.
template <class V>
PK_FN V minus_twice_log_uniform(Word<V> word) {
  using T = Element<V>;
  using Bits = typename LaneTraits<V>::Bits;
  constexpr int mantissa_bits = sizeof(T) == 4 ? 23 : 52;
  constexpr int64_t bias = sizeof(T) == 4 ? 127 : 1023;
  constexpr int64_t sqrt_half = sizeof(T) == 4 ? int64_t(0x3f3504f3) : int64_t(0x3fe6a09e667f3bcd);
  const V w = from_word<V>(word >> 8);
  const Bits bits = to_bits(w + T(0.5)) - (sqrt_half + (int64_t(24) << mantissa_bits));
  const Bits whole = bits & -(int64_t(1) << mantissa_bits);
  const V power = from_bits(Bits(whole + ((bias + 24) << mantissa_bits)));  // 2^(24 + exponent)
  const V inverse = from_bits(Bits(Bits{} + ((bias - 24) << mantissa_bits) - whole));
  const V f = (w - power) * inverse + inverse * T(0.5);
  const V exponent = from_integer<V>(Bits(bits >> mantissa_bits));
#if defined(__CUDA_ARCH__)
  return exponent * T(-2 * 0.69314718055994530942) + log1p_reduced<-2>(f);  // two operations less
#else                                                                       // with which compilers fuse others
  return (exponent * T(0.69314718055994530942) + log1p_reduced(f)) * T(-2);
#endif
}

// cos and sin of 2 pi u. The quadrant and the remainder are exact integers.
template <class V>
PK_FN void circle(Word<V> word, V& cosine, V& sine) {
  using T = Element<V>;
  // 2^25 u = n, odd: of n + 2^22 the first bits are the quadrant, up to a turn, and the others the remainder, plus 2^22
  // so that it converts as a non-negative integer.
  const Word<V> turned = word + uint32_t(1u << 29);
  const Word<V> quadrant = turned >> 30;
  const V remainder = from_word<V>(((turned >> 7) & uint32_t((1u << 23) - 1)) | 1u) - T(4194304);
  const V x = remainder * T(6.28318530717958647692 / 33554432.0);
  const V z = x * x;
  V s, c;
  if constexpr (sizeof(T) == 4) {  // coefficients: Cephes, sinf and cosf
    s = polynomial(z, -1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f) * z * x + x;
    c = polynomial(z, 2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f) * (z * z) - z * T(0.5) +
        T(1);
  } else {  // coefficients: Cephes, sin and cos
    s = polynomial(z, 1.58962301576546568060e-10, -2.50507477628578072866e-8, 2.75573136213857245213e-6,
                   -1.98412698295895385996e-4, 8.33333333332211858878e-3, -1.66666666666666307295e-1) *
            z * x +
        x;
    c = polynomial(z, -1.13585365213876817300e-11, 2.08757008419747316778e-9, -2.75573141792967388112e-7,
                   2.48015872888517045348e-5, -1.38888888888730564116e-3, 4.16666666666665929218e-2) *
            (z * z) -
        z * T(0.5) + T(1);
  }
  const auto swapped = element_mask<V>((quadrant & 1u) != 0u);
  const auto cosine_negative = element_mask<V>(((quadrant + 1u) & 2u) != 0u);
  const auto sine_negative = element_mask<V>((quadrant & 2u) != 0u);
  const V a = select(swapped, s, c);
  const V b = select(swapped, c, s);
  cosine = select(cosine_negative, -a, a);
  sine = select(sine_negative, -b, b);
}

// Standard normals of S blocks of dimensions, each of a sample: z (S, stride), of which each block's first 2 P are
// written.
template <int S, int P, class V>
PK_FN void normals_of_blocks(uint64_t seed, const uint32_t (&block)[S], const uint32_t (&sample)[S], Word<V> row_low,
                             Word<V> row_high, V* z, int64_t stride) {
  using W = Word<V>;
  Several<W, S> c[4];
  unrolled<S>([&](auto s) PK_LAMBDA {
    constexpr int at = s;
    c[0].v[at] = W{} + block[at];
    c[1].v[at] = W{} + sample[at];
    c[2].v[at] = row_low;
    c[3].v[at] = row_high;
  });
  philox4x32(c[0], c[1], c[2], c[3], seed);
  // Pair p of sample s is number s P + p.
  const auto words = [&](auto first) PK_LAMBDA {
    return each_of<S * P>([&](auto i) PK_LAMBDA { return c[first + 2 * (i % P)].v[i / P]; });
  };
  using All = Several<V, S * P>;
  const All radius = square_root_of_normal(minus_twice_log_uniform<All>(words(Constant<0>{})));
  All cosine, sine;
  circle(words(Constant<1>{}), cosine, sine);
  unrolled<S * P>([&](auto i) PK_LAMBDA {
    constexpr int at = i;
    V* to = z + at / P * stride + 2 * (at % P);
    to[0] = cosine.v[at] * radius.v[at];
    to[1] = sine.v[at] * radius.v[at];
  });
}

// Of one block for S samples from `sample` on.
template <int S, int P, class V>
PK_FN void normals_of_block(uint64_t seed, uint32_t block, uint32_t sample, Word<V> row_low, Word<V> row_high, V* z,
                            int64_t stride) {
  uint32_t blocks[S], samples[S];
  unrolled<S>([&](auto s) PK_LAMBDA {
    blocks[s] = block;
    samples[s] = sample + uint32_t(s);
  });
  normals_of_blocks<S, P>(seed, blocks, samples, row_low, row_high, z, stride);
}

// The standard normals of S samples of the rows in the lanes: out (S, dim), dimension 4 k + i from block k.
template <int S, class V>
PK_FN void standard_normals(uint64_t seed, uint32_t sample, Word<V> row_low, Word<V> row_high, int64_t dim, V* out) {
  const int64_t whole = dim / 4, rest = dim % 4;
  for (int64_t block = 0; block < whole; ++block) {
    normals_of_block<S, 2>(seed, uint32_t(block), sample, row_low, row_high, out + 4 * block, dim);
  }
  if (rest == 0) return;
  V z[4 * S];
  if (rest > 2) {
    normals_of_block<S, 2>(seed, uint32_t(whole), sample, row_low, row_high, z, 4);
  } else {
    normals_of_block<S, 1>(seed, uint32_t(whole), sample, row_low, row_high, z, 4);
  }
  for (int s = 0; s < S; ++s) {
    for (int64_t i = 0; i < rest; ++i) out[s * dim + 4 * whole + i] = z[4 * s + i];
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
