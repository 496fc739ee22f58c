// The distribution of a token over its vocabulary. Columns are in the lanes of a V; sums over a row are in double.
//
// With z = logits / temperature, capped before if asked, s = log Σ exp z, p = exp(z - s) and the taken token a:
//   log p = z_a - s,   H = -Σ p log p,
// and the gradient of α log p_a + β H + γ s in z_j is α (δ_ja - p_j) - β p_j (z_j - E) + γ p_j, with E = Σ p z.
#pragma once

#include "po_kernels/blocks.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

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
