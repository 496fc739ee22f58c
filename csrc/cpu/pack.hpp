// A Pack holds one number for each of several rows: the SIMD lane value of the CPU kernels.
// 64 bytes of elements at every instruction-set level, so that all levels work in the same order.
#pragma once

#include "po_kernels/math.hpp"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace po_kernels {
inline namespace PK_LEVEL {

template <class T, int N>
struct Pack {
  typedef T Vector __attribute__((vector_size(sizeof(T) * N)));
  Vector v;
};

template <class T>
using Lanes = Pack<T, 64 / sizeof(T)>;

template <int N>
struct LaneTraits<Pack<float, N>> {
  using Element = float;
  using Word = Pack<uint32_t, N>;
  using Bits = Pack<int32_t, N>;
  static constexpr int width = N;
};
template <int N>
struct LaneTraits<Pack<double, N>> {
  using Element = double;
  using Word = Pack<uint32_t, N>;
  using Bits = Pack<int64_t, N>;
  static constexpr int width = N;
};

#define PK_PACK_OPERATOR(op)                                                                                          \
  template <class T, int N>                                                                                           \
  PK_FN Pack<T, N> operator op(Pack<T, N> a, Pack<T, N> b) { return {a.v op b.v}; }                                   \
  template <class T, int N>                                                                                           \
  PK_FN Pack<T, N> operator op(Pack<T, N> a, std::common_type_t<T> b) { return {a.v op b}; }
PK_PACK_OPERATOR(+)
PK_PACK_OPERATOR(-)
PK_PACK_OPERATOR(*)
PK_PACK_OPERATOR(/)
PK_PACK_OPERATOR(&)
PK_PACK_OPERATOR(|)
PK_PACK_OPERATOR(^)
#undef PK_PACK_OPERATOR

template <class T, int N>
PK_FN Pack<T, N> operator-(Pack<T, N> a) { return {-a.v}; }
template <class T, int N>
PK_FN Pack<T, N> operator<<(Pack<T, N> a, int bits) { return {a.v << bits}; }
template <class T, int N>
PK_FN Pack<T, N> operator>>(Pack<T, N> a, int bits) { return {a.v >> bits}; }

// Comparisons give masks: all bits of a lane set, or none, in signed integers of the element's width.
template <class T>
using MaskElement = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
#define PK_PACK_COMPARISON(op)                                                                                        \
  template <class T, int N>                                                                                           \
  PK_FN Pack<MaskElement<T>, N> operator op(Pack<T, N> a, Pack<T, N> b) {                                             \
    return {reinterpret_cast<typename Pack<MaskElement<T>, N>::Vector>(a.v op b.v)};                                  \
  }                                                                                                                   \
  template <class T, int N>                                                                                           \
  PK_FN Pack<MaskElement<T>, N> operator op(Pack<T, N> a, std::common_type_t<T> b) {                                  \
    return a op(Pack<T, N>{} + b);                                                                                    \
  }
PK_PACK_COMPARISON(<)
PK_PACK_COMPARISON(>)
PK_PACK_COMPARISON(>=)
PK_PACK_COMPARISON(==)
PK_PACK_COMPARISON(!=)
#undef PK_PACK_COMPARISON

template <class T, int N>
PK_FN Pack<T, N> select(Pack<MaskElement<T>, N> mask, Pack<T, N> a, Pack<T, N> b) {
  return {mask.v ? a.v : b.v};
}

template <int N>
PK_FN Pack<float, N> from_bits(Pack<int32_t, N> x) {
  return {reinterpret_cast<typename Pack<float, N>::Vector>(x.v)};
}
template <int N>
PK_FN Pack<double, N> from_bits(Pack<int64_t, N> x) {
  return {reinterpret_cast<typename Pack<double, N>::Vector>(x.v)};
}
template <int N>
PK_FN Pack<int32_t, N> to_bits(Pack<float, N> x) {
  return {reinterpret_cast<typename Pack<int32_t, N>::Vector>(x.v)};
}
template <int N>
PK_FN Pack<int64_t, N> to_bits(Pack<double, N> x) {
  return {reinterpret_cast<typename Pack<int64_t, N>::Vector>(x.v)};
}

// A sum with the constant 1.5 2^(mantissa bits) leaves the nearest integer in the low bits of the result.
template <int N>
PK_FN Pack<int32_t, N> nearest_integer(Pack<float, N> x) {
  const Pack<float, N> shifted = x + 12582912.0f;
  return to_bits(shifted) - int32_t(0x4b400000);
}
template <int N>
PK_FN Pack<int64_t, N> nearest_integer(Pack<double, N> x) {
  const Pack<double, N> shifted = x + 6755399441055744.0;
  return to_bits(shifted) - int64_t(0x4338000000000000);
}

// Integers of at most 22 bits in an element's bits: exponents.
template <class V, int N>
PK_FN std::enable_if_t<std::is_same<V, Pack<float, N>>::value, V> from_integer(Pack<int32_t, N> x) {
  return {__builtin_convertvector(x.v, typename V::Vector)};
}
template <class V, int N>
PK_FN std::enable_if_t<std::is_same<V, Pack<double, N>>::value, V> from_integer(Pack<int64_t, N> x) {
  return from_bits(x + int64_t(0x4338000000000000)) - 6755399441055744.0;
}
template <class V, int N>
PK_FN std::enable_if_t<std::is_same<V, Pack<Element<V>, N>>::value, V> from_word(Pack<uint32_t, N> x) {
  const auto as_signed = reinterpret_cast<typename Pack<int32_t, N>::Vector>(x.v);
  return {__builtin_convertvector(as_signed, typename V::Vector)};
}
template <class V, int N>
PK_FN std::enable_if_t<std::is_same<V, Pack<Element<V>, N>>::value, Pack<MaskElement<Element<V>>, N>> element_mask(
    Pack<int32_t, N> mask) {
  return {__builtin_convertvector(mask.v, typename Pack<MaskElement<Element<V>>, N>::Vector)};
}

template <class T, int N>
PK_FN Pack<T, N> square_root(Pack<T, N> x) {
  Pack<T, N> y;
#if defined(__AVX512F__)
  if constexpr (sizeof(x) == 64 && sizeof(T) == 4) {
    y.v = reinterpret_cast<typename Pack<T, N>::Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x.v)));
    return y;
  } else if constexpr (sizeof(x) == 64) {
    y.v = reinterpret_cast<typename Pack<T, N>::Vector>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(x.v)));
    return y;
  }
