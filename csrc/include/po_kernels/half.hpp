// Numbers in half precision, to and from the lanes that they are computed in. Of a lane's word the low half is used.
#pragma once

#include "po_kernels/math.hpp"

namespace po_kernels {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
template <class Stored>
constexpr bool is_half = sizeof(Stored) == 2;

inline namespace PK_LEVEL {

// What lanes have for bits: signed integers, not words.
template <class V>
using Bits = typename LaneTraits<V>::Bits;

template <class V>
PK_FN V widened(Word<V> word, BFloat16) {
  return from_bits(reinterpreted<Bits<V>>(word << 16));
}
// Shifted into a float32 the bits have an exponent that is too small by 112; inf and nan get the largest there is.
template <class V>
PK_FN V widened(Word<V> word, Float16) {
  const Word<V> magnitude = (word & 0x7fffu) << 13;
  const V scaled = from_bits(reinterpreted<Bits<V>>(magnitude)) * 0x1p112f;
  const Word<V> finite = reinterpreted<Word<V>>(to_bits(scaled));
  const Word<V> found = select(magnitude < 0x0f800000u, finite, magnitude | 0x7f800000u);
  return from_bits(reinterpreted<Bits<V>>(found | (word & 0x8000u) << 16));
}

// To nearest, ties to even.
template <class V>
PK_FN Word<V> narrowed(V x, BFloat16) {
  const Word<V> bits = reinterpreted<Word<V>>(to_bits(x));
  const Word<V> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return select((bits & 0x7fffffffu) < 0x7f800001u, rounded, bits >> 16 | 0x40u);
}
template <class V>
PK_FN Word<V> narrowed(V x, Float16) {
  const Word<V> bits = reinterpreted<Word<V>>(to_bits(x));
  const Word<V> magnitude = bits & 0x7fffffffu;
  // The unit in the last place of the sum is that of subnormal numbers.
  const V sum = from_bits(reinterpreted<Bits<V>>(magnitude)) + 0.5f;
  const Word<V> subnormal = reinterpreted<Word<V>>(to_bits(sum)) - 0x3f000000u;
  const Word<V> normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  Word<V> found = select(magnitude < 0x38800000u, subnormal, normal);
  found = select(magnitude < 0x477ff000u, found, Word<V>{} + 0x7c00u);
  found = select(magnitude < 0x7f800001u, found, Word<V>{} + 0x7e00u);
  return found | (bits >> 16 & 0x8000u);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
