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

  int64_t dim;
  const V* log_std;
  V* std = nullptr;
  V* inverse_std = nullptr;

  PK_FN DiagonalScale(int64_t dim, const V* parameter) : dim(dim), log_std(parameter) {}

  PK_FN static int64_t size(int64_t dim) { return dim; }
  PK_FN static int64_t work(int64_t dim) { return 2 * dim; }
  PK_FN int64_t size() const { return dim; }

  PK_FN void prepare(V* scratch) {
    std = scratch;
    inverse_std = scratch + dim;
    for (int64_t j = 0; j < dim; ++j) {
      std[j] = exp(log_std[j]);
      inverse_std[j] = exp(-log_std[j]);
    }
  }

  PK_FN V log_determinant() const {
    V sum{};
    for (int64_t j = 0; j < dim; ++j) sum = sum + log_std[j];
    return sum;
  }

  PK_FN void stretch(const P* eps, V* y) const {
    for (int64_t j = 0; j < dim; ++j) y[j] = std[j] * eps[j];
  }

  PK_FN void whiten(const V* residual, V* z) const {
    for (int64_t j = 0; j < dim; ++j) z[j] = residual[j] * inverse_std[j];
  }

  PK_FN void whiten_noise([[maybe_unused]] const V* mean, const P* eps, V* z) const {
    for (int64_t j = 0; j < dim; ++j) {
      z[j] = constant<V>(eps[j]);
      if constexpr (is_dual<V>) z[j].t = -(mean[j].t * inverse_std[j].v + eps[j] * log_std[j].t);
    }
  }

  PK_FN void add_score(V f, const V* z, P* mean, P* scale) const {
    for (int64_t j = 0; j < dim; ++j) {
      if (mean) mean[j] = mean[j] + output(f * z[j] * inverse_std[j]);
      if (scale) scale[j] = scale[j] + output(f * (square(z[j]) - T(1)));
    }
  }

  PK_FN void add_path(const V* slope, const P* eps, P* mean, P* scale) const {
    for (int64_t j = 0; j < dim; ++j) {
      if (mean) mean[j] = mean[j] + output(slope[j]);
      if (scale) scale[j] = scale[j] + output(slope[j] * std[j] * eps[j]);
    }
  }

  PK_FN void add_entropy(V f, P* scale) const {
    for (int64_t j = 0; j < dim; ++j) scale[j] = scale[j] + output(f);
  }

  PK_FN V trace(Precision<V> precision, V weight, P* scale, P* precision_out) const {
    V sum{};
    for (int64_t j = 0; j < dim; ++j) {
      const V variance = square(std[j]);
      const V spread = variance * precision_diagonal(precision, dim, j);
      sum = sum + spread;
      if (scale) scale[j] = scale[j] + output(weight * spread * T(2));
      if (precision_out) {
        const int kind = precision.kind;
        const int64_t at = kind == kScalar ? 0 : kind == kDiagonal ? j : j * (j + 1) / 2 + j;
        precision_out[at] = precision_out[at] + output(weight * variance);
      }
    }
    return sum;
  }

  PK_FN V reward_variance(Precision<V> precision, const V* x) const {
    V sum{};
    for (int64_t i = 0; i < dim; ++i) {
      const V variance = square(std[i]);
      sum = sum + square(variance * precision_diagonal(precision, dim, i)) * T(2) + square(x[i]) * variance * T(4);
      for (int64_t j = 0; precision.kind == kFull && j < i; ++j) {
        const Shared<V> off = precision.u[i * dim + j];
        sum = sum + variance * square(std[j]) * (off * off) * T(4);
      }
    }
    return sum;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
