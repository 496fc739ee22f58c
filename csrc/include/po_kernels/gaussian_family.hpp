// One row of a Gaussian policy ŷ = μ + S ε. What depends on the scale S, diagonal or triangular, is in a Scale
// (gaussian.hpp, mvn.hpp); what all Gaussians share is here.
//
// A Scale<V> has, with z = S⁻¹ (ŷ - μ):
//   dim, size()                      dimension; numbers in the parameter of S
//   work()                           lane values of scratch that `prepare` and the rest use
//   prepare(scratch, whitens, team)  before all that follow; `whitens` if one of whiten, whiten_noise, add_score does
//   team_work()                      scratch that is enough for what writes nothing but its results: not for
//                                    add_score, add_path, trace and reward_variance
//   log_determinant()                log det S
//   divisor(j).of(x)                 x / S_jj, also where 1 / S_jj is beyond all numbers
//   stretch<S>(base, eps, y)         y = base + S eps
//   whiten<S>(residual, z)           z = S⁻¹ residual
//   whiten_transposed<S>(z, a)       a = S⁻ᵀ z
//   whiten_noise<S>(mean, eps, z)    on duals z of the constant sample μ + S eps: eps, with the derivative that μ and S
//                                    give it; without derivatives z is eps itself, and nothing is written
//   add_score<S>(f, z, mean, scale)  adds f ∂log p(ŷ)/∂(μ, S) for a constant ŷ
//   add_path<S>(slope, eps, scale)   adds the gradient of slopeᵀ S eps
//   add_entropy(f, scale)            adds f ∂(log det S)/∂S
//   trace(precision, weight, scale, precision_out)  tr(U S Sᵀ); adds weight times its gradients
//   reward_variance(precision, x)    2 tr(U Σ U Σ) + 4 xᵀ Σ x
//   trace_at(j, ..), reward_variance_at(j, ..)  the terms of column j of S, with scratch for it and for U times it
// Those with an S work on a block of S samples: eps, residual, y, z and slope are (S, dim), f is (S), base is (dim).
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
PK_CALL void clear(Index count, V* x) {
  for (Index i = 0; x != nullptr && i < count; ++i) x[i] = V{};
}

template <class V>
PK_CALL V gaussian_entropy(Index dim, V log_determinant) {
  return log_determinant + Element<V>((kHalfLog2Pi + 0.5) * double(dim));
}
template <class V, template <class> class Scale>
PK_CALL V gaussian_entropy(const Scale<V>& scale) {
  return gaussian_entropy(scale.dim, scale.log_determinant());
}

// log p from z, less what depends on the scale alone.
template <class V>
PK_CALL V gaussian_log_kernel(Index dim, const V* z) {
  return long_sum<V>(dim, [&](Index j) PK_LAMBDA { return square(z[j]); }) * Element<V>(-0.5);
}
template <class V>
PK_CALL V gaussian_log_density(Index dim, const V* z, V log_determinant) {
  return gaussian_log_kernel(dim, z) - log_determinant - Element<V>(kHalfLog2Pi * double(dim));
}
template <class V, template <class> class Scale>
PK_CALL V gaussian_log_density(const Scale<V>& scale, const V* z) {
  return gaussian_log_density(scale.dim, z, scale.log_determinant());
}

// L = δᵀUδ + tr(U S Sᵀ) - λ H, δ = μ - y. Scratch: 2 dim.
template <class V, template <class> class Scale>
PK_CALL V gaussian_closed_form(const Scale<V>& scale, const V* mean, const V* target, Precision<V> precision,
                               double entropy_coef, GaussianGradients<V> out, V* scratch) {
  using T = Element<V>;
  const Index dim = scale.dim;
  V* delta = scratch;
  V* weighted = scratch + dim;
  for (Index j = 0; j < dim; ++j) delta[j] = mean[j] - target[j];
  if (out.precision) {
    for (Index j = 0; j < dim; ++j) weighted[j] = out.weight * delta[j];
    accumulate_outer<1>(precision.kind, dim, weighted, delta, out.precision);
  }
  clear(scale.size(), out.scale);
  const V spread = scale.trace(precision, out.weight, out.scale, out.precision);
  if (out.scale) scale.add_entropy(out.weight * T(-entropy_coef), out.scale);
  apply<1>(precision, dim, delta, weighted);
  const V distance = long_sum<V>(dim, [&](Index j) PK_LAMBDA {
    const V pull = out.weight * weighted[j] * T(2);
    if (out.mean) out.mean[j] = output(pull);
    if (out.target) out.target[j] = output(-pull);
    return delta[j] * weighted[j];
  });
  return spread + distance - gaussian_entropy(scale) * T(entropy_coef);
}

