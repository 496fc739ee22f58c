// The policy losses of both Gaussians in closed form.
#pragma once

#include "cuda/policy_loss.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, template <class> class Scale>
struct ClosedFormRows : PolicyLossRows<V, Scale, true> {
  using Base = PolicyLossRows<V, Scale, true>;
  using Base::Base, Base::add_precision, Base::dim, Base::held_precision, Base::precision, Base::store_pull, Base::work;
  using typename Base::Call, typename Base::P, typename Base::T, typename Base::Warps;

  PK_FN void rows(Warp team, const Warps& held, int64_t first) const {
    this->each_row(team, held, first,
                   [&](const Scale<V>& scale, V log_determinant, int64_t row, V weight, P* to_scale)
                       PK_LAMBDA { return closed_form(team, held, scale, row, weight, to_scale); });
  }

  // δᵀUδ + tr(U S Sᵀ), δ = μ - y. The columns of S are weighted and summed as samples are.
  PK_FN V closed_form(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, V weight, P* to_scale) const {
    V* weights = held.group;
    team.each(dim, [&](int64_t j) PK_LAMBDA {
      held.base[j] = held.policy.mean[j] - held.target[j];
      held.pulled_sum[j] = weight * held.base[j];
      weights[j] = weight;
    });
    V loss{};
    for (int first = 0; first < dim; first += work.held) {
      const int columns = dim - first < work.held ? dim - first : work.held;
      loss = loss + team.template sum<V>(columns, [&](int64_t k) PK_LAMBDA {
        V* column = held.at[k];
        for (int64_t i = 0; i < first + k; ++i) column[i] = V{};
        return scale.trace_at(first + k, precision(), weight, to_scale, column, held.other[k]);
      });
      if (work.call.precision.gradient == nullptr) continue;
      if constexpr (Scale<V>::triangular) {
        add_precision(team, held, columns, held.at, weights, P{} + T(1));
      } else {
        team.each(columns, [&](int64_t k) PK_LAMBDA {
          const int64_t j = first + k;
          held.sums.shared()[held_precision.full ? j * (j + 1) / 2 + j : j] +=
              double(output(weight * square(scale.std[j])));
        });
      }
    }
    if (work.call.precision.gradient) {
      Vectors<V> delta = held.at;
      delta.first = held.base;
      add_precision(team, held, 1, delta, weights, P{} + T(1));
    }
    store_pull(team, held, row, row_of<P>(work.call.mean.gradient, row, dim));
    team.each(dim, [&](int64_t i) PK_LAMBDA { held.pulled_sum[i] = apply_at(precision(), dim, held.base, i); });
    loss = loss + team.template sum<V>(dim, [&](int64_t i) PK_LAMBDA { return held.base[i] * held.pulled_sum[i]; });
    if constexpr (!is_dual<V>) {
      if (work.call.stats) {
        V variance{};
        for (int first = 0; first < dim; first += work.held) {
          const int columns = dim - first < work.held ? dim - first : work.held;
          variance = variance + team.template sum<V>(columns, [&](int64_t k) PK_LAMBDA {
            return scale.reward_variance_at(first + k, precision(), held.pulled_sum, held.at[k], held.other[k]);
          });
        }
        held.sums.add(team, work.call, row, kRewardMean, -loss);
        held.sums.add(team, work.call, row, kRewardStd, square_root(variance));
        held.sums.add(team, work.call, row, kAdvantageStd, square_root(variance));
      }
    }
    return loss;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
