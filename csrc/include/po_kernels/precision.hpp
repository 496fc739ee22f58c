// The precision U of a Mahalanobis reward r = -(ŷ - y)ᵀ U (ŷ - y), shared by all rows.
#pragma once

#include "po_kernels/sums.hpp"

namespace po_kernels {

enum PrecisionKind : int { kScalar = 0, kDiagonal = 1, kFull = 2 };

inline namespace PK_LEVEL {

// One number, dim of them, or a symmetric dim x dim.
template <class V>
struct Precision {
  int kind;
  const Shared<V>* u;
};

PK_FN Index precision_size(int kind, Index dim) {
  return kind == kScalar ? 1 : kind == kDiagonal ? dim : dim * dim;
}

// Numbers to accumulate for its gradient: of a symmetric matrix the lower triangle.
PK_FN Index precision_terms(int kind, Index dim) {
  return kind == kScalar ? 1 : kind == kDiagonal ? dim : dim * (dim + 1) / 2;
}

// U_jj.
template <class V>
PK_FN Shared<V> precision_diagonal(Precision<V> p, Index dim, Index j) {
  return p.kind == kScalar ? p.u[0] : p.kind == kDiagonal ? p.u[j] : p.u[j * dim + j];
}

// Rows i..i+R of y = U x for the S vectors of x (S, dim), which are zero before `first`: sums[r][s].
template <int S, int R, class V>
PK_FN void multiply_rows(Precision<V> p, Index dim, Index first, Index end, Index i, const V* x, V (&sums)[R][S]) {
  unrolled<R>([&](auto r) PK_LAMBDA { unrolled<S>([&](auto s) PK_LAMBDA { sums[r][s] = V{}; }); });
  row_sums(first, end, sums, [&](Index begin, Index stop, V(&run)[R][S]) PK_LAMBDA {
    for (Index j = begin; j < stop; ++j) {
      Shared<V> u[R];
      unrolled<R>([&](auto r) PK_LAMBDA { u[r] = p.u[(i + r) * dim + j]; });
      unrolled<S>([&](auto s) PK_LAMBDA {
        const V from = x[s * dim + j];
        unrolled<R>([&](auto r) PK_LAMBDA {
          V& sum = run[r][s];
          sum = sum + from * u[r];
        });
      });
    }
  });
}

// y = U x for S vectors, (S, dim), that are zero before `first`, where y is not wanted either.
template <int S, class V>
PK_FN void apply(Precision<V> p, Index dim, const V* x, V* y, Index first = 0) {
  if (p.kind != kFull) {
    for (Index i = first; i < dim; ++i) {
      const Shared<V> u = p.kind == kScalar ? p.u[0] : p.u[i];
      unrolled<S>([&](auto s) PK_LAMBDA { y[s * dim + i] = x[s * dim + i] * u; });
    }
    return;
  }
  const auto rows = [&](Index i, auto count) PK_LAMBDA {
    constexpr int R = count;
    V sums[R][S];
    multiply_rows<S, R>(p, dim, first, dim, i, x, sums);
    unrolled<R>([&](auto r) PK_LAMBDA { unrolled<S>([&](auto s) PK_LAMBDA { y[s * dim + i + r] = sums[r][s]; }); });
  };
  constexpr int R = S == 1 ? 4 : 2;  // as many sums at once as keep the processor busy
  Index i = first;
  for (; i + R <= dim; i += R) rows(i, Constant<R>{});
  for (; i < dim; ++i) rows(i, Constant<1>{});
}

// (U x)_i.
template <class V>
PK_FN V apply_at(Precision<V> p, Index dim, const V* x, Index i) {
  if (p.kind != kFull) return x[i] * (p.kind == kScalar ? p.u[0] : p.u[i]);
  V sum[1][1];
  multiply_rows<1, 1>(p, dim, 0, dim, i, x, sum);
  return sum[0][0];
}

// xᵀ U x of S vectors, (S, dim).
template <int S, class V>
PK_FN void quadratic(Precision<V> p, Index dim, const V* x, V (&total)[S]) {
  using T = Element<V>;
  unrolled<S>([&](auto s) PK_LAMBDA { total[s] = V{}; });
  if (p.kind != kFull) {
    long_sums(dim, total, [&](Index first, Index last, V(&run)[S]) PK_LAMBDA {
      for (Index i = first; i < last; ++i) {
        const Shared<V> u = p.kind == kScalar ? p.u[0] : p.u[i];
        unrolled<S>([&](auto s) PK_LAMBDA { run[s] = run[s] + square(x[s * dim + i]) * u; });
      }
    });
    return;
  }
  // Twice what is below the diagonal, and the diagonal.
  Index i = 0;
#if !defined(__CUDA_ARCH__)
  V before[S];
  unrolled<S>([&](auto s) PK_LAMBDA { before[s] = V{}; });
#endif
  for (; i + 2 <= dim; i += 2) {
#if !defined(__CUDA_ARCH__)
    if (i % kRowRun == 0 && i > 0) {
      unrolled<S>([&](auto s) PK_LAMBDA {
        before[s] = before[s] + total[s];
        total[s] = V{};
      });
    }
#endif
    V below[2][S];
    multiply_rows<S, 2>(p, dim, 0, i, i, x, below);
    const Shared<V>* row = p.u + (i + 1) * dim + i;
    const Shared<V> head = p.u[i * dim + i], off = row[0], tail = row[1];
    unrolled<S>([&](auto s) PK_LAMBDA {
      constexpr int at = s;
      const V a = x[at * dim + i], b = x[at * dim + i + 1];
      total[at] = total[at] + a * (below[0][at] * T(2) + a * head);
      total[at] = total[at] + b * ((below[1][at] + a * off) * T(2) + b * tail);
    });
  }
  if (i < dim) {
    V below[1][S];
    multiply_rows<S, 1>(p, dim, 0, i, i, x, below);
    const Shared<V> tail = p.u[i * dim + i];
    unrolled<S>([&](auto s) PK_LAMBDA {
      constexpr int at = s;
      const V b = x[at * dim + i];
      total[at] = total[at] + b * (below[0][at] * T(2) + b * tail);
    });
  }
#if !defined(__CUDA_ARCH__)
  unrolled<S>([&](auto s) PK_LAMBDA { total[s] = before[s] + total[s]; });
#endif
}

// acc += Σ_s weighted_s x_sᵀ, as the gradient in U, for weighted_s a multiple of x_s, both (S, dim) and zero before
// `first`.
template <int S, class V, class R>
PK_FN void accumulate_outer(int kind, Index dim, const V* weighted, const R* x, Primal<V>* acc, Index first = 0) {
  if (kind == kFull) {
    add_outer<S>(dim, first, weighted, x, [&](Index i) PK_LAMBDA { return acc + i * (i + 1) / 2; });
    return;
  }
  const auto added = [&](Primal<V> sum, Index j) PK_LAMBDA {
    unrolled<S>([&](auto s) PK_LAMBDA { sum = sum + output(weighted[s * dim + j] * x[s * dim + j]); });
    return sum;
  };
  if (kind == kScalar) {
    Primal<V> all[1];
    long_sums(dim - first, all, [&](Index begin, Index end, Primal<V>(&run)[1]) PK_LAMBDA {
      for (Index j = first + begin; j < first + end; ++j) run[0] = added(run[0], j);
    });
    acc[0] = acc[0] + all[0];
    return;
  }
  for (Index j = first; j < dim; ++j) acc[j] = added(acc[j], j);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
