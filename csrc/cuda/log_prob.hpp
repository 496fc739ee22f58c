// The log-densities of both Gaussians.
#pragma once

#include "cuda/sums.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, template <class> class Scale>
struct LogProbRows {
  using Call = GaussianLogProb;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = false;

  PK_FN static int64_t samples(const Call& call) { return call.count; }

  const Work<Call>& work;
  const int dim;

  PK_FN LogProbRows(const Work<Call>& work, Memory&) : work(work), dim(int(work.call.dim)) {}

  struct Warps {
    Policy<V, Scale> policy;
    V* factor;
    P* mean_sum;
    Vectors<V> at, white;

    PK_FN Warps(const LogProbRows& k, Memory& memory)
        : policy(memory, k.dim),
          factor(memory.take<V>(k.work.held)),
          mean_sum(memory.take<P>(k.dim)),
          at(memory, k.dim, k.work.held),
          white(memory, k.dim, k.work.held) {}
  };

  PK_FN void load_shared(Block) const {}

  PK_FN void rows(Warp team, const Warps& held, int64_t first_row) const {
    const Call& call = work.call;
    held.policy.clear(team);
    for (int64_t row = first_row; row < call.rows; row += work.step()) {
      const Scale<V> scale = held.policy.load(team, call, row, true);
      const V log_determinant = scale.log_determinant(team);
      P* to_mean = row_of<P>(call.mean.gradient, row, dim);
      P* to_scale = row_of<P>(call.scale.gradient, row, scale.size());
      team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
      if (to_scale) team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      const WideSums wide(work.launch, row, dim, scale.size());
      for (int64_t first = 0; first < call.count; first += work.held) {
        const int samples = int(call.count - first < work.held ? call.count - first : work.held);
        team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
          const Place place(work.shape.by_dim, int(i), dim, first, call.rows, row);
          held.at[place.k][place.j] = value_at<V>(call.value, place.at) - held.policy.mean[place.j];
        });
        team.each(samples, [&](int64_t k) PK_LAMBDA {
          const int64_t at = (first + k) * call.rows + row;
          scale.template whiten<1>(held.at[k], held.white[k]);
          held.factor[k] = call.cotangent.value ? value_at<V>(call.cotangent, at) : V{};
          if (call.out)
            static_cast<P*>(call.out)[at] = output(gaussian_log_density(dim, held.white[k], log_determinant));
        });
        if (to_mean || to_scale) {
          add_scores(team, work.shape, scale, samples, static_cast<const V*>(held.factor), held.white, held.at,
                     held.mean_sum, to_scale);
          wide.add(team, first / work.held, first + work.held >= call.count, held.mean_sum, to_scale, scale.size());
        }
        if (call.value.gradient == nullptr) continue;
        // ∂/∂value is minus ∂/∂μ of the sample.
        team.each(samples, [&](int64_t k) PK_LAMBDA {
          scale.template whiten_transposed<1>(held.white[k], held.at[k]);
          for (int64_t j = 0; j < dim; ++j) held.at[k][j] = -(held.factor[k] * held.at[k][j]);
        });
        team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
          const Place place(work.shape.by_dim, int(i), dim, first, call.rows, row);
          static_cast<P*>(call.value.gradient)[place.at] = output(held.at[place.k][place.j]);
        });
      }
      if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    }
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
