// Scalars as lane values, and elementary functions on them and on packs of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define PK_FN __host__ __device__ __forceinline__
#define PK_UNROLL _Pragma("unroll")
#else
#define PK_FN inline __attribute__((always_inline))
#define PK_UNROLL _Pragma("GCC unroll 16")
#endif
#define PK_LAMBDA __attribute__((always_inline))

// Of what is made of the functions above. A level for old machines has one of each, where the compiler finds that as
// good, and not a copy in each place, which takes a third longer to compile.
#if defined(PK_COMPACT)
#define PK_CALL inline
#else
#define PK_CALL PK_FN
#endif

// Each instruction-set level, and CUDA, compiles these templates in a namespace of its own.
#ifndef PK_LEVEL
#define PK_LEVEL host
#endif

namespace po_kernels {
inline namespace PK_LEVEL {

// Of loops over what one row has: on a device all of it is in shared memory.
#if defined(__CUDACC__)
using Index = int;
#else
using Index = int64_t;
#endif

// ---- Scalars as lane values ----

template <class T>
struct LaneTraits;

template <>
struct LaneTraits<float> {
  using Element = float;
  using Word = uint32_t;  // random words and class labels, one a lane
  using Bits = int32_t;   // as wide as the element
  static constexpr int width = 1;
};

template <>
struct LaneTraits<double> {
  using Element = double;
  using Word = uint32_t;
  using Bits = int64_t;
  static constexpr int width = 1;
};

PK_FN float select(bool mask, float a, float b) {
  return mask ? a : b;
}
PK_FN double select(bool mask, double a, double b) {
  return mask ? a : b;
}
PK_FN uint32_t select(bool mask, uint32_t a, uint32_t b) {
  return mask ? a : b;
}
PK_FN float square_root(float x) {
  return ::sqrtf(x);
}
PK_FN double square_root(double x) {
  return ::sqrt(x);
}
// Of a positive normal number: the same value, on a device without the branch for others.
template <class V>
PK_FN V square_root_of_normal(V x) {
  return square_root(x);
}
#if defined(__CUDA_ARCH__)
PK_FN float square_root_of_normal(float x) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return ::fmaf(::fmaf(-root, root, x), inverse * 0.5f, root);
}
#endif

// The same bits as another type.
template <class To, class From>
PK_FN To reinterpreted(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
// The float or double with these bits, and back.
PK_FN float from_bits(int32_t bits) {
  return reinterpreted<float>(bits);
}
PK_FN double from_bits(int64_t bits) {
  return reinterpreted<double>(bits);
}
PK_FN int32_t to_bits(float x) {
  return reinterpreted<int32_t>(x);
}
PK_FN int64_t to_bits(double x) {
  return reinterpreted<int64_t>(x);
}

// Conversions of small integers (below 2^31), and of masks on words to masks on elements.
template <class V>
PK_FN std::enable_if_t<std::is_floating_point<V>::value, V> from_word(uint32_t word) {
  return static_cast<V>(static_cast<int32_t>(word));
}
template <class V>
PK_FN std::enable_if_t<std::is_floating_point<V>::value, V> from_integer(typename LaneTraits<V>::Bits value) {
  return static_cast<V>(value);
}
PK_FN int32_t nearest_integer(float x) {
  return static_cast<int32_t>(::rintf(x));
}
PK_FN int64_t nearest_integer(double x) {
  return static_cast<int64_t>(::rint(x));
}
template <class V>
PK_FN std::enable_if_t<std::is_floating_point<V>::value, bool> element_mask(bool mask) {
  return mask;
}
PK_FN uint32_t widen(uint32_t word) {
  return word;
}
PK_FN uint32_t narrow(uint32_t word) {
  return word;
}
PK_FN void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  high = __umulhi(a, b);  // of a 64-bit product nvcc also adds up the halves
  low = a * b;
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}
template <class V>
PK_FN V gather(const V* table, uint32_t index) {
  return table[index];
}
template <class V>
PK_FN void scatter(V* table, uint32_t index, V value) {
  table[index] = value;
}

// ---- Elementary functions on lanes ----

template <class V>
using Element = typename LaneTraits<V>::Element;
template <class V>
using Word = typename LaneTraits<V>::Word;

template <class V>
PK_FN V broadcast(Element<V> x) {
  return V{} + x;
}

// The largest power of two that is not above x > 0, as far as neither it nor its inverse leaves the normal numbers:
// what is multiplied by that inverse loses no digit, and what x bounds is then neither too large nor too small to
// square.
template <class V>
PK_FN V power_of_two(V x) {
  using T = Element<V>;
  using Bits = typename LaneTraits<V>::Bits;
  constexpr auto exponent = sizeof(T) == 4 ? int64_t(0x7f800000) : int64_t(0x7ff0000000000000);
  constexpr T least = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  constexpr T most = T(1) / least;
  const V power = from_bits(Bits(to_bits(x) & exponent));  // 0 of a subnormal number, inf of inf and nan
  return select(power < least, broadcast<V>(least), select(power > most, broadcast<V>(most), power));
}

// Polynomial in x with the highest coefficient first.
template <class V, class T>
PK_FN V polynomial(V, T c) {
  return V{} + c;
}
template <class V, class T, class... Rest>
PK_FN V polynomial(V x, T c0, T c1, Rest... rest) {
  V y = V{} + c0;
  y = y * x + c1;
  ((y = y * x + rest), ...);
  return y;
}

// log(1 + f), times a power of two, for f in [sqrt(1/2) - 1, sqrt(2) - 1], with a relative error of about an ulp also
// where f is small.
template <int times = 1, class V>
PK_FN V log1p_reduced(V f) {
  using T = Element<V>;
  const V square = f * f;
  if constexpr (sizeof(T) == 4) {  // coefficients: Cephes, logf
    constexpr T m = times;
    const V p = polynomial(f, m * 7.0376836292e-2f, m * -1.1514610310e-1f, m * 1.1676998740e-1f, m * -1.2420140846e-1f,
                           m * 1.4249322787e-1f, m * -1.6668057665e-1f, m * 2.0000714765e-1f, m * -2.4999993993e-1f,
                           m * 3.3333331174e-1f);
    return f * m + (f * square * p - square * (m * T(0.5)));
  } else {  // coefficients: fdlibm, log
    const V s = f / (f + T(2));
    const V z = s * s;
    const V r = z * polynomial(z, 1.479819860511658591e-1, 1.531383769920937332e-1, 1.818357216161805012e-1,
                               2.222219843214978396e-1, 2.857142874366239149e-1, 3.999999999940941908e-1,
                               6.666666666666735130e-1);
    const V half = square * T(0.5);
    return (f - (half - s * (half + r))) * T(times);
  }
}

// Splits a positive normal x into 2^exponent (1 + f), f as log1p_reduced wants it.
template <class V>
PK_FN void split(V x, V& exponent, V& f) {
  using T = Element<V>;
  using Bits = typename LaneTraits<V>::Bits;
  constexpr int mantissa_bits = sizeof(T) == 4 ? 23 : 52;
  constexpr int64_t sqrt_half = sizeof(T) == 4 ? int64_t(0x3f3504f3) : int64_t(0x3fe6a09e667f3bcd);
  constexpr int64_t mantissa = (int64_t(1) << mantissa_bits) - 1;
  const Bits bits = to_bits(x) - sqrt_half;
  exponent = from_integer<V>(Bits(bits >> mantissa_bits));
  f = from_bits(Bits((bits & mantissa) + sqrt_half)) - T(1);
}

// Natural logarithm for x > 0 (subnormals included), -inf at 0, nan below.
template <class V>
PK_FN V log(V x) {
  using T = Element<V>;
  constexpr T ln2_high = sizeof(T) == 4 ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T ln2_low = sizeof(T) == 4 ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  constexpr T tiny = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  constexpr T lift = sizeof(T) == 4 ? T(33554432) : T(18014398509481984);  // 2^25, 2^54
  constexpr T lift_exponent = sizeof(T) == 4 ? T(25) : T(54);
  const auto small = x < tiny;
  V exponent, f;
  split(select(small, x * lift, x), exponent, f);
  exponent = exponent - select(small, broadcast<V>(lift_exponent), V{});
  V y = exponent * ln2_high + (log1p_reduced(f) + exponent * ln2_low);
  const T infinity = T(__builtin_huge_val());
  y = select(x < infinity, y, x);  // inf and nan pass through
  y = select(x > T(0), y,
             select(x < T(0), broadcast<V>(T(__builtin_nan(""))), select(x == T(0), broadcast<V>(-infinity), x)));
  return y;
}

// ln 2 in two parts, of which an integer of up to 10 bits times the first is exact.
template <class T>
constexpr T kLog2High = sizeof(T) == 4 ? T(0.693359375) : T(6.93147180369123816490e-01);
template <class T>
constexpr T kLog2Low = sizeof(T) == 4 ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
template <class T>
constexpr T kLog2e = T(1.4426950408889634074);

// exp r for |r| <= ln(2) / 2.
template <class V>
PK_FN std::enable_if_t<sizeof(Element<V>) == 4, V> exp_near_zero(V r) {  // coefficients: Cephes, expf
  return polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                    5.0000001201e-1f, 1.0f, 1.0f);
}