#elif defined(__SSE2__)
  for (size_t i = 0; i < sizeof(x) / 16; ++i) {
    if constexpr (sizeof(T) == 4) {
      __m128 part;
      memcpy(&part, reinterpret_cast<const char*>(&x) + 16 * i, 16);
      part = _mm_sqrt_ps(part);
      memcpy(reinterpret_cast<char*>(&y) + 16 * i, &part, 16);
    } else {
      __m128d part;
      memcpy(&part, reinterpret_cast<const char*>(&x) + 16 * i, 16);
      part = _mm_sqrt_pd(part);
      memcpy(reinterpret_cast<char*>(&y) + 16 * i, &part, 16);
    }
  }
  return y;
#endif
  for (int i = 0; i < N; ++i) y.v[i] = std::sqrt(x.v[i]);
  return y;
}

// The 64-bit products of even and of odd lanes are one instruction each; a shuffle sorts their halves.
template <int N>
PK_FN void multiply_wide(Pack<uint32_t, N> a, uint32_t b, Pack<uint32_t, N>& high, Pack<uint32_t, N>& low) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512i x = reinterpret_cast<__m512i>(a.v), m = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_mul_epu32(x, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), m);
    high.v = reinterpret_cast<typename Pack<uint32_t, N>::Vector>(
        _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
    low.v = reinterpret_cast<typename Pack<uint32_t, N>::Vector>(
        _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
    return;
  }
#endif
#if defined(__AVX2__)
  for (int i = 0; i < N / 8; ++i) {
    __m256i x;
    memcpy(&x, reinterpret_cast<const char*>(&a) + 32 * i, 32);
    const __m256i m = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_mul_epu32(x, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), m);
    const __m256i h = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    const __m256i l = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    memcpy(reinterpret_cast<char*>(&high) + 32 * i, &h, 32);
    memcpy(reinterpret_cast<char*>(&low) + 32 * i, &l, 32);
  }
#else
  for (int i = 0; i < N; ++i) {
    const uint64_t product = static_cast<uint64_t>(a.v[i]) * b;
    high.v[i] = static_cast<uint32_t>(product >> 32);
    low.v[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Lane i of table[index[i]], and the addition to it.
template <class T, int N>
PK_FN Pack<T, N> gather(const Pack<T, N>* table, Pack<uint32_t, N> index) {
  Pack<T, N> y;
  const T* elements = reinterpret_cast<const T*>(table);
  for (int i = 0; i < N; ++i) y.v[i] = elements[size_t(index.v[i]) * N + i];
  return y;
}
template <class T, int N>
PK_FN Dual<Pack<T, N>> gather(const Dual<Pack<T, N>>* table, Pack<uint32_t, N> index) {
  Dual<Pack<T, N>> y;
  const T* elements = reinterpret_cast<const T*>(table);
  for (int i = 0; i < N; ++i) {
    y.v.v[i] = elements[size_t(index.v[i]) * 2 * N + i];
    y.t.v[i] = elements[size_t(index.v[i]) * 2 * N + N + i];
  }
  return y;
}
template <class T, int N>
PK_FN void scatter_add(Pack<T, N>* table, Pack<uint32_t, N> index, Pack<T, N> value) {
  T* elements = reinterpret_cast<T*>(table);
  for (int i = 0; i < N; ++i) elements[size_t(index.v[i]) * N + i] += value.v[i];
}
template <class T, int N>
PK_FN void scatter_add(Dual<Pack<T, N>>* table, Pack<uint32_t, N> index, Dual<Pack<T, N>> value) {
  T* elements = reinterpret_cast<T*>(table);
  for (int i = 0; i < N; ++i) {
    elements[size_t(index.v[i]) * 2 * N + i] += value.v.v[i];
    elements[size_t(index.v[i]) * 2 * N + N + i] += value.t.v[i];
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
