// One row of a Gaussian policy ŷ = μ + S ε. What depends on the scale S, diagonal or triangular, is in a Scale
// (gaussian.hpp, mvn.hpp); what all Gaussians share is here.
//
// A Scale<V> has, with z = S⁻¹ (ŷ - μ):
//   dim, size()                      dimension; numbers in the parameter of S
//   work()                           lane values of scratch that `prepare` and the rest use
//   prepare(scratch)
//   log_determinant()                log det S
//   stretch(eps, y)                  y = S eps
//   whiten(residual, z)              z = S⁻¹ residual
//   whiten_noise(mean, eps, z)       z of the constant sample μ + S eps: eps, with the derivative that μ and S give it
//   add_score(f, z, mean, scale)     adds f ∂log p(ŷ)/∂(μ, S) for a constant ŷ
//   add_path(slope, eps, mean, scale)  adds the gradient of slopeᵀ (μ + S eps)
//   add_entropy(f, scale)            adds f ∂(log det S)/∂S
//   trace(precision, weight, scale, precision_out)  tr(U S Sᵀ); adds weight times its gradients
//   reward_variance(precision, x)    2 tr(U Σ U Σ) + 4 xᵀ Σ x
// Gradient pointers may be null. On duals all of them take the tangent of the gradient.
#pragma once

#include "po_kernels/group.hpp"
#include "po_kernels/precision.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// Where the gradients of a row go, each null if not wanted; `precision` adds up over rows.
template <class V>
struct GaussianGradients {
  V weight;  // factor of the row's loss in what is differentiated
  Primal<V>* mean;
  Primal<V>* scale;
  Primal<V>* target;
  Primal<V>* precision;
  Primal<V>* rewards;
};

template <class V>
PK_FN void clear(int64_t count, V* x) {
  for (int64_t i = 0; x != nullptr && i < count; ++i) x[i] = V{};
}

template <class V, template <class> class Scale>
PK_FN V gaussian_entropy(const Scale<V>& scale) {
  return scale.log_determinant() + Element<V>((kHalfLog2Pi + 0.5) * double(scale.dim));
}

// log p from z.
template <class V, template <class> class Scale>
PK_FN V gaussian_log_density(const Scale<V>& scale, const V* z) {
  V sum{};
  for (int64_t j = 0; j < scale.dim; ++j) sum = sum + square(z[j]);
  return -(sum * Element<V>(0.5)) - scale.log_determinant() - Element<V>(kHalfLog2Pi * double(scale.dim));
}

// L = δᵀUδ + tr(U S Sᵀ) - λ H, δ = μ - y. Scratch: 2 dim.
template <class V, template <class> class Scale>
PK_FN V gaussian_closed_form(const Scale<V>& scale, const V* mean, const V* target, Precision<V> precision,
                             double entropy_coef, GaussianGradients<V> out, V* scratch) {
  using T = Element<V>;
  const int64_t dim = scale.dim;
  V* delta = scratch;
  V* weighted = scratch + dim;
  for (int64_t j = 0; j < dim; ++j) delta[j] = mean[j] - target[j];
  apply(precision, dim, delta, weighted);
  if (out.precision) accumulate_outer(precision.kind, dim, out.weight, delta, out.precision);
  clear(scale.size(), out.scale);
  V loss = scale.trace(precision, out.weight, out.scale, out.precision);
  if (out.scale) scale.add_entropy(out.weight * T(-entropy_coef), out.scale);
  for (int64_t j = 0; j < dim; ++j) {
    loss = loss + delta[j] * weighted[j];
    const V pull = out.weight * weighted[j] * T(2);
    if (out.mean) out.mean[j] = output(pull);
    if (out.target) out.target[j] = output(-pull);
  }
  return loss - gaussian_entropy(scale) * T(entropy_coef);
}

