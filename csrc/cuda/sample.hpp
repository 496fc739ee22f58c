// Samples of both Gaussians.
#pragma once

#include "cuda/draws.hpp"
#include "cuda/sums.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, template <class> class Scale>
struct SampleRows {
  using Call = GaussianSample;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = false;

  PK_FN static int64_t samples(const Call& call) { return call.num_samples; }

  const Work<Call>& work;
  const int dim;

  PK_FN SampleRows(const Work<Call>& work, Memory&) : work(work), dim(int(work.call.dim)) {}

  struct Warps {
    Policy<V, Scale> policy;
    P* mean_sum;
    Vectors<P> noise;
    Vectors<V> at;

    PK_FN Warps(const SampleRows& k, Memory& memory)
        : policy(memory, k.dim),
          mean_sum(memory.take<P>(k.dim)),
          noise(memory, k.dim, k.work.held),
          at(memory, k.dim, k.work.held) {}
  };

  PK_FN void load_shared(Block) const {}

  PK_FN void rows(Warp team, const Warps& held, int64_t first_row) const {
    const Call& call = work.call;
    const uint64_t seed = work.seed();
    held.policy.clear(team);
    for (int64_t row = first_row; row < call.rows; row += work.step()) {
      const Scale<V> scale = held.policy.load(team, call, row, false);
      P* to_mean = row_of<P>(call.mean.gradient, row, dim);
      P* to_scale = row_of<P>(call.scale.gradient, row, scale.size());
      team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
      if (to_scale) team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      const WideSums wide(work.launch, row, dim, scale.size());
      for (int64_t first = 0; first < call.num_samples; first += work.held) {
        const int samples = int(call.num_samples - first < work.held ? call.num_samples - first : work.held);
        draw<P>(team, seed, first, call.row_offset + uint64_t(row), samples,
                samples == work.held ? work.shape.drawing : Drawing(dim, samples),
                [&](int k, int block, const P(&noise)[kTile])
                    PK_LAMBDA { store(noise, held.noise[k] + block * kTile); });
        team.each(samples, [&](int64_t k) PK_LAMBDA {
          scale.template stretch<1>(static_cast<const V*>(held.policy.mean), held.noise[k], held.at[k]);
        });
        if (call.out) {
          team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
            const Place place(work.shape.by_dim, int(i), dim, first, call.rows, row);
            static_cast<P*>(call.out)[place.at] = output(held.at[place.k][place.j]);
          });
        }
        if (to_mean == nullptr && to_scale == nullptr) continue;
        team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
          const Place place(work.shape.by_dim, int(i), dim, first, call.rows, row);
          held.at[place.k][place.j] = value_at<V>(call.cotangent, place.at);
        });
        team.sums<P>(
            work.shape.columns,
            [&](int j, int part, int parts) PK_LAMBDA {
              P sum{};
              for (int k = part; k < samples; k += parts) sum = sum + output(held.at[k][j]);
              return sum;
            },
            [&](int j, P sum) PK_LAMBDA { held.mean_sum[j] = held.mean_sum[j] + sum; });
        if (to_scale) add_paths(team, work.shape, scale, samples, held.at, held.noise, to_scale);
        wide.add(team, first / work.held, first + work.held >= call.num_samples, held.mean_sum, to_scale, scale.size());
      }
      if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    }
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
