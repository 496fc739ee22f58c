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

  PK_FN DiagonalScale(Index dim, const V* parameter) : dim(dim), log_std(parameter) {}

  PK_FN static Index size(Index dim) { return dim; }
  PK_FN static Index work(Index dim) { return 3 * padded(dim); }
  PK_FN static Index team_work(Index dim) { return 3 * padded(dim); }
  PK_FN static Index padded(Index dim) { return (dim + 3) / 4 * 4; }  // of std, inverse_std and lift
  PK_FN Index size() const { return dim; }

  // Of a σ_j whose inverse would be inf: a power of two. Not a member, which would take registers on a device.
  PK_FN P* inverse_std() const { return reinterpret_cast<P*>(std + padded(dim)); }
  PK_FN P* lift() const { return inverse_std() + padded(dim); }

  template <class Team = Alone>
  PK_FN void prepare(V* scratch, bool whitens, Team team = {}) {
    std = scratch;
    const T small = sizeof(T) == 4 ? T(-80) : T(-700);
    const T power = T(18446744073709551616.0), log_power = T(44.3614195558365);  // 2^64
    team.each(dim, [&](Index j) PK_LAMBDA {
      std[j] = exp(log_std[j]);
      if (!whitens) return;
      const P value = stop(log_std[j]);
      const auto lifted = value < small;
      lift()[j] = select(lifted, broadcast<P>(power), broadcast<P>(T(1)));
      inverse_std()[j] = exp(-select(lifted, value + log_power, value));
    });
  }

  template <class Team = Alone>
  PK_FN V log_determinant(Team team = {}) const {
    return team.template sum<V>(dim, [&](Index j) PK_LAMBDA { return log_std[j]; });
  }

  // Divides by σ_j.
  struct Divisor {
    V log_std;
    P lift, inverse;

    PK_FN P of_value(P x) const { return x * lift * inverse; }
    PK_FN V of(V x) const {
      if constexpr (is_dual<V>) {
        const P value = of_value(x.v);
        return {value, of_value(x.t) - value * log_std.t};
      } else {
        return of_value(x);
      }
    }
  };
  PK_FN Divisor divisor(Index j) const { return {log_std[j], lift()[j], inverse_std()[j]}; }

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
      const Divisor divisor = this->divisor(j);
      unrolled<S>([&](auto s) PK_LAMBDA { z[s * dim + j] = divisor.of(residual[s * dim + j]); });
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
        const P shift = divisor(j).of_value(mean[j].t), growth = log_std[j].t;
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
      if (mean) mean[j] = mean[j] + output(divisor(j).of(to_mean));
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
    const int kind = precision.kind;
    for (Index j = 0; precision_out && kind != kScalar && j < dim; ++j) {
      P& to = precision_out[kind == kDiagonal ? j : j * (j + 1) / 2 + j];
      to = to + output(weight * square(std[j]));
    }
    if (precision_out && kind == kScalar) {
      precision_out[0] =
          precision_out[0] + long_sum<P>(dim, [&](Index j) PK_LAMBDA { return output(weight * square(std[j])); });
    }
    return long_sum<V>(dim, [&](Index j) PK_LAMBDA { return trace_at(j, precision, weight, scale); });
  }

  // The term of dimension j, without the gradient in U.
  PK_FN V trace_at(Index j, Precision<V> precision, V weight, P* scale, V* = nullptr, V* = nullptr) const {
    const V spread = square(std[j]) * precision_diagonal(precision, dim, j);
    if (scale) scale[j] = scale[j] + output(weight * spread * T(2));
    return spread;
  }

  PK_FN V reward_variance(Precision<V> precision, const V* x) const {
    return long_sum<V>(dim, [&](Index i) PK_LAMBDA { return reward_variance_at(i, precision, x); });
  }

  // The terms of dimension i with those before it.
  PK_FN V reward_variance_at(Index i, Precision<V> precision, const V* x, V* = nullptr, V* = nullptr) const {
    const V variance = square(std[i]);
    const V sum = square(variance * precision_diagonal(precision, dim, i)) * T(2) + square(x[i]) * variance * T(4);
    return sum + long_sum<V>(precision.kind == kFull ? i : 0, [&](Index j) PK_LAMBDA {
             const Shared<V> off = precision.u[i * dim + j];
             return variance * square(std[j]) * (off * off) * T(4);
           });
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