// The score-function part of a group, for score estimators: first w - 1 on duals, then, once the group is finished, the
// gradients in the policy. z_of(g, z) gives the whitened sample g. Scratch: dim.
template <class V, template <class> class Scale, class Whitened>
PK_FN void gaussian_excess(const Scale<V>& scale, const Surrogate& s, Group<V> group, Whitened z_of, V* z) {
  if constexpr (is_dual<V>) {
    for (int64_t g = 0; g < s.samples; ++g) {
      Primal<V> tangent{};
      if (s.estimator != kReparam) {
        z_of(g, z);
        tangent = gaussian_log_density(scale, z).t;
      }
      group.excess[g] = V{Primal<V>{}, tangent};
    }
  }
}
template <class V, template <class> class Scale, class Whitened>
PK_FN void gaussian_score(const Scale<V>& scale, const Surrogate& s, Group<V> group, Whitened z_of,
                          GaussianGradients<V> out, V* z) {
  const V unit = out.weight * Element<V>(-1.0 / double(s.samples));
  for (int64_t g = 0; g < s.samples; ++g) {
    z_of(g, z);
    scale.add_score(unit * score_factor(group, g), z, out.mean, out.scale);
  }
}

// The sampled loss from (G, dim) standard normals. Scratch: 4 G + 3 dim.
template <class V, template <class> class Scale>
PK_FN V gaussian_sampled(const Scale<V>& scale, const V* mean, const V* target, Precision<V> precision,
                         const Surrogate& s, const Primal<V>* noise, GaussianGradients<V> out, V* scratch,
                         Group<V>& group) {
  using T = Element<V>;
  const int64_t dim = scale.dim, count = s.samples;
  const bool pathwise = s.estimator == kReparam;
  group = group_in(scratch, count);
  V* residual = scratch + 4 * count;
  V* weighted = residual + dim;
  V* z = weighted + dim;
  // ŷ - y. Score-function samples are constants, so that only y carries a derivative.
  const auto residuals = [&](int64_t g) {
    scale.stretch(noise + g * dim, residual);
    for (int64_t j = 0; j < dim; ++j) {
      const V sample = mean[j] + residual[j];
      residual[j] = (pathwise ? sample : constant<V>(stop(sample))) - target[j];
    }
  };
  const auto z_of = [&](int64_t g, V* to) { scale.whiten_noise(mean, noise + g * dim, to); };
  for (int64_t g = 0; g < count; ++g) {
    residuals(g);
    group.reward[g] = transformed_reward(s, -quadratic(precision, dim, residual));
  }
  gaussian_excess(scale, s, group, z_of, z);
  const V objective = finish(s, group);

  clear(dim, out.mean);
  clear(dim, out.target);
  clear(scale.size(), out.scale);
  if (out.scale) scale.add_entropy(out.weight * T(-s.entropy_coef), out.scale);
  const bool policy = out.mean || out.scale;
  const bool need_weighted = out.target || (pathwise && policy);
  const V unit = out.weight * T(1.0 / double(count));
  for (int64_t g = 0; (need_weighted || out.precision) && g < count; ++g) {
    residuals(g);
    const V pull = unit * group.pull[g];
    if (out.precision) accumulate_outer(precision.kind, dim, pull, residual, out.precision);
    if (need_weighted) {
      apply(precision, dim, residual, weighted);
      for (int64_t j = 0; j < dim; ++j) {
        weighted[j] = pull * weighted[j] * T(2);
        if (out.target) out.target[j] = out.target[j] - output(weighted[j]);
      }
      if (pathwise) scale.add_path(weighted, noise + g * dim, out.mean, out.scale);
    }
  }
  if (!pathwise && policy) gaussian_score(scale, s, group, z_of, out, z);
  return -objective - gaussian_entropy(scale) * T(s.entropy_coef);
}

