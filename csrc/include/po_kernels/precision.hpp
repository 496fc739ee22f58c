// The precision U of a Mahalanobis reward r = -(ŷ - y)ᵀ U (ŷ - y), shared by all rows.
#pragma once

#include "po_kernels/math.hpp"

namespace po_kernels {

enum PrecisionKind : int { kScalar = 0, kDiagonal = 1, kFull = 2 };

inline namespace PK_LEVEL {

// One number, dim of them, or a symmetric dim x dim.
template <class V>
struct Precision {
  int kind;
  const Shared<V>* u;
};

PK_FN int64_t precision_size(int kind, int64_t dim) {
  return kind == kScalar ? 1 : kind == kDiagonal ? dim : dim * dim;
}

// Numbers to accumulate for its gradient: of a symmetric matrix the lower triangle.
PK_FN int64_t precision_terms(int kind, int64_t dim) {
  return kind == kScalar ? 1 : kind == kDiagonal ? dim : dim * (dim + 1) / 2;
}

// U_jj.
template <class V>
PK_FN Shared<V> precision_diagonal(Precision<V> p, int64_t dim, int64_t j) {
  return p.kind == kScalar ? p.u[0] : p.kind == kDiagonal ? p.u[j] : p.u[j * dim + j];
}

// y = U x for an x that is zero before `first`, where y is not wanted either.
template <class V>
PK_FN void apply(Precision<V> p, int64_t dim, const V* x, V* y, int64_t first = 0) {
  if (p.kind != kFull) {
    for (int64_t i = first; i < dim; ++i) y[i] = x[i] * (p.kind == kScalar ? p.u[0] : p.u[i]);
    return;
  }
  for (int64_t i = first; i < dim; ++i) {
    const Shared<V>* row = p.u + i * dim;
    V sum = x[first] * row[first];
    for (int64_t j = first + 1; j < dim; ++j) sum = sum + x[j] * row[j];
    y[i] = sum;
  }
}

// xᵀ U x.
template <class V>
PK_FN V quadratic(Precision<V> p, int64_t dim, const V* x) {
  V total{};
  if (p.kind != kFull) {
    for (int64_t i = 0; i < dim; ++i) total = total + square(x[i]) * (p.kind == kScalar ? p.u[0] : p.u[i]);
    return total;
  }
  for (int64_t i = 0; i < dim; ++i) {
    const Shared<V>* row = p.u + i * dim;
    V below{};
    for (int64_t j = 0; j < i; ++j) below = below + x[j] * row[j];
    total = total + x[i] * (below * Element<V>(2) + x[i] * row[i]);
  }
  return total;
}

// acc += weight x xᵀ, as the gradient in U, for an x that is zero before `first`.
template <class V>
PK_FN void accumulate_outer(int kind, int64_t dim, V weight, const V* x, Primal<V>* acc, int64_t first = 0) {
  if (kind == kScalar) {
    V sum{};
    for (int64_t j = first; j < dim; ++j) sum = sum + square(x[j]);
    acc[0] = acc[0] + output(weight * sum);
  } else if (kind == kDiagonal) {
    for (int64_t j = first; j < dim; ++j) acc[j] = acc[j] + output(weight * square(x[j]));
  } else {
    for (int64_t i = first; i < dim; ++i) {
      const V wx = weight * x[i];
      Primal<V>* row = acc + i * (i + 1) / 2;
      for (int64_t j = first; j <= i; ++j) row[j] = row[j] + output(wx * x[j]);
    }
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
