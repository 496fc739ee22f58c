// The triangular scale S = L, lower triangular with a positive diagonal; what stands above it is not read.
#pragma once

#include "po_kernels/gaussian_family.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V>
struct TriangularScale {
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = true;

  int64_t dim;
  const V* tril;              // (dim, dim)
  V* inverse_diag = nullptr;  // 1 / L_jj
  V* work_ = nullptr;         // 2 dim

  PK_FN TriangularScale(int64_t dim, const V* parameter) : dim(dim), tril(parameter) {}

  PK_FN static int64_t size(int64_t dim) { return dim * dim; }
  PK_FN static int64_t work(int64_t dim) { return 3 * dim; }
  PK_FN int64_t size() const { return dim * dim; }

  PK_FN const V* row(int64_t i) const { return tril + i * dim; }

  PK_FN void prepare(V* scratch) {
    inverse_diag = scratch;
    work_ = scratch + dim;
    for (int64_t j = 0; j < dim; ++j) inverse_diag[j] = constant<V>(T(1)) / row(j)[j];
  }

  PK_FN V log_determinant() const {
    V sum{};
    for (int64_t j = 0; j < dim; ++j) sum = sum + log(row(j)[j]);
    return sum;
  }

  PK_FN void stretch(const P* eps, V* y) const {
    for (int64_t i = 0; i < dim; ++i) {
      V sum{};
      for (int64_t j = 0; j <= i; ++j) sum = sum + row(i)[j] * eps[j];
      y[i] = sum;
    }
  }

  // L z = residual.
  PK_FN void whiten(const V* residual, V* z) const {
    for (int64_t i = 0; i < dim; ++i) {
      V sum = residual[i];
      for (int64_t j = 0; j < i; ++j) sum = sum - row(i)[j] * z[j];
      z[i] = sum * inverse_diag[i];
    }
  }

  // Lᵀ a = z.
  PK_FN void whiten_transposed(const V* z, V* a) const {
    for (int64_t i = dim - 1; i >= 0; --i) {
      V sum = z[i];
      for (int64_t k = i + 1; k < dim; ++k) sum = sum - row(k)[i] * a[k];
      a[i] = sum * inverse_diag[i];
    }
  }

  // The constant sample obeys L z = ŷ - μ, so that L ż = -(μ̇ + L̇ eps).
  PK_FN void whiten_noise([[maybe_unused]] const V* mean, const P* eps, V* z) const {
    for (int64_t i = 0; i < dim; ++i) {
      z[i] = constant<V>(eps[i]);
      if constexpr (is_dual<V>) {
        P sum = -mean[i].t;
        for (int64_t j = 0; j <= i; ++j) sum = sum - row(i)[j].t * eps[j];
        for (int64_t j = 0; j < i; ++j) sum = sum - row(i)[j].v * z[j].t;
        z[i].t = sum * inverse_diag[i].v;
      }
    }
  }

  // ∂log p/∂μ = a, ∂log p/∂L_ij = a_i z_j - [i = j] / L_jj, with Lᵀ a = z.
  PK_FN void add_score(V f, const V* z, P* mean, P* scale) const {
    V* a = work_;
    whiten_transposed(z, a);
    for (int64_t i = 0; i < dim; ++i) {
      const V fa = f * a[i];
      if (mean) mean[i] = mean[i] + output(fa);
      if (scale) {
        for (int64_t j = 0; j <= i; ++j) scale[i * dim + j] = scale[i * dim + j] + output(fa * z[j]);
        scale[i * dim + i] = scale[i * dim + i] - output(f * inverse_diag[i]);
      }
    }
  }

  PK_FN void add_path(const V* slope, const P* eps, P* mean, P* scale) const {
    for (int64_t i = 0; i < dim; ++i) {
      if (mean) mean[i] = mean[i] + output(slope[i]);
      for (int64_t j = 0; scale && j <= i; ++j) scale[i * dim + j] = scale[i * dim + j] + output(slope[i] * eps[j]);
    }
  }

  PK_FN void add_entropy(V f, P* scale) const {
    for (int64_t j = 0; j < dim; ++j) scale[j * dim + j] = scale[j * dim + j] + output(f * inverse_diag[j]);
  }

  // Column by column of L: tr(U L Lᵀ) = Σ_j l_jᵀ U l_j.
  PK_FN V trace(Precision<V> precision, V weight, P* scale, P* precision_out) const {
    V* column = work_;
    V* weighted = work_ + dim;
    V sum{};
    for (int64_t j = 0; j < dim; ++j) {
      for (int64_t i = j; i < dim; ++i) column[i] = row(i)[j];
      apply(precision, dim, column, weighted, j);
      for (int64_t i = j; i < dim; ++i) {
        sum = sum + column[i] * weighted[i];
        if (scale) scale[i * dim + j] = scale[i * dim + j] + output(weight * weighted[i] * T(2));
      }
      if (precision_out) accumulate_outer(precision.kind, dim, weight, column, precision_out, j);
    }
    return sum;
  }

  // 2 ‖LᵀUL‖² + 4 ‖Lᵀx‖².
  PK_FN V reward_variance(Precision<V> precision, const V* x) const {
    V* column = work_;
    V* weighted = work_ + dim;
    V sum{};
    for (int64_t j = 0; j < dim; ++j) {
      V along{};
      for (int64_t i = 0; i < dim; ++i) {
        column[i] = i < j ? V{} : row(i)[j];
        along = along + column[i] * x[i];
      }
      apply(precision, dim, column, weighted);
      sum = sum + square(along) * T(4);
      for (int64_t k = 0; k < dim; ++k) {
        V product{};
        for (int64_t i = k; i < dim; ++i) product = product + row(i)[k] * weighted[i];
        sum = sum + square(product) * T(2);
      }
    }
    return sum;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
