// A Pack holds one number for each of several rows: the SIMD lane value of the CPU kernels, a register wide at each
// instruction-set level.
#pragma once

#include "po_kernels/blocks.hpp"
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

// At the lowest level two registers for double, whose random words would otherwise fill half of one.
#if defined(__AVX512F__)
constexpr int kFloatLanes = 16, kDoubleLanes = 8;
#elif defined(__AVX2__)
constexpr int kFloatLanes = 8, kDoubleLanes = 4;
#else
constexpr int kFloatLanes = 4, kDoubleLanes = 4;
#endif
template <class T>
using Lanes = Pack<T, sizeof(T) == 4 ? kFloatLanes : kDoubleLanes>;

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

#define PK_PACK_OPERATOR(op)                                            \
  template <class T, int N>                                             \
  PK_FN Pack<T, N> operator op(Pack<T, N> a, Pack<T, N> b) {            \
    return {a.v op b.v};                                                \
  }                                                                     \
  template <class T, int N>                                             \
  PK_FN Pack<T, N> operator op(Pack<T, N> a, std::common_type_t<T> b) { \
    return {a.v op b};                                                  \
  }
PK_PACK_OPERATOR(+)
PK_PACK_OPERATOR(-)
PK_PACK_OPERATOR(*)
PK_PACK_OPERATOR(/)
PK_PACK_OPERATOR(&)
PK_PACK_OPERATOR(|)
PK_PACK_OPERATOR(^)
#undef PK_PACK_OPERATOR

template <class T, int N>
PK_FN Pack<T, N> operator-(Pack<T, N> a) {
  return {-a.v};
}
template <class T, int N>
PK_FN Pack<T, N> operator<<(Pack<T, N> a, int bits) {
  return {a.v << bits};
}
template <class T, int N>
PK_FN Pack<T, N> operator>>(Pack<T, N> a, int bits) {
  return {a.v >> bits};
}