// exp x = y 2^k with y in [sqrt(1/2), sqrt(2)].
template <class V>
PK_FN V exp_reduced(V x, typename LaneTraits<V>::Bits& k) {
  using T = Element<V>;
  k = nearest_integer(x * kLog2e<T>);
  const V n = from_integer<V>(k);
  const V high = x - n * kLog2High<T>;
  if constexpr (sizeof(T) == 4) {
    return exp_near_zero(high - n * kLog2Low<T>);
  } else {  // coefficients: fdlibm, exp
    const V low = n * kLog2Low<T>;
    const V r = high - low;
    const V z = r * r;
    const V c = r - z * polynomial(z, 4.13813679705723846039e-08, -1.65339022054652515390e-06,
                                   6.61375632143793436117e-05, -2.77777777770155933842e-03, 1.66666666666666019037e-01);
    return (high - (low - r * c / (broadcast<V>(T(2)) - c))) + T(1);
  }
}

// exp, with gradual underflow, inf above the range and 0 at -inf.
template <class V>
PK_FN V exp(V x) {
  using T = Element<V>;
  using Bits = typename LaneTraits<V>::Bits;
  constexpr int mantissa_bits = sizeof(T) == 4 ? 23 : 52;
  constexpr int bias = sizeof(T) == 4 ? 127 : 1023;
  constexpr T limit = sizeof(T) == 4 ? T(150) : T(1080);  // beyond these in units of ln 2, the result is inf or 0
  const V clamped = select(x > limit * T(0.7), broadcast<V>(limit * T(0.7)),
                           select(x < -limit * T(0.7), broadcast<V>(-limit * T(0.7)), x));
  Bits k;
  V y = exp_reduced(clamped, k);
  // Two factors of 2, each in range, so that results below the normal range and above it come out right.
  const Bits half = k >> 1;
  y = y * from_bits((half + Bits{} + bias) << mantissa_bits) * from_bits((k - half + bias) << mantissa_bits);
  return select(x == x, y, x);
}

