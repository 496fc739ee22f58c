// The policy losses of both Gaussians from samples that they draw.
#pragma once

#include "cuda/draws.hpp"
#include "cuda/policy_loss.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, template <class> class Scale>
struct SampledRows : PolicyLossRows<V, Scale, false> {
  using Base = PolicyLossRows<V, Scale, false>;
  using Base::Base, Base::add_precision, Base::count, Base::dim, Base::held_precision, Base::pathwise, Base::precision,
      Base::store_pull, Base::triangular, Base::uniform, Base::work;
  using typename Base::Call, typename Base::P, typename Base::T, typename Base::Warps;

  static constexpr int at_once = sizeof(V) <= 8 ? 2 : 1;  // samples of a thread, as far as registers last
  static constexpr int kFew = kLanes / 2;  // samples, of which several threads share one's quadratic form

  PK_FN void rows(Warp team, const Warps& held, int64_t first) const {
    this->each_row(team, held, first,
                   [&](const Scale<V>& scale, V log_determinant, int64_t row, V weight, P* to_scale)
                       PK_LAMBDA { return sampled(team, held, scale, row, weight, to_scale, log_determinant); });
  }

  // Draws samples and their residuals ŷ - y, of which score-function samples carry a derivative by y only.
  PK_FN void draw_samples(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, int first,
                          int samples) const {
    const Call& call = work.call;
    const Vectors<V> z = held.other;
    draw<P>(team, work.seed(), first, call.row_offset + uint64_t(row), samples,
            samples == work.held ? work.shape.drawing : Drawing(dim, samples),
            [&](int k, int block, const P(&noise)[kTile]) PK_LAMBDA {
              const int j = block * kTile;
              if (held.noise.first) store(noise, held.noise[k] + j);  // else it is in z
              if constexpr (!triangular) {
                V base[kTile], std[kTile], residual[kTile];
                load(held.base + j, base);
                load(scale.std + j, std);
                unrolled<kTile>([&](auto i) PK_LAMBDA {
                  constexpr int at = i;
                  residual[at] = Scale<V>::stretched(base[at], std[at], noise[at]);
                  if constexpr (is_dual<V>) {
                    if (!pathwise) residual[at].t = base[at].t;
                  }
                });
                store(residual, held.at[k] + j);
                if constexpr (is_dual<V>) {
                  if (pathwise) return;
                  P inverse[kTile], lift[kTile];
                  V mean[kTile], parameter[kTile], white[kTile];
                  load(held.policy.mean + j, mean);
                  load(held.policy.parameter + j, parameter);
                  load(scale.inverse_std() + j, inverse);
                  load(scale.lift() + j, lift);
                  unrolled<kTile>([&](auto i) PK_LAMBDA {
                    constexpr int at = i;
                    white[at] = Scale<V>::whitened(mean[at].t * lift[at] * inverse[at], parameter[at].t, noise[at]);
                  });
                  store(white, z[k] + j);
                }
              }
            });
    if constexpr (triangular) {
      team.each(samples, [&](int64_t at) PK_LAMBDA {
        const int k = int(at);
        const P* noise = held.noise[k];
        V* residual = held.at[k];
        scale.template stretch<1>(static_cast<const V*>(held.base), noise, residual);
        for (int j = dim; j < whole_tiles(dim); ++j) residual[j] = V{};
        if constexpr (is_dual<V>) {
          if (pathwise) return;
          for (int j = 0; j < dim; ++j) residual[j].t = held.base[j].t;
          scale.template whiten_noise<1>(held.policy.mean, noise, z[k]);
        }
      });
    }
  }

  // Of the samples that are held, also the derivative of the log-density.
  PK_FN void set_rewards(Warp team, const Warps& held, const Surrogate& s, const Group<V>& group, int first,
                         int samples, Vectors<V> z, V log_determinant) const {
    const auto set = [&](int k, V square) PK_LAMBDA {
      group.reward[first + k] = transformed_reward(s, -square);
      if constexpr (is_dual<V>) group.excess[first + k] = pathwise ? V{} : gaussian_excess(dim, z[k], log_determinant);
    };
    if (held_precision.tiled && samples <= kFew) {
      const int stride = whole_tiles(dim);
      team.sums<V>(
          samples == work.held ? work.shape.samples : Shares(samples),
          [&](int k, int part, int parts) PK_LAMBDA {
            const V* const x[1] = {held.at[k]};
            V square[1] = {};
            PK_ROLLED
            for (int i = part * kTile; i < stride; i += parts * kTile) {
              add_quadratic_of_rows<1>(held_precision.tiled, stride, i, x, square);
            }
            return square[0];
          },
          set);
      return;
    }
    team.many<at_once>(samples, [&](int k, auto number) PK_LAMBDA {
      constexpr int S = number;
      const V* x[S];
      V squares[S];
      unrolled<S>([&](auto i) PK_LAMBDA {
        const int of = k + i * kLanes;
        x[i] = held.at[of < samples ? of : k];
      });
      held_precision.template squared<S>(precision(), x, squares);
      unrolled<S>([&](auto i) PK_LAMBDA {
        const int of = k + i * kLanes;
        if (of < samples) set(of, squares[i]);
      });
    });
  }

