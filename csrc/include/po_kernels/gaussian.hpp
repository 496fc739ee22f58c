// The diagonal scale S = diag(σ), given by log σ.
#pragma once

#include "po_kernels/gaussian_family.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V>
struct DiagonalScale {
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = false;

  Index dim;
  const V* log_std;
  V* std = nullptr;
  V* inverse_std = nullptr;

  PK_FN DiagonalScale(Index dim, const V* parameter) : dim(dim), log_std(parameter) {}

  PK_FN static Index size(Index dim) { return dim; }
  PK_FN static Index work(Index dim) { return 2 * padded(dim); }
  PK_FN static Index team_work(Index dim) { return 2 * padded(dim); }
  PK_FN static Index padded(Index dim) { return (dim + 3) / 4 * 4; }  // of std and inverse_std
  PK_FN Index size() const { return dim; }

  template <class Team = Alone>
  PK_FN void prepare(V* scratch, bool whitens, Team team = {}) {
    std = scratch;
    inverse_std = scratch + padded(dim);
    team.each(dim, [&](Index j) PK_LAMBDA {
      std[j] = exp(log_std[j]);
      if (whitens) inverse_std[j] = exp(-log_std[j]);
    });
  }

  template <class Team = Alone>
  PK_FN V log_determinant(Team team = {}) const {
    return team.template sum<V>(dim, [&](Index j) PK_LAMBDA { return log_std[j]; });
  }

  // Of one dimension.
  template <class R>
  PK_FN static R stretched(R base, R std, P eps) {
    return base + std * eps;
  }

  template <int S, class R>
  PK_FN void stretch(const R* base, const P* eps, R* y) const {
    for (Index j = 0; j < dim; ++j) {
      const R from = base[j], scale = as<R>(std[j]);
      unrolled<S>([&](auto s) PK_LAMBDA {
        constexpr int at = s;
        y[at * dim + j] = stretched(from, scale, eps[at * dim + j]);
      });
    }
  }

  template <int S>
  PK_FN void whiten(const V* residual, V* z) const {
    for (Index j = 0; j < dim; ++j) {
      const V inverse = inverse_std[j];
      unrolled<S>([&](auto s) PK_LAMBDA { z[s * dim + j] = residual[s * dim + j] * inverse; });
    }
  }

  template <int S>
  PK_FN void whiten_transposed(const V* z, V* a) const {
    whiten<S>(z, a);
  }

  // Of one dimension, from μ̇/σ and the derivative of log σ.
  PK_FN static V whitened(P shift, P growth, P eps) {
    if constexpr (is_dual<V>) {
      return {eps, -(shift + eps * growth)};
    } else {
      return eps;
    }
  }

  template <int S>
  PK_FN void whiten_noise(const V* mean, const P* eps, V* z) const {
    if constexpr (is_dual<V>) {
      for (Index j = 0; j < dim; ++j) {
        const P shift = mean[j].t * inverse_std[j].v, growth = log_std[j].t;
        unrolled<S>([&](auto s) PK_LAMBDA {
          constexpr int at = s;
          z[at * dim + j] = whitened(shift, growth, eps[at * dim + j]);
        });
      }
    }
  }

  // Of one sample in one dimension; the sum for the mean is then to be divided by σ.
  PK_FN static void add_score_terms(V f, V z, V& to_mean, V& to_scale) {
    const V factor = f * z;
    to_mean = to_mean + factor;
    to_scale = to_scale + (factor * z - f);
  }

  template <int S>
  PK_FN void add_score(const V (&f)[S], const V* z, P* mean, P* scale) const {
    for (Index j = 0; j < dim; ++j) {
      V to_mean{}, to_scale{};
      unrolled<S>([&](auto s) PK_LAMBDA {
        constexpr int at = s;
        add_score_terms(f[at], z[at * dim + j], to_mean, to_scale);
      });
      if (mean) mean[j] = mean[j] + output(to_mean * inverse_std[j]);
      if (scale) scale[j] = scale[j] + output(to_scale);
    }
  }

  template <int S>
  PK_FN void add_path(const V* slope, const P* eps, P* scale) const {
    for (Index j = 0; j < dim; ++j) {
      V sum{};
      unrolled<S>([&](auto s) PK_LAMBDA { sum = sum + slope[s * dim + j] * eps[s * dim + j]; });
      scale[j] = scale[j] + output(sum * std[j]);
    }
  }

  template <class Team = Alone>
  PK_FN void add_entropy(V f, P* scale, Team team = {}) const {
    team.each(dim, [&](Index j) PK_LAMBDA { scale[j] = scale[j] + output(f); });
  }

  PK_FN V trace(Precision<V> precision, V weight, P* scale, P* precision_out) const {
    V sum{};
    for (Index j = 0; j < dim; ++j) {
      sum = sum + trace_at(j, precision, weight, scale);
      if (precision_out) {
        const V variance = square(std[j]);
        const int kind = precision.kind;
        const Index at = kind == kScalar ? 0 : kind == kDiagonal ? j : j * (j + 1) / 2 + j;
        precision_out[at] = precision_out[at] + output(weight * variance);
      }
    }
    return sum;
  }

  // The term of dimension j, without the gradient in U.
  PK_FN V trace_at(Index j, Precision<V> precision, V weight, P* scale, V* = nullptr, V* = nullptr) const {
    const V spread = square(std[j]) * precision_diagonal(precision, dim, j);
    if (scale) scale[j] = scale[j] + output(weight * spread * T(2));
    return spread;
  }

  PK_FN V reward_variance(Precision<V> precision, const V* x) const {
    V sum{};
    for (Index i = 0; i < dim; ++i) sum = sum + reward_variance_at(i, precision, x);
    return sum;
  }

  // The terms of dimension i with those before it.
  PK_FN V reward_variance_at(Index i, Precision<V> precision, const V* x, V* = nullptr, V* = nullptr) const {
    const V variance = square(std[i]);
    V sum = square(variance * precision_diagonal(precision, dim, i)) * T(2) + square(x[i]) * variance * T(4);
    for (Index j = 0; precision.kind == kFull && j < i; ++j) {
      const Shared<V> off = precision.u[i * dim + j];
      sum = sum + variance * square(std[j]) * (off * off) * T(4);
    }
    return sum;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
