// The losses of both Gaussians from samples and rewards that are given.
#pragma once

#include "cuda/loss_sums.hpp"
#include "cuda/sums.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, template <class> class Scale>
struct SurrogateLossRows {
  using Call = GaussianSurrogateLoss;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = true;

  PK_FN static int64_t samples(const Call& call) { return call.num_samples; }
  PK_FN static int64_t summed(const Call&) { return 0; }
  PK_FN static int64_t stored(const Call&) { return 0; }

  const Work<Call>& work;
  const int dim, count;

  PK_FN SurrogateLossRows(const Work<Call>& work, Memory&)
      : work(work), dim(int(work.call.dim)), count(int(work.call.num_samples)) {}

  struct Warps {
    Sums sums;
    Policy<V, Scale> policy;
    V* group;
    P* mean_sum;
    Vectors<V> at, white;

    PK_FN Warps(const SurrogateLossRows& k, Memory& memory)
        : sums(memory, 0),
          policy(memory, k.dim),
          group(memory.take<V>(4 * k.count)),
          mean_sum(memory.take<P>(k.dim)),
          at(memory, k.dim, k.work.held),
          white(memory, k.dim, k.work.held) {}
  };

  PK_FN void load_shared(Block) const {}

  PK_FN void rows(Warp team, const Warps& held, int64_t first) const {
    held.sums.clear(team);
    held.policy.clear(team);
    for (int64_t row = first; row < work.call.rows; row += work.step()) one(team, held, row);
  }

  PK_FN void one(Warp team, const Warps& held, int64_t row) const {
    const Call& call = work.call;
    const Surrogate s = call;
    const Scale<V> scale = held.policy.load(team, call, row, true);
    const Group<V> group = group_in(held.group, count);
    const bool score = call.estimator != kReparam;
    const V weight = weight_of<V>(call, row);
    const V log_determinant = scale.log_determinant(team);
    const V entropy = gaussian_entropy(dim, log_determinant);
    P* to_mean = row_of<P>(call.mean.gradient, row, dim);
    P* to_scale = row_of<P>(call.scale.gradient, row, scale.size());
    team.each(count, [&](int64_t g) PK_LAMBDA {
      group.reward[g] = transformed_reward(s, value_at<V>(call.rewards, g * call.rows + row));
    });
    team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
    if (to_scale) {
      team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      scale.add_entropy(weight * T(-call.entropy_coef), to_scale, team);
    }
    V objective{}, log_prob{};
    for (int pass = 0; pass < 2; ++pass) {
      for (int first = 0; first < count; first += work.held) {
        const int samples = count - first < work.held ? count - first : work.held;
        if (pass == 0 || work.held < count) {
          team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
            const Place place(work.shape.by_dim, int(i), dim, first, call.rows, row);
            const V sample = constant<V>(static_cast<const T*>(call.samples)[place.at]);
            held.at[place.k][place.j] = sample - held.policy.mean[place.j];
          });
          team.each(samples, [&](int64_t k) PK_LAMBDA { scale.template whiten<1>(held.at[k], held.white[k]); });
        }
        if (pass == 0) {
          team.each(samples, [&](int64_t k) PK_LAMBDA {
            group.excess[first + k] = score ? gaussian_excess(dim, held.white[k], log_determinant) : V{};
          });
          if constexpr (!is_dual<V>) {
            if (call.stats) {
              log_prob = log_prob + team.template sum<V>(samples, [&](int64_t k) PK_LAMBDA {
                return gaussian_log_density(dim, held.white[k], log_determinant);
              });
            }
          }
        } else {
          add_scores(team, work.shape, scale, samples, static_cast<const V*>(group.excess + first), held.white, held.at,
                     held.mean_sum, to_scale);
        }
      }
      if (pass == 1) break;
      objective = finish(s, group, team);
      if constexpr (!is_dual<V>) {
        if (call.stats) {
          add_group_stats(team, held.sums, call, row, group_stats(s, group, team));
          held.sums.add(team, call, row, kLogProb, log_prob * ratio<T>(1, count));
          held.sums.add(team, call, row, kEntropy, entropy);
        }
      }
      const V unit = weight * -ratio<T>(1, count);
      team.each(count, [&](int64_t g) PK_LAMBDA {
        if (score) group.excess[g] = unit * score_factor(group, g);
        if (call.rewards.gradient)
          static_cast<P*>(call.rewards.gradient)[g * call.rows + row] = output(unit * group.pull[g]);
      });
      if (!score || (to_mean == nullptr && to_scale == nullptr)) break;
    }
    if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    const V loss = -objective - entropy * T(call.entropy_coef);
    held.sums.add(team, call, row, kLoss, output(loss));
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
