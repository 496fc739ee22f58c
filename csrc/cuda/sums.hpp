// Sums over the samples that a warp holds: outer products, moments, and the gradients of a policy made of them.
//
// With u the unit roundoff: a thread adds up at most the samples that are held, then threads and chunks of samples
// follow. Of a loss, whose group is in shared memory, they are at most some 200 together, and the sum errs by that many
// u Σ|x|. Where the number of samples has no bound, `WideSums` takes over in double.
#pragma once

#include "cuda/memory.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class P>
using Tile = Several<P, kTile * kTile>;

// add(k, weighted) for every `step`th k from `first` on: some at a time, unless they are weighted.
template <class V, class Add>
PK_FN void over_samples(int first, int step, int count, bool weighted, Add add) {
  constexpr int at_once = sizeof(V) == sizeof(float) ? 4 : 1;
  if (weighted) {
    PK_ROLLED
    for (int k = first; k < count; k += step) add(k, std::true_type{});
    return;
  }
  int k = first;
  PK_ROLLED
  for (; k + (at_once - 1) * step < count; k += at_once * step) {
    unrolled<at_once>([&](auto i) PK_LAMBDA { add(k + i * step, std::false_type{}); });
  }
  PK_ROLLED
  for (; k < count; k += step) add(k, std::false_type{});
}

// Adds Σ weight_k left_ki right_kj over every `step`th k from `first` on, for a tile from (i, j) on; no weights are
// ones.
template <class V, class R>
PK_FN void add_products(int i, int j, int first, int step, int count, Vectors<V> left, Vectors<R> right,
                        const V* weight, Tile<Primal<V>>& sum) {
  const V* from_left = left[first] + i;
  const R* from_right = right[first] + j;
  const int step_left = step * left.stride, step_right = step * right.stride;
  const auto add = [&](int k, auto weighted) PK_LAMBDA {
    V l[kTile];
    R r[kTile];
    load(from_left, l);
    load(from_right, r);
    if constexpr (weighted) {
      const V factor = weight[k];
      unrolled<kTile>([&](auto a) PK_LAMBDA { l[a] = factor * l[a]; });
    }
    unrolled<kTile * kTile>([&](auto a) PK_LAMBDA {
      constexpr int at = a;
      sum.v[at] = plus_output(sum.v[at], l[at / kTile], r[at % kTile]);
    });
    from_left += step_left;
    from_right += step_right;
  };
  over_samples<V>(first, step, count, weight != nullptr, add);
}

// add(i, j, Σ_k weight_k left_ki right_kj) for j <= i < dim.
template <class V, class R, class Add>
PK_FN void outer(Warp team, const Shares& tiles, int dim, int count, Vectors<V> left, Vectors<R> right, const V* weight,
                 Add add) {
  using P = Primal<V>;
  team.sums<Tile<P>>(
      tiles,
      [&](int tile, int part, int parts) PK_LAMBDA {
        int i, j;
        corner(tile, i, j);
        Tile<P> sum{};
        add_products(i * kTile, j * kTile, part, parts, count, left, right, weight, sum);
        return sum;
      },
      [&](int tile, const Tile<P>& sum) PK_LAMBDA {
        int i, j;
        corner(tile, i, j);
        unrolled<kTile * kTile>([&](auto a) PK_LAMBDA {
          constexpr int at = a;
          const int row = i * kTile + at / kTile, column = j * kTile + at % kTile;
          if (row < dim && column <= row) add(row, column, sum.v[at]);
        });
      });
}

// Sums of `outer` over many rows, where each thread has a tile of its own, or part of its samples: kept as such.
template <class P>
struct Tally {
  P* first;

  static constexpr int64_t size = kLanes * kTile * kTile;
  static constexpr int chunk = 16 / sizeof(P), chunks = kTile * kTile / chunk;