// Comparisons give masks: all bits of a lane set, or none, in signed integers of the element's width.
template <class T>
using MaskElement = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
#define PK_PACK_COMPARISON(op)                                                       \
  template <class T, int N>                                                          \
  PK_FN Pack<MaskElement<T>, N> operator op(Pack<T, N> a, Pack<T, N> b) {            \
    return {reinterpret_cast<typename Pack<MaskElement<T>, N>::Vector>(a.v op b.v)}; \
  }                                                                                  \
  template <class T, int N>                                                          \
  PK_FN Pack<MaskElement<T>, N> operator op(Pack<T, N> a, std::common_type_t<T> b) { \
    return a op(Pack<T, N>{} + b);                                                   \
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

// Integers of at most 22 bits in an element's bits: exponents. Words below 2^31.
template <class V, int N>
PK_FN std::enable_if_t<std::is_same<V, Pack<float, N>>::value, V> from_integer(Pack<int32_t, N> x) {
  return {__builtin_convertvector(x.v, typename V::Vector)};
}
template <class V, int N>
PK_FN std::enable_if_t<std::is_same<V, Pack<double, N>>::value, V> from_integer(Pack<int64_t, N> x) {
  return from_bits(x + int64_t(0x4338000000000000)) - 6755399441055744.0;
}
template <int N>
PK_FN Pack<uint32_t, N> to_words(Pack<double, N> x) {
  const auto words = __builtin_convertvector(x.v, typename Pack<int32_t, N>::Vector);
  return {reinterpret_cast<typename Pack<uint32_t, N>::Vector>(words)};
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

#if defined(__SSE2__)
// Applies an instruction to each register-sized part of a pack.
template <class Register, class Out, class In, class Instruction>
PK_FN Out by_register(In x, Instruction instruction) {
  static_assert(sizeof(In) == sizeof(Out) && sizeof(In) % sizeof(Register) == 0, "a pack is whole registers");
  Out y;
  for (size_t at = 0; at < sizeof(In); at += sizeof(Register)) {
    Register part;
    memcpy(&part, reinterpret_cast<const char*>(&x) + at, sizeof part);
    part = instruction(part);
    memcpy(reinterpret_cast<char*>(&y) + at, &part, sizeof part);
  }
  return y;
}
#endif

template <class T, int N>
PK_FN Pack<T, N> square_root(Pack<T, N> x) {
  using P = Pack<T, N>;
#if defined(__AVX512F__)
  if constexpr (sizeof(P) == 64 && sizeof(T) == 4)
    return by_register<__m512, P>(x, [](__m512 a) { return _mm512_sqrt_ps(a); });
  if constexpr (sizeof(P) == 64 && sizeof(T) == 8)
    return by_register<__m512d, P>(x, [](__m512d a) { return _mm512_sqrt_pd(a); });
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(P) == 32 && sizeof(T) == 4)
    return by_register<__m256, P>(x, [](__m256 a) { return _mm256_sqrt_ps(a); });
  if constexpr (sizeof(P) == 32 && sizeof(T) == 8)
    return by_register<__m256d, P>(x, [](__m256d a) { return _mm256_sqrt_pd(a); });
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return by_register<__m128, P>(x, [](__m128 a) { return _mm_sqrt_ps(a); });
  if constexpr (sizeof(T) == 8) return by_register<__m128d, P>(x, [](__m128d a) { return _mm_sqrt_pd(a); });
#endif
  P y;
  for (int i = 0; i < N; ++i) y.v[i] = std::sqrt(x.v[i]);
  return y;
}

// Words of the even and of the odd lanes, each in the low half of 64 bits. The instruction that multiplies reads low
// halves only, so that what is left in the high ones does no harm until `narrow` drops it.
template <int N>
struct WideWords {
  Pack<uint64_t, N / 2> even, odd;
};

template <int N>
PK_FN WideWords<N> widen(Pack<uint32_t, N> x) {
  const Pack<uint64_t, N / 2> pairs{reinterpret_cast<typename Pack<uint64_t, N / 2>::Vector>(x.v)};
  return {pairs, pairs >> 32};
}
template <int N>
PK_FN Pack<uint32_t, N> narrow(WideWords<N> x) {
  const Pack<uint64_t, N / 2> both = (x.even & uint64_t(0xFFFFFFFF)) | (x.odd << 32);
  return {reinterpret_cast<typename Pack<uint32_t, N>::Vector>(both.v)};
}
template <int N>
PK_FN WideWords<N> operator^(WideWords<N> a, WideWords<N> b) {
  return {a.even ^ b.even, a.odd ^ b.odd};
}
template <int N>
PK_FN WideWords<N> operator^(WideWords<N> a, uint32_t b) {
  return {a.even ^ uint64_t(b), a.odd ^ uint64_t(b)};
}

// Products of the low halves of 64-bit lanes.
template <int N>
PK_FN Pack<uint64_t, N> multiply_low_halves(Pack<uint64_t, N> x, uint32_t b) {
#if defined(__AVX512F__)
  if constexpr (N == 8) {
    return by_register<__m512i, Pack<uint64_t, N>>(
        x, [b](__m512i part) { return _mm512_mul_epu32(part, _mm512_set1_epi32(int(b))); });
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 4) {
    return by_register<__m256i, Pack<uint64_t, N>>(
        x, [b](__m256i part) { return _mm256_mul_epu32(part, _mm256_set1_epi32(int(b))); });
  }
#endif
#if defined(__SSE2__)
  return by_register<__m128i, Pack<uint64_t, N>>(
      x, [b](__m128i part) { return _mm_mul_epu32(part, _mm_set1_epi32(int(b))); });
#else
  return (x & uint64_t(0xFFFFFFFF)) * uint64_t(b);
#endif
}

template <int N>
PK_FN void multiply_wide(WideWords<N> a, uint32_t b, WideWords<N>& high, WideWords<N>& low) {
  low = {multiply_low_halves(a.even, b), multiply_low_halves(a.odd, b)};
  high = {low.even >> 32, low.odd >> 32};
}

// Lane i of table[index[i]], read and written.
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
PK_FN void scatter(Pack<T, N>* table, Pack<uint32_t, N> index, Pack<T, N> value) {
  T* elements = reinterpret_cast<T*>(table);
  for (int i = 0; i < N; ++i) elements[size_t(index.v[i]) * N + i] = value.v[i];
}
template <class T, int N>
PK_FN void scatter(Dual<Pack<T, N>>* table, Pack<uint32_t, N> index, Dual<Pack<T, N>> value) {
  T* elements = reinterpret_cast<T*>(table);
  for (int i = 0; i < N; ++i) {
    elements[size_t(index.v[i]) * 2 * N + i] = value.v.v[i];
    elements[size_t(index.v[i]) * 2 * N + N + i] = value.t.v[i];
  }
}

// ---- Lanes of one row ----

// In all lanes their sum, the largest, or that of one of them.
template <class T, int N>
PK_FN Pack<T, N> over_lanes(Pack<T, N> x) {
  for (int n = N / 2; n > 0; n /= 2) {
    for (int l = 0; l < n; ++l) x.v[l] += x.v[l + n];
  }
  return broadcast<Pack<T, N>>(x.v[0]);
}
template <class T, int N>
PK_FN Pack<T, N> largest_lane(Pack<T, N> x) {
  T largest = x.v[0];
  for (int l = 1; l < N; ++l) largest = x.v[l] > largest ? x.v[l] : largest;
  return broadcast<Pack<T, N>>(largest);
}
template <class T, int N>
PK_FN Pack<T, N> from_lane(Pack<T, N> x, int lane) {
  return broadcast<Pack<T, N>>(x.v[lane]);
}

// Zero in all lanes but one.
template <class T, int N>
PK_FN Pack<T, N> in_lane(Pack<T, N> x, int lane) {
  Pack<T, N> y{};
  y.v[lane] = x.v[lane];
  return y;
}

template <class V>
PK_FN Dual<V> over_lanes(Dual<V> x) {
  return {over_lanes(x.v), over_lanes(x.t)};
}
template <class V>
PK_FN Dual<V> from_lane(Dual<V> x, int lane) {
  return {from_lane(x.v, lane), from_lane(x.t, lane)};
}
template <class V>
PK_FN Dual<V> in_lane(Dual<V> x, int lane) {
  return {in_lane(x.v, lane), in_lane(x.t, lane)};
}

// ---- Rows of memory to and from lanes ----

// Four neighbouring elements of a row, wherever they start.
template <class T>
struct Four {
  typedef T Vector __attribute__((vector_size(4 * sizeof(T))));
  typedef T Unaligned __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// The four columns of rows k, k + 4, k + 8, ... side by side.
template <class T, int N>
PK_FN typename Pack<T, N>::Vector every_fourth_row(const T* const* row, int64_t column) {
  const auto four = [&](int r) ->
      typename Four<T>::Vector { return *reinterpret_cast<const typename Four<T>::Unaligned*>(row[r] + column); };
  if constexpr (N == 4) {
    return four(0);
  } else if constexpr (N == 8) {
    return __builtin_shufflevector(four(0), four(4), 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    const auto low = __builtin_shufflevector(four(0), four(4), 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(four(8), four(12), 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
}

// Of each four lanes (a0 a1 a2 a3) and (b0 b1 b2 b3): a0 b0 a1 b1 or, high, a2 b2 a3 b3; and a0 a1 b0 b1 or a2 a3 b2
// b3.
#define PK_LANES_OF_FOUR(lane)                                                                                    \
  if constexpr (N == 4) {                                                                                         \
    return __builtin_shufflevector(a, b, lane(0), lane(1), lane(2), lane(3));                                     \
  } else if constexpr (N == 8) {                                                                                  \
    return __builtin_shufflevector(a, b, lane(0), lane(1), lane(2), lane(3), lane(4), lane(5), lane(6), lane(7)); \
  } else {                                                                                                        \
    return __builtin_shufflevector(a, b, lane(0), lane(1), lane(2), lane(3), lane(4), lane(5), lane(6), lane(7),  \
                                   lane(8), lane(9), lane(10), lane(11), lane(12), lane(13), lane(14), lane(15)); \
  }
template <int N, bool high, class Vector>
PK_FN Vector interleave_fours(Vector a, Vector b) {
#define PK_LANE(i) ((i) / 4 * 4 + (high ? 2 : 0) + (i) % 4 / 2 + ((i) % 2 ? N : 0))
  PK_LANES_OF_FOUR(PK_LANE)
#undef PK_LANE
}
template <int N, bool high, class Vector>
PK_FN Vector join_fours(Vector a, Vector b) {
#define PK_LANE(i) ((i) / 4 * 4 + (high ? 2 : 0) + (i) % 2 + ((i) % 4 / 2 ? N : 0))
  PK_LANES_OF_FOUR(PK_LANE)
#undef PK_LANE
}
#undef PK_LANES_OF_FOUR

// Transposes each 4 x 4 block of lanes.
template <int N, class Vector>
PK_FN void transpose_fours(Vector (&x)[4]) {
  const Vector a = interleave_fours<N, false>(x[0], x[1]), b = interleave_fours<N, true>(x[0], x[1]);
  const Vector c = interleave_fours<N, false>(x[2], x[3]), d = interleave_fours<N, true>(x[2], x[3]);
  x[0] = join_fours<N, false>(a, c);
  x[1] = join_fours<N, true>(a, c);
  x[2] = join_fours<N, false>(b, d);
  x[3] = join_fours<N, true>(b, d);
}

// Column c of N rows into lanes to[c * step], in elements, and back from[c * step]. The last four columns may overlap
// those before.
template <class T, int N>
PK_FN void rows_to_lanes(const T* const (&row)[N], int64_t columns, T* to, int64_t step) {
  using Vector = typename Pack<T, N>::Vector;
  for (int64_t c = 0; columns >= 4 && c < columns; c += 4) {
    const int64_t first = c + 4 <= columns ? c : columns - 4;
    Vector x[4];
    unrolled<4>([&](auto k) PK_LAMBDA { x[k] = every_fourth_row<T, N>(row + k, first); });
    transpose_fours<N>(x);
    unrolled<4>([&](auto k) PK_LAMBDA { memcpy(to + (first + k) * step, &x[k], sizeof(Vector)); });
  }
  for (int64_t c = 0; columns < 4 && c < columns; ++c) {
    Vector x;
    for (int l = 0; l < N; ++l) x[l] = row[l][c];
    memcpy(to + c * step, &x, sizeof x);
  }
}
template <class T, int N>
PK_FN void lanes_to_rows(const Pack<T, N>* from, int64_t columns, T* const (&row)[N], int64_t step = 1) {
  using Vector = typename Pack<T, N>::Vector;
  for (int64_t c = 0; columns >= 4 && c < columns; c += 4) {
    const int64_t first = c + 4 <= columns ? c : columns - 4;
    Vector x[4] = {from[first * step].v, from[(first + 1) * step].v, from[(first + 2) * step].v,
                   from[(first + 3) * step].v};
    transpose_fours<N>(x);
    unrolled<4>([&](auto k) PK_LAMBDA {
      unrolled<N / 4>([&](auto quarter) PK_LAMBDA {
        constexpr int l = 4 * quarter;
        *reinterpret_cast<typename Four<T>::Unaligned*>(row[l + k] + first) =
            __builtin_shufflevector(x[k], x[k], l, l + 1, l + 2, l + 3);
      });
    });
  }
  for (int64_t c = 0; columns < 4 && c < columns; ++c) {
    for (int l = 0; l < N; ++l) row[l][c] = from[c * step].v[l];
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