// The loss of given samples (G, dim), which are constants, and their rewards (G). Scratch: 4 G + 2 dim.
template <class V, template <class> class Scale>
PK_FN V gaussian_given(const Scale<V>& scale, const V* mean, const V* rewards, const Primal<V>* samples,
                       const Surrogate& s, GaussianGradients<V> out, V* scratch, Group<V>& group) {
  using T = Element<V>;
  const int64_t dim = scale.dim, count = s.samples;
  group = group_in(scratch, count);
  V* residual = scratch + 4 * count;
  V* z = residual + dim;
  for (int64_t g = 0; g < count; ++g) group.reward[g] = transformed_reward(s, rewards[g]);
  const auto z_of = [&](int64_t g, V* to) {
    for (int64_t j = 0; j < dim; ++j) residual[j] = constant<V>(samples[g * dim + j]) - mean[j];
    scale.whiten(residual, to);
  };
  gaussian_excess(scale, s, group, z_of, z);
  const V objective = finish(s, group);
  clear(dim, out.mean);
  clear(scale.size(), out.scale);
  if (out.scale) scale.add_entropy(out.weight * T(-s.entropy_coef), out.scale);
  if (s.estimator != kReparam && (out.mean || out.scale)) gaussian_score(scale, s, group, z_of, out, z);
  const V unit = out.weight * T(-1.0 / double(count));
  for (int64_t g = 0; out.rewards && g < count; ++g) out.rewards[g] = output(unit * group.pull[g]);
  return -objective - gaussian_entropy(scale) * T(s.entropy_coef);
}

// Statistics of a row whose `group` is finished, or of a closed form. Scratch: 3 dim.
template <class V, template <class> class Scale>
PK_FN RowStats<V> gaussian_policy_stats(const Scale<V>& scale, const V* mean, const V* target, Precision<V> precision,
                                        const Surrogate& s, const Group<V>& group, V* scratch) {
  const int64_t dim = scale.dim;
  V* delta = scratch;
  V* other = scratch + dim;
  RowStats<V> stats{};
  if (s.estimator != kClosedForm) {
    stats = group_stats(s, group);
  } else {
    for (int64_t j = 0; j < dim; ++j) delta[j] = mean[j] - target[j];
    apply(precision, dim, delta, other);
    for (int64_t j = 0; j < dim; ++j) stats.reward_mean = stats.reward_mean - delta[j] * other[j];
    stats.reward_mean = stats.reward_mean - scale.trace(precision, V{}, nullptr, nullptr);
    stats.reward_std = stats.advantage_std = square_root(scale.reward_variance(precision, other));
  }
  for (int64_t j = 0; j < dim; ++j) delta[j] = target[j] - mean[j];
  scale.whiten(delta, other);
  stats.log_prob = gaussian_log_density(scale, other);
  stats.entropy = gaussian_entropy(scale);
  return stats;
}

// Statistics of a surrogate, whose log-probability is the mean over the samples. Scratch: 2 dim.
template <class V, template <class> class Scale>
PK_FN RowStats<V> gaussian_given_stats(const Scale<V>& scale, const V* mean, const Primal<V>* samples,
                                       const Surrogate& s, const Group<V>& group, V* scratch) {
  const int64_t dim = scale.dim;
  RowStats<V> stats = group_stats(s, group);
  for (int64_t g = 0; g < s.samples; ++g) {
    for (int64_t j = 0; j < dim; ++j) scratch[j] = constant<V>(samples[g * dim + j]) - mean[j];
    scale.whiten(scratch, scratch + dim);
    stats.log_prob = stats.log_prob + gaussian_log_density(scale, scratch + dim);
  }
  stats.log_prob = stats.log_prob * Element<V>(1.0 / double(s.samples));
  stats.entropy = gaussian_entropy(scale);
  return stats;
}

// log p(value); adds weight times its gradients, where `value` is differentiable too. Scratch: 2 dim.
template <class V, template <class> class Scale>
PK_FN V gaussian_log_prob(const Scale<V>& scale, const V* mean, const V* value, V weight, Primal<V>* mean_out,
                          Primal<V>* scale_out, Primal<V>* value_out, V* scratch) {
  const int64_t dim = scale.dim;
  V* residual = scratch;
  V* z = scratch + dim;
  for (int64_t j = 0; j < dim; ++j) residual[j] = value[j] - mean[j];
  scale.whiten(residual, z);
  if (mean_out || scale_out) scale.add_score(weight, z, mean_out, scale_out);
  if (value_out) {  // ∂/∂value is minus ∂/∂mean
    clear(dim, value_out);
    scale.add_score(-weight, z, value_out, static_cast<Primal<V>*>(nullptr));
  }
  return gaussian_log_density(scale, z);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
