// What the policy losses of both Gaussians share, in closed form (closed_form.hpp) or from samples (sampled_loss.hpp).
#pragma once

#include "cuda/loss_sums.hpp"
#include "cuda/quadratic_form.hpp"
#include "cuda/sums.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, template <class> class Scale, bool closed>
struct PolicyLossRows {
  using Call = GaussianPolicyLoss;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = true;

  // What a row has so many of: samples, or the columns of S in the closed form.
  PK_FN static int64_t samples(const Call& call) { return closed ? call.dim : call.num_samples; }
  PK_FN static int64_t summed(const Call& call) {
    return call.precision.gradient ? summed_terms(call.precision_ndim, call.dim) : 0;
  }
  PK_FN static int64_t stored(const Call& call) { return stored_terms(call.precision_ndim, summed(call)); }

  const Work<Call>& work;
  const int dim, count;
  const bool pathwise;
  const bool uniform;  // all samples of all rows weigh the same
  const SharedPrecision<V> held_precision;

  PK_FN PolicyLossRows(const Work<Call>& work, Memory& memory)
      : work(work),
        dim(int(work.call.dim)),
        count(int(samples(work.call))),
        pathwise(work.call.estimator == kReparam),
        uniform(!is_dual<V> && !work.call.rbf_gamma.given &&
                (work.call.cotangent.value == nullptr || work.call.reduction != kNoReduction)),
        held_precision(memory, work.call.precision_ndim, dim, !closed) {}

  struct Warps {
    Sums sums;
    Policy<V, Scale> policy;
    V *target, *base, *pulled_sum, *group;
    P *mean_sum, *scale_sum;
    Tally<P> tally;  // of the gradient in a full U, where each tile has a thread
    Vectors<P> noise;
    Vectors<V> at, other;

    PK_FN Warps(const PolicyLossRows& k, Memory& memory)
        : sums(memory, summed(k.work.call)),
          policy(memory, k.dim),
          target(memory.take<V>(k.dim)),
          base(memory.take<V>(whole_tiles(k.dim))),
          pulled_sum(memory.take<V>(whole_tiles(k.dim))),
          group(memory.take<V>(4 * k.count)),
          mean_sum(memory.take<P>(k.dim)),
          scale_sum(memory.take<P>(triangular ? 0 : k.dim)),
          tally{!closed && k.work.call.precision.gradient && k.held_precision.full && tiles_of(k.dim) <= kLanes
                    ? memory.take<P>(Tally<P>::size)
                    : nullptr},
          noise(memory, k.dim, closed || (is_dual<V> && !triangular && !k.pathwise) ? 0 : k.work.held),
          at(memory, k.dim, k.work.held),
          other(memory, k.dim, closed || k.pathwise || is_dual<V> ? k.work.held : 0) {}
  };

  PK_FN void load_shared(Block team) const { held_precision.load(team, work.call.precision, work.call.precision_ndim); }