// w - 1 of a sample: no more than the derivative of log p, and without derivatives nothing.
template <class V>
PK_CALL V gaussian_excess(Index dim, const V* z, V log_determinant) {
  if constexpr (is_dual<V>) {
    return {Primal<V>{}, gaussian_log_kernel(dim, z).t - log_determinant.t};
  } else {
    return V{};
  }
}

// The score-function part of a group, for score estimators: first w - 1 on duals, then, once the group is finished, the
// gradients in the policy. z_of(g, block) gives the whitened samples of a block.
template <class V, template <class> class Scale, class Whitened>
PK_CALL void gaussian_excess(const Scale<V>& scale, const Surrogate& s, Group<V> group, Whitened z_of) {
  if constexpr (is_dual<V>) {
    if (s.estimator == kReparam) {
      clear(s.num_samples, group.excess);
      return;
    }
    const V log_determinant = scale.log_determinant();
    in_blocks(0, s.num_samples, [&](Index g, auto block) PK_LAMBDA {
      const V* z = z_of(g, block);
      for (int k = 0; k < block; ++k) {
        group.excess[g + k] = gaussian_excess(scale.dim, z + k * scale.dim, log_determinant);
      }
    });
  }
}
template <class V, template <class> class Scale, class Whitened>
PK_CALL void gaussian_score(const Scale<V>& scale, const Surrogate& s, Group<V> group, Whitened z_of,
                            GaussianGradients<V> out, Primal<V>* scratch) {
  using P = Primal<V>;
  const V unit = out.weight * Element<V>(-1.0 / double(s.num_samples));
  const Summed<P> sums[] = {summed(out.mean, scale.dim), summed(out.scale, scale.size())};
  in_sample_runs(s.num_samples, sums, scratch, [&](Index first, Index last, P* const(&to)[2]) PK_LAMBDA {
    in_blocks(first, last, [&](Index g, auto block) PK_LAMBDA {
      constexpr int S = block;
      const V* z = z_of(g, block);
      V f[S];
      unrolled<S>([&](auto k) PK_LAMBDA { f[k] = unit * score_factor(group, g + k); });
      scale.template add_score<S>(f, z, to[0], to[1]);
    });
  });
}

// Scratch of the two losses below, besides 4 G for the group. `terms`: numbers of the gradient in the precision.
PK_CALL Index gaussian_work(Index count, Index dim, Index size, Index terms = 0) {
  return (2 + 2 * kBlock) * dim + run_work(count, 2 * dim + size + terms);
}

