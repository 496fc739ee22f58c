// One row of a diagonal Gaussian policy under a Mahalanobis reward.
#pragma once

#include "po_kernels/group.hpp"

namespace po_kernels {

enum PrecisionKind : int { kScalar = 0, kDiagonal = 1, kFull = 2 };

inline namespace PK_LEVEL {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// U, shared by all rows: one number, D of them, or a symmetric D x D.
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

template <class V>
PK_FN Shared<V> precision_diagonal(Precision<V> p, int64_t dim, int64_t j) {
  return p.kind == kScalar ? p.u[0] : p.kind == kDiagonal ? p.u[j] : p.u[j * dim + j];
}

// y = U x.
template <class V>
PK_FN void apply(Precision<V> p, int64_t dim, const V* x, V* y) {
  if (p.kind != kFull) {
    for (int64_t i = 0; i < dim; ++i) y[i] = x[i] * (p.kind == kScalar ? p.u[0] : p.u[i]);
    return;
  }
  for (int64_t i = 0; i < dim; ++i) {
    const Shared<V>* row = p.u + i * dim;
    V sum = x[0] * row[0];
    for (int64_t j = 1; j < dim; ++j) sum = sum + x[j] * row[j];
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

// acc += weight x xᵀ, as the gradient in U.
template <class V>
PK_FN void accumulate_outer(int kind, int64_t dim, V weight, const V* x, Primal<V>* acc) {
  if (kind == kScalar) {
    V sum{};
    for (int64_t j = 0; j < dim; ++j) sum = sum + square(x[j]);
    acc[0] = acc[0] + output(weight * sum);
  } else if (kind == kDiagonal) {
    for (int64_t j = 0; j < dim; ++j) acc[j] = acc[j] + output(weight * square(x[j]));
  } else {
    for (int64_t i = 0; i < dim; ++i) {
      const V wx = weight * x[i];
      Primal<V>* row = acc + i * (i + 1) / 2;
      for (int64_t j = 0; j <= i; ++j) row[j] = row[j] + output(wx * x[j]);
    }
  }
}

// Where the gradients of a row go, each null if not wanted; `precision` adds up over rows.
// On duals they are the derivatives of weight times the gradients.
template <class V>
struct GaussianGradients {
  V weight;
  Primal<V>* mean;
  Primal<V>* log_std;
  Primal<V>* target;
  Primal<V>* precision;
};

template <class V>
struct GaussianRow {
  int64_t dim;
  const V* mean;
  const V* log_std;
  const V* target;
  Precision<V> precision;
};

// L = δᵀUδ + Σ_j U_jj σ_j² - λ Σ_j (log σ_j + ½ log 2πe), δ = μ - y. Scratch: 2 dim.
template <class V>
PK_FN V gaussian_closed_form(GaussianRow<V> row, double entropy_coef, GaussianGradients<V> out, V* scratch) {
  using T = Element<V>;
  const int64_t dim = row.dim;
  const T lambda = T(entropy_coef);
  V* delta = scratch;
  V* weighted = scratch + dim;
  for (int64_t j = 0; j < dim; ++j) delta[j] = row.mean[j] - row.target[j];
  apply(row.precision, dim, delta, weighted);
  if (out.precision) accumulate_outer(row.precision.kind, dim, out.weight, delta, out.precision);
  V loss{};
  for (int64_t j = 0; j < dim; ++j) {
    const V variance = exp(row.log_std[j] * T(2));
    const V spread = variance * precision_diagonal(row.precision, dim, j);
    loss = loss + delta[j] * weighted[j] + spread - (row.log_std[j] + T(kHalfLog2Pi + 0.5)) * lambda;
    const V pull = out.weight * weighted[j] * T(2);
    if (out.mean) out.mean[j] = output(pull);
    if (out.target) out.target[j] = output(-pull);
    if (out.log_std) out.log_std[j] = output(out.weight * (spread * T(2) - lambda));
    if (out.precision) {
      const int kind = row.precision.kind;
      const int64_t at = kind == kScalar ? 0 : kind == kDiagonal ? j : j * (j + 1) / 2 + j;
      out.precision[at] = out.precision[at] + output(out.weight * variance);
    }
  }
  return loss;
}

// The sampled loss from (G, dim) standard normals. Scratch: 4 G + 4 dim.
template <class V>
PK_FN V gaussian_sampled(GaussianRow<V> row, const Surrogate& s, const Primal<V>* noise, GaussianGradients<V> out,
                         V* scratch, Group<V>& group) {
  using T = Element<V>;
  using P = Primal<V>;
  const int64_t dim = row.dim, count = s.samples;
  const bool pathwise = s.estimator == kReparam;
  group = {scratch, scratch + count, scratch + 2 * count, scratch + 3 * count};
  V* std = scratch + 4 * count;
  V* inverse_std = std + dim;
  V* residual = inverse_std + dim;
  V* weighted = residual + dim;
  V entropy{};
  for (int64_t j = 0; j < dim; ++j) {
    std[j] = exp(row.log_std[j]);
    inverse_std[j] = exp(-row.log_std[j]);
    entropy = entropy + row.log_std[j] + T(kHalfLog2Pi + 0.5);
  }
  // ŷ - y. Score-function samples are constants, so that only y carries a derivative.
  const auto residuals = [&](const P* eps) {
    for (int64_t j = 0; j < dim; ++j) {
      residual[j] = pathwise ? row.mean[j] - row.target[j] + std[j] * eps[j]
                             : constant<V>(stop(row.mean[j]) + stop(std[j]) * eps[j]) - row.target[j];
    }
  };
  for (int64_t g = 0; g < count; ++g) {
    const P* eps = noise + g * dim;
    residuals(eps);
    group.reward[g] = transformed_reward(s, -quadratic(row.precision, dim, residual));
    if constexpr (is_dual<V>) {
      P tangent{};
      if (!pathwise) {
        for (int64_t j = 0; j < dim; ++j) {
          tangent = tangent + eps[j] * inverse_std[j].v * row.mean[j].t + (eps[j] * eps[j] - T(1)) * row.log_std[j].t;
        }
      }
      group.excess[g] = V{P{}, tangent};
    }
  }
  const V objective = finish(s, group);

  if (out.mean)
    for (int64_t j = 0; j < dim; ++j) out.mean[j] = P{};
  if (out.target)
    for (int64_t j = 0; j < dim; ++j) out.target[j] = P{};
  if (out.log_std) {
    for (int64_t j = 0; j < dim; ++j) out.log_std[j] = output(out.weight * T(-s.entropy_coef));
  }
  const bool policy = out.mean || out.log_std;
  const bool need_weighted = out.target || (pathwise && policy);
  const V unit = out.weight * T(1.0 / double(count));
  for (int64_t g = 0; (policy || out.target || out.precision) && g < count; ++g) {
    const P* eps = noise + g * dim;
    const V pull = unit * group.pull[g];
    if (need_weighted || out.precision) residuals(eps);
    if (out.precision) accumulate_outer(row.precision.kind, dim, pull, residual, out.precision);
    if (need_weighted) {
      apply(row.precision, dim, residual, weighted);
      for (int64_t j = 0; j < dim; ++j) {
        const V slope = pull * weighted[j] * T(2);
        if (out.target) out.target[j] = out.target[j] - output(slope);
        if (pathwise && out.mean) out.mean[j] = out.mean[j] + output(slope);
        if (pathwise && out.log_std) out.log_std[j] = out.log_std[j] + output(slope * std[j] * eps[j]);
      }
    }
    if (!pathwise && policy) {
      const V factor = -(unit * score_factor(group, g));
      for (int64_t j = 0; j < dim; ++j) {
        // (ŷ - μ)/σ is eps; its tangent is that of a constant ŷ.
        V whitened = constant<V>(eps[j]);
        if constexpr (is_dual<V>) whitened.t = -(row.mean[j].t * inverse_std[j].v + eps[j] * row.log_std[j].t);
        if (out.mean) out.mean[j] = out.mean[j] + output(factor * whitened * inverse_std[j]);
        if (out.log_std) out.log_std[j] = out.log_std[j] + output(factor * (square(whitened) - T(1)));
      }
    }
  }
  return -objective - entropy * T(s.entropy_coef);
}

// Per-row statistics, in the order of LossStats.
template <class V>
struct RowStats {
  V value[5];
};

template <class V>
PK_FN RowStats<V> gaussian_stats(GaussianRow<V> row, const Surrogate& s, const Group<V>& group, V* scratch) {
  using T = Element<V>;
  const int64_t dim = row.dim;
  RowStats<V> stats{};
  V* variance = scratch;
  V* delta = scratch + dim;
  V* weighted = scratch + 2 * dim;
  for (int64_t j = 0; j < dim; ++j) {
    const V whitened = (row.target[j] - row.mean[j]) * exp(-row.log_std[j]);
    variance[j] = exp(row.log_std[j] * T(2));
    delta[j] = row.mean[j] - row.target[j];
    stats.value[2] = stats.value[2] + row.log_std[j] + T(kHalfLog2Pi + 0.5);
    stats.value[3] = stats.value[3] - square(whitened) * T(0.5) - row.log_std[j] - T(kHalfLog2Pi);
  }
  if (s.estimator != kClosedForm) {
    stats.value[0] = group_mean_from_first(s.samples, group.reward) + group.reward[0];
    stats.value[1] = group_std(s.samples, group.reward);
    if (s.estimator == kReparam) advantages(s.advantage, s.samples, group.reward, group.advantage);
    stats.value[4] = group_std(s.samples, group.advantage);
    return stats;
  }
  // d ~ N(δ, Σ): E[dᵀUd] = δᵀUδ + tr UΣ, Var[dᵀUd] = 2 tr(UΣUΣ) + 4 δᵀUΣUδ.
  apply(row.precision, dim, delta, weighted);
  V mean{}, trace{}, linear{};
  for (int64_t i = 0; i < dim; ++i) {
    const auto u = precision_diagonal(row.precision, dim, i);
    mean = mean - delta[i] * weighted[i] - variance[i] * u;
    linear = linear + square(weighted[i]) * variance[i];
    trace = trace + square(variance[i] * u);
    if (row.precision.kind == kFull) {
      for (int64_t j = 0; j < i; ++j) {
        const auto off = row.precision.u[i * dim + j];
        trace = trace + variance[i] * variance[j] * (off * off) * T(2);
      }
    }
  }
  stats.value[0] = mean;
  stats.value[1] = stats.value[4] = square_root(trace * T(2) + linear * T(4));
  return stats;
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
