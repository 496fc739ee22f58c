// The distribution of a token over its vocabulary. Columns are in the lanes of a V; sums over a row are in double.
//
// With z = logits / temperature, capped before if asked, s = log Σ exp z, p = exp(z - s) and the taken token a:
//   log p = z_a - s,   H = -Σ p log p,
// and the gradient of α log p_a + β H + γ s in z_j is α (δ_ja - p_j) - β p_j (z_j - E) + γ p_j, with E = Σ p z.
#pragma once

#include "po_kernels/blocks.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// A logit as it is capped, and the derivative of z = capped / temperature in the logit, from what is capped. Without a
// cap `softcap` is 0.
template <class T>
struct TokenScale {
  T inverse_temperature, softcap;

  template <bool capped, class V>
  PK_CALL V cap(V x) const {
    if constexpr (!capped) return x;
    return tanh(x * (T(1) / softcap)) * softcap;
  }
  template <class V>
  PK_CALL V slope(V y) const {
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

  PK_CALL void rise(double to) {
    if (!(to > top)) return;
    if (top > -__builtin_huge_val()) {
      const double by = (0.5 * top - 0.5 * to) * (2 * inverse_temperature), factor = ::exp(by);
      product = factor == 0 ? S{} : (product + mass * by) * factor;
      mass = mass * factor;
    }
    top = to;
  }
};

// Of a token log p, H and s, in the order of the axis of the value; then the top, the mass and the mean of its sums,
// which have no derivative.
constexpr int kTokenStats = 6;
template <class S>
PK_CALL void token_stats(const TokenSums<S>& sums, S taken, S (&stats)[kTokenStats]) {
  const S log_mass = log(sums.mass);
  stats[2] = log_mass + sums.top * sums.inverse_temperature;
  stats[0] = (taken * 0.5 - 0.5 * sums.top) * (2 * sums.inverse_temperature) - log_mass;
  stats[1] = log_mass - sums.product / sums.mass;
  stats[3] = S{sums.top};
  stats[4] = S{stop(sums.mass)};
  stats[5] = S{stop(sums.product) / stop(sums.mass)};
}

// The gradient in a capped logit for cotangents of the three: e (offset - factor d), and of the taken one α more.
template <class S>
struct TokenGradient {
  S alpha, offset, factor;

  PK_CALL TokenGradient(const TokenSums<S>& sums, const S (&cotangents)[kTokenStats]) {
    alpha = cotangents[0] * sums.inverse_temperature;
    factor = cotangents[1] * sums.inverse_temperature / sums.mass;
    offset = (cotangents[2] * sums.inverse_temperature - alpha + factor * sums.product) / sums.mass;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