// The sampled loss from (G, dim) standard normals. R is V or, where the rewards of score-function samples have no
// derivative, because neither y nor U has one, the primal of V; `rewarding` is U as an R. Scratch: 4 G + gaussian_work.
template <class R, class V, template <class> class Scale>
PK_CALL V gaussian_sampled(const Scale<V>& scale, const V* mean, const V* target, Precision<V> precision,
                           Precision<R> rewarding, const Surrogate& s, const Primal<V>* noise, GaussianGradients<V> out,
                           V* scratch, Group<V>& group) {
  using T = Element<V>;
  using P = Primal<V>;
  const Index dim = scale.dim, count = s.num_samples;
  const bool pathwise = s.estimator == kReparam;
  group = group_in(scratch, count);
  V* sum = scratch + 4 * count;
  R* base = reinterpret_cast<R*>(sum + dim);
  R* residual = reinterpret_cast<R*>(sum + 2 * dim);
  V* other = sum + (2 + kBlock) * dim;
  P* runs = reinterpret_cast<P*>(sum + (2 + 2 * kBlock) * dim);
  // ŷ - y. Score-function samples are constants, so that only y carries a derivative.
  for (Index j = 0; j < dim; ++j) {
    base[j] = (pathwise ? as<R>(mean[j]) : constant<R>(stop(mean[j]))) - as<R>(target[j]);
  }
  const auto residuals = [&](Index g, auto block) PK_LAMBDA {
    constexpr int S = block;
    scale.template stretch<S>(static_cast<const R*>(base), noise + g * dim, residual);
    if constexpr (is_dual<R>) {
      for (Index j = 0; !pathwise && j < dim; ++j) {
        const Primal<V> tangent = base[j].t;
        unrolled<S>([&](auto k) PK_LAMBDA { residual[k * dim + j].t = tangent; });
      }
    }
  };
  const auto z_of = [&](Index g, auto block) PK_LAMBDA {
    if constexpr (is_dual<V>) {
      scale.template whiten_noise<block>(mean, noise + g * dim, other);
      return static_cast<const V*>(other);
    } else {
      return noise + g * dim;
    }
  };
  in_blocks(0, count, [&](Index g, auto block) PK_LAMBDA {
    constexpr int S = block;
    R squares[S];
    residuals(g, block);
    quadratic<S>(rewarding, dim, static_cast<const R*>(residual), squares);
    unrolled<S>([&](auto k) PK_LAMBDA {
      constexpr int at = k;
      const R reward = transformed_reward(s, -squares[at]);
      if constexpr (std::is_same<R, V>::value) {
        group.reward[g + at] = reward;
      } else {
        group.reward[g + at] = constant<V>(reward);
      }
    });
  });
  gaussian_excess(scale, s, group, z_of);
  const V objective = finish(s, group);

  clear(scale.size(), out.scale);
  if (out.scale) scale.add_entropy(out.weight * T(-s.entropy_coef), out.scale);
  // U times the sum of the pulled residuals is the gradient in y, and that in the mean of a pathwise sample.
  clear(dim, sum);
  const bool need_path = pathwise && out.scale;
  const bool need_sum = out.target || (pathwise && out.mean);
  const V unit = out.weight * T(1.0 / double(count));
  if (need_sum || need_path || out.precision) {
    const Summed<P> sums[] = {summed(sum, dim), summed(need_path ? out.scale : nullptr, scale.size()),
                              summed(out.precision, precision_terms(precision.kind, dim))};
    in_sample_runs(count, sums, runs, [&](Index first, Index last, P* const(&to)[3]) PK_LAMBDA {
      V* run = reinterpret_cast<V*>(to[0]);
      in_blocks(first, last, [&](Index g, auto block) PK_LAMBDA {
        constexpr int S = block;
        residuals(g, block);
        V pull[S];
        unrolled<S>([&](auto k) PK_LAMBDA { pull[k] = unit * group.pull[g + k]; });
        for (Index j = 0; j < dim; ++j) {
          V total = run[j];
          unrolled<S>([&](auto k) PK_LAMBDA {
            constexpr int at = k;
            const V pulled = pull[at] * residual[at * dim + j];
            other[at * dim + j] = pulled;
            total = total + pulled;
          });
          run[j] = total;
        }
        if (to[2]) accumulate_outer<S>(precision.kind, dim, other, residual, to[2]);
        if constexpr (std::is_same<R, V>::value) {
          if (to[1]) {
            apply<S>(precision, dim, other, residual);
            for (Index j = 0; j < S * dim; ++j) residual[j] = residual[j] * T(2);
            scale.template add_path<S>(residual, noise + g * dim, to[1]);
          }
        }
      });
    });
  }
  if (need_sum) {
    apply<1>(precision, dim, sum, other);
    for (Index j = 0; j < dim; ++j) {
      const V pull = other[j] * T(2);
      if (out.target) out.target[j] = output(-pull);
      if (pathwise && out.mean) out.mean[j] = output(pull);
    }
  }
  if (!pathwise && (out.mean || out.scale)) {
    clear(dim, out.mean);
    gaussian_score(scale, s, group, z_of, out, runs);
  }
  return -objective - gaussian_entropy(scale) * T(s.entropy_coef);
}

