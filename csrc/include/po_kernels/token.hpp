// The distribution of a token over its vocabulary. Columns are in the lanes of a V; sums over a row are in double.
//
// With z = logits / temperature, capped before if asked, s = log Σ exp z, p = exp(z - s) and the taken token a:
//   log p = z_a - s,   H = -Σ p log p,
// and the gradient of α log p_a + β H + γ s in z_j is α (δ_ja - p_j) - β p_j (z_j - E) + γ p_j, with E = Σ p z.
#pragma once

#include "po_kernels/blocks.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// For x <= 0, and 0 where x is below kLowest and the result would be subnormal.
template <class T>
constexpr T kLowest = T(sizeof(T) == 4 ? -87 : -708);
template <class V>
PK_FN V exp_of_negative(V x) {
  if constexpr (is_dual<V>) {
    const Primal<V> y = exp_of_negative(x.v);
    return {y, y * x.t};
  } else {
    using T = Element<V>;
    using Bits = typename LaneTraits<V>::Bits;
    constexpr int mantissa_bits = sizeof(T) == 4 ? 23 : 52, bias = sizeof(T) == 4 ? 127 : 1023;
    Bits k;
    V y = exp_reduced(x, k);
    y = y * from_bits(Bits((k + bias) << mantissa_bits));
    return select(x < kLowest<T>, V{}, y);
  }
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

// z of a logit, and its derivative from z. Without a cap `softcap` is 0.
template <class T>
struct TokenScale {
  T inverse_temperature, softcap;

  template <bool capped, class V>
  PK_FN V logit(V x) const {
    if constexpr (!capped) return x * inverse_temperature;
    return tanh(x * (T(1) / softcap)) * (softcap * inverse_temperature);
  }
  template <bool capped, class V>
  PK_FN V slope(V z) const {
    if constexpr (!capped) return constant<V>(inverse_temperature);
    const V y = z * (T(1) / (softcap * inverse_temperature));
    return -(y * y * inverse_temperature) + inverse_temperature;
  }
};

// Sums over a row relative to the largest z so far: in S, a double or its dual.
template <class S>
struct TokenSums {
  double top = -__builtin_huge_val();
  S mass{}, product{};  // Σ e and Σ e d, with d = z - top, e = exp d

  PK_FN void rise(double to) {
    if (!(to > top)) return;
    if (top > -__builtin_huge_val()) {
      const double factor = ::exp(top - to);
      product = factor == 0 ? S{} : (product + mass * (top - to)) * factor;
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
  stats[2] = log_mass + sums.top;
  stats[0] = taken - sums.top - log_mass;
  stats[1] = log_mass - sums.product / sums.mass;
}

// The gradient in z for cotangents of the three: e (offset - factor d), and of the taken one α more.
template <class S>
struct TokenGradient {
  S alpha, offset, factor;

  PK_FN TokenGradient(const TokenSums<S>& sums, const S (&cotangents)[kTokenStats]) {
    alpha = cotangents[0];
    factor = cotangents[1] / sums.mass;
    offset = (cotangents[2] - alpha + factor * sums.product) / sums.mass;
  }
};

// d = z - top. A masked logit gets one whose e is 0, and no derivative.
template <class V>
PK_FN V centred(V z, Element<V> top) {
  using T = Element<V>;
  const V d = z + (-top);
  return select(stop(d) < kLowest<T>, constant<V>(kLowest<T> * T(2)), d);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