  // A thread's numbers, 16 bytes at a time.
  PK_FN P* at(int lane, int number) const { return first + (number / chunk * kLanes + lane) * chunk + number % chunk; }
  PK_FN void clear(Warp team) const {
    team.each(size, [&](int64_t i) PK_LAMBDA { first[i] = P{}; });
  }
  template <class V>
  PK_FN void add(Warp team, const Shares& tiles, int count, Vectors<V> x, const V* weight) const {
    team.each(tiles.count * tiles.parts, [&](int64_t lane) PK_LAMBDA {
      const int part = tiles.by_count.quotient(int(lane));
      int i, j;
      corner(int(lane) - part * tiles.count, i, j);
      Tile<P> sum;
      unrolled<chunks>([&](auto c) PK_LAMBDA {
        P some[chunk];
        load(at(int(lane), c * chunk), some);
        unrolled<chunk>([&](auto n) PK_LAMBDA { sum.v[c * chunk + n] = some[n]; });
      });
      add_products(i * kTile, j * kTile, part, tiles.parts, count, x, x, weight, sum);
      unrolled<chunks>([&](auto c) PK_LAMBDA {
        P some[chunk];
        unrolled<chunk>([&](auto n) PK_LAMBDA { some[n] = sum.v[c * chunk + n]; });
        store(some, at(int(lane), c * chunk));
      });
    });
  }
  // Adds factor times the lower triangle to `total`, and begins anew.
  PK_FN void flush(Warp team, const Shares& tiles, int dim, P factor, double* total) const {
    team.each(dim * (dim + 1) / 2, [&](int64_t entry) PK_LAMBDA {
      int i, j;
      corner(int(entry), i, j);
      const int down = i / kTile, tile = down * (down + 1) / 2 + j / kTile;
      double sum = 0;
      for (int part = 0; part < tiles.parts; ++part) {
        sum += double(*at(part * tiles.count + tile, i % kTile * kTile + j % kTile));
      }
      total[entry] += double(factor) * sum;
    });
    clear(team);
  }
};

// For each dimension j, store(j, Σ_k weight_k x_kj, Σ_k f_k z_kj, the output of Σ_k f_k (z_kj² - 1)): the first, or the
// other two, if wanted. No weights are ones.
template <bool sum, bool scores, class V, class Store>
PK_FN void add_moments(Warp team, const Shares& pairs, int dim, int count, Vectors<V> x, const V* weight, const V* f,
                       Vectors<V> z, Store store) {
  using P = Primal<V>;
  constexpr int of_v = is_dual<V> ? 2 : 1;  // numbers of a V
  constexpr int first_z = sum ? 2 * of_v : 0, square = first_z + 2 * of_v;
  using Sums = Several<P, scores ? square + 3 : first_z>;
  const auto add_to = [](P* to, V value) PK_LAMBDA {
    if constexpr (is_dual<V>) {
      to[0] = to[0] + value.v;
      to[1] = to[1] + value.t;
    } else {
      to[0] = to[0] + value;
    }
  };
  const auto value_of = [](const P* from) PK_LAMBDA {
    if constexpr (is_dual<V>) {
      return V{from[0], from[1]};
    } else {
      return from[0];
    }
  };
  team.sums<Sums>(
      pairs,
      [&](int pair, int part, int parts) PK_LAMBDA {
        Sums sums{};
        const V* from_x = x[part] + 2 * pair;
        const V* from_z = z[part] + 2 * pair;
        const auto add = [&](int k, auto weighted) PK_LAMBDA {
          V at[2];
          if constexpr (sum) {
            load(from_x, at);
            from_x += parts * x.stride;
            if constexpr (weighted) {
              const V factor = weight[k];
              at[0] = factor * at[0];
              at[1] = factor * at[1];
            }
            add_to(sums.v, at[0]);
            add_to(sums.v + of_v, at[1]);
          }
          if constexpr (scores) {
            load(from_z, at);
            from_z += parts * z.stride;
            const V factor = f[k];
            unrolled<2>([&](auto i) PK_LAMBDA {
              constexpr int one = i;
              const V product = factor * at[one];
              add_to(sums.v + first_z + one * of_v, product);
              sums.v[square + one] = plus_output(sums.v[square + one], product, at[one]);
            });
            sums.v[square + 2] = sums.v[square + 2] + output(factor);
          }
        };
        over_samples<V>(part, parts, count, sum && weight != nullptr, add);
        return sums;
      },
      [&](int pair, const Sums& sums) PK_LAMBDA {
        unrolled<2>([&](auto i) PK_LAMBDA {
          constexpr int one = i;
          if (2 * pair + one >= dim) return;
          V of_x{}, of_z{};
          P of_square{};
          if constexpr (sum) of_x = value_of(sums.v + one * of_v);
          if constexpr (scores) {
            of_z = value_of(sums.v + first_z + one * of_v);
            of_square = sums.v[square + one] - sums.v[square + 2];
          }
          store(2 * pair + one, of_x, of_z, of_square);
        });
      });
}