  PK_FN V sampled(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, V weight, P* to_scale,
                  V log_determinant) const {
    const Call& call = work.call;
    const Surrogate s = call;
    const Group<V> group = group_in(held.group, count);
    const bool need_sum = call.target.gradient || (pathwise && call.mean.gradient);
    const bool need_score = !pathwise && (call.mean.gradient || to_scale);
    const V unit = weight * ratio<T>(1, count);
    team.each(dim, [&](int64_t j) PK_LAMBDA {
      const V mean = held.policy.mean[j];
      held.base[j] = (pathwise ? mean : constant<V>(stop(mean))) - held.target[j];
      held.pulled_sum[j] = V{};
      held.mean_sum[j] = P{};
    });
    // Whitened samples: the noise itself where nothing has a derivative.
    Vectors<V> z = held.other;
    if constexpr (!is_dual<V>) z = held.noise;

    V objective{};
    for (int pass = 0; pass < 2; ++pass) {
      for (int first = 0; first < count; first += work.held) {
        const int samples = count - first < work.held ? count - first : work.held;
        if (pass == 0 || work.held < count) draw_samples(team, held, scale, row, first, samples);
        if (pass == 0) {
          set_rewards(team, held, s, group, first, samples, z, log_determinant);
          continue;
        }
        const V* pull = uniform ? nullptr : group.pull + first;
        const V* f = group.excess + first;
        const P each = uniform ? output(unit) : P{} + T(1);
        if (call.precision.gradient) add_precision(team, held, samples, held.at, pull, each);
        const auto add_pull = [&](int j, V sum) PK_LAMBDA { held.pulled_sum[j] = held.pulled_sum[j] + sum * each; };
        if (!triangular && need_sum && need_score) {
          add_moments<true, true>(team, work.shape.pairs, dim, samples, held.at, pull, f, z,
                                  [&](int j, V of_x, V of_z, P of_square) PK_LAMBDA {
                                    add_pull(j, of_x);
                                    add_score(scale, j, of_z, of_square, held.mean_sum, to_scale);
                                  });
          continue;
        }
        if (need_sum) {
          add_moments<true, false>(team, work.shape.pairs, dim, samples, held.at, pull, f, z,
                                   [&](int j, V of_x, V, P) PK_LAMBDA { add_pull(j, of_x); });
        }
        if (pathwise && to_scale) {
          team.each(samples, [&](int64_t at) PK_LAMBDA {
            const int k = int(at);
            V* slope = held.other[k];
            apply<1>(precision(), dim, static_cast<const V*>(held.at[k]), slope);
            const V factor = uniform ? unit : pull[k];
            for (int j = 0; j < dim; ++j) slope[j] = factor * slope[j] * T(2);
          });
          add_paths(team, work.shape, scale, samples, held.other, held.noise, to_scale);
        }
        if (need_score) add_scores(team, work.shape, scale, samples, f, z, held.at, held.mean_sum, to_scale);
      }
      if (pass == 1) break;
      objective = finish(s, group, team, !uniform);
      if constexpr (!is_dual<V>) {
        if (call.stats) add_group_stats(team, held.sums, call, row, group_stats(s, group, team));
      }
      team.each(count, [&](int64_t g) PK_LAMBDA {
        if (!pathwise) group.excess[g] = -(unit * score_factor(group, g));
        if (!uniform) group.pull[g] = unit * group.pull[g];
      });
      if (!need_sum && !need_score && !call.precision.gradient && to_scale == nullptr) return -objective;
    }
    P* to_mean = row_of<P>(call.mean.gradient, row, dim);
    if (need_sum) store_pull(team, held, row, pathwise ? to_mean : nullptr);
    if (!pathwise && to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    return -objective;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