// The loss of given samples (G, dim), which are constants, and their rewards (G). Scratch: 4 G + gaussian_work.
template <class V, template <class> class Scale>
PK_CALL V gaussian_given(const Scale<V>& scale, const V* mean, const V* rewards, const Primal<V>* samples,
                         const Surrogate& s, GaussianGradients<V> out, V* scratch, Group<V>& group) {
  using T = Element<V>;
  const Index dim = scale.dim, count = s.num_samples;
  group = group_in(scratch, count);
  V* residual = scratch + 4 * count;
  V* z = residual + kBlock * dim;
  Primal<V>* runs = reinterpret_cast<Primal<V>*>(z + kBlock * dim);
  for (Index g = 0; g < count; ++g) group.reward[g] = transformed_reward(s, rewards[g]);
  const auto z_of = [&](Index g, auto block) PK_LAMBDA {
    constexpr int S = block;
    for (Index j = 0; j < dim; ++j) {
      unrolled<S>([&](auto k) PK_LAMBDA {
        constexpr int at = k;
        residual[at * dim + j] = constant<V>(samples[(g + at) * dim + j]) - mean[j];
      });
    }
    scale.template whiten<S>(residual, z);
    return static_cast<const V*>(z);
  };
  gaussian_excess(scale, s, group, z_of);
  const V objective = finish(s, group);
  clear(dim, out.mean);
  clear(scale.size(), out.scale);
  if (out.scale) scale.add_entropy(out.weight * T(-s.entropy_coef), out.scale);
  if (s.estimator != kReparam && (out.mean || out.scale)) gaussian_score(scale, s, group, z_of, out, runs);
  const V unit = out.weight * T(-1.0 / double(count));
  for (Index g = 0; out.rewards && g < count; ++g) out.rewards[g] = output(unit * group.pull[g]);
  return -objective - gaussian_entropy(scale) * T(s.entropy_coef);
}

// Statistics of a row whose `group` is finished, or of a closed form. Scratch: 3 dim.
template <class V, template <class> class Scale>
PK_CALL RowStats<V> gaussian_policy_stats(const Scale<V>& scale, const V* mean, const V* target, Precision<V> precision,
                                          const Surrogate& s, const Group<V>& group, V* scratch) {
  const Index dim = scale.dim;
  V* delta = scratch;
  V* other = scratch + dim;
  RowStats<V> stats{};
  if (s.estimator != kClosedForm) {
    stats = group_stats(s, group);
  } else {
    for (Index j = 0; j < dim; ++j) delta[j] = mean[j] - target[j];
    apply<1>(precision, dim, delta, other);
    const V distance = long_sum<V>(dim, [&](Index j) PK_LAMBDA { return delta[j] * other[j]; });
    stats.reward_mean = -distance - scale.trace(precision, V{}, nullptr, nullptr);
    stats.reward_std = stats.advantage_std = square_root(scale.reward_variance(precision, other));
  }
  for (Index j = 0; j < dim; ++j) delta[j] = target[j] - mean[j];
  scale.template whiten<1>(delta, other);
  stats.log_prob = gaussian_log_density(scale, other);
  stats.entropy = gaussian_entropy(scale);
  return stats;
}

// Statistics of a surrogate, whose log-probability is the mean over the samples. Scratch: 2 dim.
template <class V, template <class> class Scale>
PK_CALL RowStats<V> gaussian_given_stats(const Scale<V>& scale, const V* mean, const Primal<V>* samples,
                                         const Surrogate& s, const Group<V>& group, V* scratch) {
  const Index dim = scale.dim;
  RowStats<V> stats = group_stats(s, group);
  const V log_prob = long_sum<V>(s.num_samples, [&](Index g) PK_LAMBDA {
    for (Index j = 0; j < dim; ++j) scratch[j] = constant<V>(samples[g * dim + j]) - mean[j];
    scale.template whiten<1>(scratch, scratch + dim);
    return gaussian_log_density(scale, scratch + dim);
  });
  stats.log_prob = log_prob * Element<V>(1.0 / double(s.num_samples));
  stats.entropy = gaussian_entropy(scale);
  return stats;
}

// log p(value); adds weight times its gradients, where `value` is differentiable too. Scratch: 2 dim.
template <class V, template <class> class Scale>
PK_CALL V gaussian_log_prob(const Scale<V>& scale, const V* mean, const V* value, V weight, Primal<V>* mean_out,
                            Primal<V>* scale_out, Primal<V>* value_out, V* scratch) {
  const Index dim = scale.dim;
  V* residual = scratch;
  V* z = scratch + dim;
  for (Index j = 0; j < dim; ++j) residual[j] = value[j] - mean[j];
  scale.template whiten<1>(residual, z);
  const V factor[1] = {weight}, opposite[1] = {-weight};
  if (mean_out || scale_out) scale.template add_score<1>(factor, z, mean_out, scale_out);
  if (value_out) {  // ∂/∂value is minus ∂/∂mean
    clear(dim, value_out);
    scale.template add_score<1>(opposite, z, value_out, static_cast<Primal<V>*>(nullptr));
  }
  return gaussian_log_density(scale, z);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