// Adds such moments to the gradients of a diagonal policy, each if wanted.
template <class V, template <class> class Scale>
PK_FN void add_score(const Scale<V>& scale, int j, V of_z, Primal<V> of_square, Primal<V>* mean, Primal<V>* to_scale) {
  if constexpr (!Scale<V>::triangular) {
    if (mean) mean[j] = mean[j] + output(scale.divisor(j).of(of_z));
    if (to_scale) to_scale[j] = to_scale[j] + of_square;
  }
}

// Adds Σ_k f_k ∂log p/∂(μ, S) from whitened samples z, each sum if wanted; `pulled` is scratch, not z.
template <class V, template <class> class Scale>
PK_FN void add_scores(Warp team, const Shape& shape, const Scale<V>& scale, int count, const V* f, Vectors<V> z,
                      Vectors<V> pulled, Primal<V>* mean, Primal<V>* to_scale) {
  using P = Primal<V>;
  const int dim = int(scale.dim);
  if constexpr (Scale<V>::triangular) {
    team.each(count, [&](int64_t k) PK_LAMBDA {
      scale.template whiten_transposed<1>(z[k], pulled[k]);
      for (int i = 0; i < dim; ++i) pulled[k][i] = f[k] * pulled[k][i];
    });
    using Pair = Several<V, 2>;
    team.sums<Pair>(
        shape.columns,
        [&](int i, int part, int parts) PK_LAMBDA {
          Pair sum{};
          for (int k = part; k < count; k += parts) sum = sum + Pair{pulled[k][i], f[k]};
          return sum;
        },
        [&](int i, const Pair& sum) PK_LAMBDA {
          if (mean) mean[i] = mean[i] + output(sum.v[0]);
          if (to_scale) {
            P& diagonal = to_scale[i * dim + i];
            diagonal = diagonal - output(scale.divisor(i).of(sum.v[1]));
          }
        });
    if (to_scale) {
      outer(team, shape.tiles, dim, count, pulled, z, static_cast<const V*>(nullptr),
            [&](int i, int j, P sum) PK_LAMBDA { to_scale[i * dim + j] = to_scale[i * dim + j] + sum; });
    }
  } else {
    add_moments<false, true>(team, shape.pairs, dim, count, z, static_cast<const V*>(nullptr), f, z,
                             [&](int j, V, V of_z, P of_square)
                                 PK_LAMBDA { add_score(scale, j, of_z, of_square, mean, to_scale); });
  }
}

// Of a row with any number of samples: what its gradients in the mean and the scale have after kRun chunks, in double.
struct WideSums {
  double* total;  // those of the mean, then those of the scale; null if a run has all chunks
  int dim;

  PK_FN WideSums(const CudaLaunch& launch, int64_t row, int dim, int64_t size)
      : total(launch.partials == nullptr ? nullptr : launch.partials + row * (dim + size)), dim(dim) {}

  // After chunk `number` of a row: takes what is summed, and gives all of it back after the last.
  template <class P>
  PK_FN void add(Warp team, int64_t number, bool last, P* mean, P* scale, int64_t size) const {
    if (total == nullptr || (number % kRun != kRun - 1 && !last)) return;
    const auto each = [&](int64_t count, P* sums, double* wide) PK_LAMBDA {
      team.each(count, [&](int64_t i) PK_LAMBDA {
        const double sum = (number < kRun ? 0.0 : wide[i]) + double(sums[i]);
        wide[i] = sum;
        sums[i] = last ? P(sum) : P{};
      });
    };
    each(dim, mean, total);
    if (scale) each(size, scale, total + dim);
  }
};

// Adds the gradient of Σ_k slope_kᵀ S noise_k.
template <class V, template <class> class Scale>
PK_FN void add_paths(Warp team, const Shape& shape, const Scale<V>& scale, int count, Vectors<V> slope,
                     Vectors<Primal<V>> noise, Primal<V>* to_scale) {
  using P = Primal<V>;
  const int dim = int(scale.dim);
  if constexpr (Scale<V>::triangular) {
    outer(team, shape.tiles, dim, count, slope, noise, static_cast<const V*>(nullptr),
          [&](int i, int j, P sum) PK_LAMBDA { to_scale[i * dim + j] = to_scale[i * dim + j] + sum; });
  } else {
    team.sums<V>(
        shape.columns,
        [&](int j, int part, int parts) PK_LAMBDA {
          V sum{};
          for (int k = part; k < count; k += parts) sum = sum + slope[k][j] * noise[k][j];
          return sum;
        },
        [&](int j, V sum) PK_LAMBDA { to_scale[j] = to_scale[j] + output(sum * scale.std[j]); });
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
