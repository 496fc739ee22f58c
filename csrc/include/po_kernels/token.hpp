// The distribution of a token over its vocabulary. Columns are in the lanes of a V; sums over a row are in double.
//
// With z = logits / temperature, capped before if asked, s = log Σ exp z, p = exp(z - s) and the taken token a:
//   log p = z_a - s,   H = -Σ p log p,
// and the gradient of α log p_a + β H + γ s in z_j is α (δ_ja - p_j) - β p_j (z_j - E) + γ p_j, with E = Σ p z.
#pragma once

#include "po_kernels/blocks.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// exp of x from kLowest to about 0.
template <class T>
constexpr T kLowest = T(sizeof(T) == 4 ? -87 : -708);
template <class V>
PK_FN V exp_in_range(V x) {
  if constexpr (is_dual<V>) {
    const Primal<V> y = exp_in_range(x.v);
    return {y, y * x.t};
  } else {
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
}

// For x <= 0, and 0 where x is below kLowest and the result would be subnormal.
template <class V>
PK_FN V exp_of_negative(V x) {
  return select(stop(x) < kLowest<Element<V>>, V{}, exp_in_range(x));
}

// tanh with a relative error of some ulp also near 0.
template <class V>
PK_FN V tanh(V x) {
  if constexpr (is_dual<V>) {
    const Primal<V> y = tanh(x.v);
    return {y, x.t - x.t * (y * y)};
  } else {
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
      small =
          x + x * s *
                  (polynomial(s, -9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3) /
                   polynomial(s, 1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3));
    }
    return select(size < T(0.625), small, select(x < T(0), -large, large));
  }
}

// A logit as it is capped, and the derivative of z = capped / temperature in the logit, from what is capped. Without a
// cap `softcap` is 0.
template <class T>
struct TokenScale {
  T inverse_temperature, softcap;

  template <bool capped, class V>
  PK_FN V cap(V x) const {
    if constexpr (!capped) return x;
    return tanh(x * (T(1) / softcap)) * softcap;
  }
  template <class V>
  PK_FN V slope(V y) const {
    const V t = y * (T(1) / softcap);
    return -(t * t) + T(1);
  }
};

// Sums over a row relative to the largest capped logit so far: in S, a double or its dual.
template <class S>
struct TokenSums {
  double inverse_temperature;
  double top = -__builtin_huge_val();
  S mass{}, product{};  // Σ e and Σ e d, with d = (y - top) / temperature of what is capped, e = exp d

  PK_FN void rise(double to) {
    if (!(to > top)) return;
    if (top > -__builtin_huge_val()) {
      const double by = (top - to) * inverse_temperature, factor = ::exp(by);
      product = factor == 0 ? S{} : (product + mass * by) * factor;
      mass = mass * factor;
    }
    top = to;
  }
};

// Of a token log p, H and s, in the order of the axis of the value.
constexpr int kTokenStats = 3;
template <class S>
PK_FN void token_stats(const TokenSums<S>& sums, S taken, S (&stats)[kTokenStats]) {
  const S log_mass = log(sums.mass);
  stats[2] = log_mass + sums.top * sums.inverse_temperature;
  stats[0] = (taken - sums.top) * sums.inverse_temperature - log_mass;
  stats[1] = log_mass - sums.product / sums.mass;
}

// The gradient in a capped logit for cotangents of the three: e (offset - factor d), and of the taken one α more.
template <class S>
struct TokenGradient {
  S alpha, offset, factor;

  PK_FN TokenGradient(const TokenSums<S>& sums, const S (&cotangents)[kTokenStats]) {
    alpha = cotangents[0] * sums.inverse_temperature;
    factor = cotangents[1] * sums.inverse_temperature / sums.mass;
    offset = (cotangents[2] * sums.inverse_temperature - alpha + factor * sums.product) / sums.mass;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