  // loss_of(scale, log_determinant, row, weight, to_scale) is that of a row less its entropy's part; it stores the
  // gradients, that in the scale only in to_scale.
  template <class Loss>
  PK_FN void each_row(Warp team, const Warps& held, int64_t first, Loss loss_of) const {
    held.sums.clear(team);
    held.policy.clear(team);
    team.each(whole_tiles(dim), [&](int64_t j) PK_LAMBDA { held.base[j] = held.pulled_sum[j] = V{}; });
    if (held.tally.first) held.tally.clear(team);
    int tallied = 0;
    for (int64_t row = first; row < work.call.rows; row += work.step()) {
      const Scale<V> scale =
          held.policy.load(team, work.call, row, !closed || work.call.stats != nullptr, &work.call.target, held.target);
      // A gradient of dim numbers is added up in memory of the warp. Never one or the other: nvcc has to know which.
      P* scale_sum = triangular ? row_of<P>(work.call.scale.gradient, row, scale.size()) : held.scale_sum;
      if (work.call.scale.gradient == nullptr) scale_sum = nullptr;
      const V weight = weight_of<V>(work.call, row);
      if (scale_sum) {
        team.each(scale.size(), [&](int64_t i) PK_LAMBDA { scale_sum[i] = P{}; });
        scale.add_entropy(weight * T(-work.call.entropy_coef), scale_sum, team);
      }
      const V log_determinant = scale.log_determinant(team);
      const V entropy = gaussian_entropy(dim, log_determinant);
      if constexpr (!is_dual<V>) {
        if (work.call.stats) {
          held.sums.add(team, work.call, row, kEntropy, entropy);
          held.sums.add(team, work.call, row, kLogProb, log_prob(team, held, scale, log_determinant));
        }
      }
      const V loss = loss_of(scale, log_determinant, row, weight, scale_sum) - entropy * T(work.call.entropy_coef);
      if (!triangular && work.call.scale.gradient) {
        P* to_scale = row_of<P>(work.call.scale.gradient, row, dim);
        team.each(dim, [&](int64_t j) PK_LAMBDA { to_scale[j] = held.scale_sum[j]; });
      }
      held.sums.add(team, work.call, row, kLoss, output(loss));
      tallied += count;
      if (held.tally.first && (tallied >= kTallied || row + work.step() >= work.call.rows)) {
        const P factor = uniform ? output(weight_of<V>(work.call, 0)) * ratio<T>(1, count) : P{} + T(1);
        held.tally.flush(team, work.shape.tiles, dim, factor, held.sums.shared());
        tallied = 0;
      }
    }
  }

  // Of the target.
  PK_FN V log_prob(Warp team, const Warps& held, const Scale<V>& scale, V log_determinant) const {
    team.each(1, [&](int64_t) PK_LAMBDA {
      for (int j = 0; j < dim; ++j) held.base[j] = held.target[j] - held.policy.mean[j];
      scale.template whiten<1>(held.base, held.pulled_sum);
      held.pulled_sum[0] = gaussian_log_density(dim, held.pulled_sum, log_determinant);
    });
    return held.pulled_sum[0];
  }

  // Samples after which sums in the precision of V go on in double.
  static constexpr int kTallied = 512;

  PK_FN Precision<V> precision() const { return {work.call.precision_ndim, held_precision.u}; }

  // Adds Σ_k weight_k x_k x_kᵀ as the gradient in U, where no weights are `each`.
  PK_FN void add_precision(Warp team, const Warps& held, int samples, Vectors<V> x, const V* weight, P each) const {
    double* total = held.sums.shared();
    if (held.tally.first) {  // which `each` weighs later
      held.tally.add(team, work.shape.tiles, samples, x, weight);
    } else if (held_precision.full) {
      outer(team, work.shape.tiles, dim, samples, x, x, weight,
            [&](int i, int j, P sum) PK_LAMBDA { total[i * (i + 1) / 2 + j] += double(sum * each); });
    } else {
      team.sums<P>(
          work.shape.columns,
          [&](int j, int part, int parts) PK_LAMBDA {
            P sum{};
            for (int k = part; k < samples; k += parts) {
              const V value = x[k][j];
              sum = sum + output(weight ? weight[k] * value * value : value * value);
            }
            return sum;
          },
          [&](int j, P sum) PK_LAMBDA { total[j] += double(sum * each); });
    }
  }

  // The gradients in the mean and the target from U times what is in pulled_sum.
  PK_FN void store_pull(Warp team, const Warps& held, int64_t row, P* to_mean) const {
    P* to_target = row_of<P>(work.call.target.gradient, row, dim);
    team.each(dim, [&](int64_t at) PK_LAMBDA {
      const int i = int(at);
      V sum{};
      if (held_precision.full) {
        const Shared<V>* entries = held_precision.u + i * dim;  // beyond the row, times zero
        PK_ROLLED
        for (int j = 0; j < dim; j += kTile) {
          V pulled[kTile];
          load(held.pulled_sum + j, pulled);
          unrolled<kTile>([&](auto c) PK_LAMBDA { sum = sum + pulled[c] * entries[j + c]; });
        }
      } else {
        sum = apply_at(precision(), dim, held.pulled_sum, i);
      }
      const V pull = sum * T(2);
      if (to_mean) to_mean[i] = output(pull);
      if (to_target) to_target[i] = output(-pull);
    });
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