// exp of x from kLowest to about 0.
template <class T>
constexpr T kLowest = T(sizeof(T) == 4 ? -87 : -708);
template <class V>
PK_FN V exp_in_range(V x) {
  using T = Element<V>;
  if constexpr (sizeof(T) == 4) {
    // The low bits of such a sum are the exponent of the result, as a float has it.
    constexpr T integers = 12582912 + 127;
    const V shifted = x * kLog2e<T> + integers;
    const V n = shifted - integers;
    return exp_near_zero(x - n * kLog2High<T> - n * kLog2Low<T>) * from_bits(to_bits(shifted) << 23);
  } else {
    typename LaneTraits<V>::Bits k;
    const V y = exp_reduced(x, k);
    return y * from_bits((k + int64_t(1023)) << 52);
  }
}

// exp for x <= 0, and 0 where x is below kLowest and the result would be subnormal.
template <class V>
PK_FN V exp_of_negative(V x) {
  return select(x < kLowest<Element<V>>, V{}, exp_in_range(x));
}

// tanh with a relative error of some ulp also near 0.
template <class V>
PK_FN V tanh(V x) {
  using T = Element<V>;
  const V size = select(x < T(0), -x, x);
  const V e = exp_of_negative(size * T(-2));
  const V large = (broadcast<V>(T(1)) - e) / (e + T(1));
  const V s = x * x;
  V small;
  if constexpr (sizeof(T) == 4) {  // coefficients: Cephes, tanhf and tanh
    small = x + x * s *
                    polynomial(s, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                               -3.33332819422e-1f);
  } else {
    small = x + x * s *
                    (polynomial(s, -9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3) /
                     polynomial(s, 1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3));
  }
  return select(size < T(0.625), small, select(x < T(0), -large, large));
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
