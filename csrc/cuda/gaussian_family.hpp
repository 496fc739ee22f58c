// The rows of both Gaussians, a warp a row: Scale is DiagonalScale or TriangularScale.
//
// The threads of a warp take the samples of a row, then the entries of what is summed over them. All that they share is
// in shared memory: the row's policy, its group, and as many of its samples at a time as `held` says. Where these are
// not all, the second pass over them draws or reads them again.
#pragma once

#include "calls.hpp"
#include "cuda/warp.hpp"
#include "po_kernels/gaussian_family.hpp"
#include "po_kernels/philox.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Sums of a block of rows: the loss, the five statistics, then the gradient in the precision, of one number as of a
// diagonal.
constexpr int64_t kHead = 6;

PK_FN int64_t summed_terms(int precision_kind, int64_t dim) {
  return precision_kind == kFull ? dim * (dim + 1) / 2 : dim;
}

// A call, and how its rows are shared out.
template <class C>
struct Work {
  C call;
  const int64_t* seed = nullptr;  // in memory of the device, or null for call.seed
  double* partials = nullptr;     // (blocks, kHead + terms), of a loss
  int64_t blocks = 0;
  int warps = 1;          // of a block
  int held = 0;           // samples
  size_t warp_bytes = 0;  // of shared memory, after what the block shares
};

// Takes shared memory bit by bit.
struct Memory {
  char* base;
  size_t used = 0;
  template <class U>
  PK_FN U* take(int64_t count) {
    U* at = reinterpret_cast<U*>(base + used);
    used += (sizeof(U) * size_t(count) + 15) / 16 * 16;
    return at;
  }
};

// ---- Memory of the device ----

template <class V>
PK_FN V value_at(Input input, int64_t at, int64_t tangent_at) {
  using T = Element<V>;
  const T value = static_cast<const T*>(input.value)[at];
  if constexpr (is_dual<V>) {
    return {value, input.tangent ? static_cast<const T*>(input.tangent)[tangent_at] : T(0)};
  } else {
    return value;
  }
}
template <class V>
PK_FN V value_at(Input input, int64_t at) {
  return value_at<V>(input, at, at);
}

template <class V>
PK_FN void load_row(Warp team, const RowInput& input, int64_t row, int64_t columns, V* to) {
  team.each(columns,
            [&](int64_t c) PK_LAMBDA { to[c] = value_at<V>(input, row * input.stride + c, row * columns + c); });
}

// Where number i of samples from `first` on, which a warp takes in the order of memory, stands: at dimension j of its
// sample k, and in the (samples, rows, dim) tensor.
struct Place {
  int k, j;
  int64_t at;

  PK_FN Place(int64_t i, int64_t dim, int64_t first, int64_t rows, int64_t row)
      : k(int(i) / int(dim)), j(int(i) % int(dim)), at(((first + k) * rows + row) * dim + j) {}
};

template <class T>
PK_FN T* row_of(void* output, int64_t row, int64_t columns) {
  return output == nullptr ? nullptr : static_cast<T*>(output) + row * columns;
}

// The factor of a row's loss in what is differentiated.
template <class V>
PK_FN V weight_of(const LossCall& call, int64_t row) {
  using T = Element<V>;
  const T scale = call.reduction == kMeanOverRows ? T(1.0 / double(call.rows)) : T(1);
  const int64_t at = call.reduction == kNoReduction ? row : 0;
  return (call.cotangent.value ? value_at<V>(call.cotangent, at) : constant<V>(T(1))) * scale;
}

// ---- What a warp holds ----

template <class V, template <class> class Scale>
struct Policy {
  int64_t dim;
  V *mean, *parameter, *scratch;

  PK_FN Policy(Memory& memory, int64_t dim) : dim(dim) {
    mean = memory.take<V>(dim);
    parameter = memory.take<V>(Scale<V>::size(dim));
    scratch = memory.take<V>(Scale<V>::team_work(dim));
  }

  template <class C>
  PK_FN Scale<V> load(Warp team, const C& call, int64_t row, bool whitens) const {
    load_row(team, call.mean, row, dim, mean);
    load_row(team, call.scale, row, Scale<V>::size(dim), parameter);
    Scale<V> scale(dim, parameter);
    scale.prepare(scratch, whitens, team);
    return scale;
  }
};

constexpr int kTile = 4;  // entries of a matrix to a side that a thread sums at once

// Vectors of samples, an odd number of elements apart, so that threads at different samples use different banks. A tile
// at the edge reads up to kTile - 1 numbers past a vector, and keeps none of them.
template <class U>
struct Vectors {
  int stride;
  U* first;

  PK_FN Vectors(Memory& memory, int64_t dim, int64_t count) : stride(int(dim) | 1) {
    first = count == 0 ? nullptr : memory.take<U>(int64_t(stride) * count + kTile);
  }
  PK_FN U* operator[](int64_t k) const { return first + int(k) * stride; }
};

// ---- Quadratic forms ----

// As much of a row of a matrix as is read at once.
template <class T>
struct alignas(16) Chunk {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};

PK_FN int whole_tiles(int64_t dim) {
  return (int(dim) + kTile - 1) / kTile * kTile;
}

// xᵀ U x by tiles: U is symmetric, zero from dim on, with rows of whole tiles. What x has beyond dim is not used.
template <class T>
PK_FN T quadratic_by_tiles(const T* u, int dim, const T* x) {
  const int stride = whole_tiles(dim);
  const auto load = [&](int row, int column, T(&to)[kTile]) PK_LAMBDA {
    const Chunk<T>* from = reinterpret_cast<const Chunk<T>*>(u + row * stride + column);
    unrolled<kTile>([&](auto c) PK_LAMBDA {
      constexpr int at = decltype(c)::value;
      to[at] = from[at / Chunk<T>::size].v[at % Chunk<T>::size];
    });
  };
  T total{};
  PK_ROLLED
  for (int i = 0; i < stride; i += kTile) {
    T below[kTile] = {}, here[kTile], entries[kTile];
    PK_ROLLED
    for (int j = 0; j < i; j += kTile) {
      unrolled<kTile>([&](auto r) PK_LAMBDA {
        load(i + decltype(r)::value, j, entries);
        unrolled<kTile>([&](auto c) PK_LAMBDA {
          below[decltype(r)::value] =
              below[decltype(r)::value] + entries[decltype(c)::value] * x[j + decltype(c)::value];
        });
      });
    }
    unrolled<kTile>([&](auto r) PK_LAMBDA {
      constexpr int at = decltype(r)::value;
      here[at] = i + at < dim ? x[i + at] : T(0);
      load(i + at, i, entries);
      unrolled<at>([&](auto c)
                       PK_LAMBDA { below[at] = below[at] + entries[decltype(c)::value] * here[decltype(c)::value]; });
      total = total + here[at] * (below[at] * T(2) + entries[at] * here[at]);
    });
  }
  return total;
}

// ---- Sums over samples ----

// add(i, j, Σ_k weight_k left_ki right_kj) for j <= i < dim; no weights are ones.
template <class V, class R, class Add>
PK_FN void outer(Warp team, int dim, int count, Vectors<V> left, Vectors<R> right, const V* weight, Add add) {
  using P = Primal<V>;
  using Tile = Several<P, kTile * kTile>;
  const int side = whole_tiles(dim) / kTile;
  const auto corner = [](int tile, int& i, int& j) PK_LAMBDA {
    int down = 0;  // tiles of a triangle, row by row
    while ((down + 1) * (down + 2) / 2 <= tile) ++down;
    i = down * kTile;
    j = (tile - down * (down + 1) / 2) * kTile;
  };
  team.sums<Tile>(
      side * (side + 1) / 2,
      [&](int64_t tile, int part, int parts) PK_LAMBDA {
        int i, j;
        corner(int(tile), i, j);
        Tile sum{};
        for (int k = part; k < count; k += parts) {
          V l[kTile];
          R r[kTile];
          unrolled<kTile>([&](auto a) PK_LAMBDA {
            constexpr int at = decltype(a)::value;
            l[at] = weight ? weight[k] * left[k][i + at] : left[k][i + at];
            r[at] = right[k][j + at];
          });
          unrolled<kTile * kTile>([&](auto a) PK_LAMBDA {
            constexpr int at = decltype(a)::value;
            sum.v[at] = sum.v[at] + output(l[at / kTile] * r[at % kTile]);
          });
        }
        return sum;
      },
      [&](int64_t tile, const Tile& sum) PK_LAMBDA {
        int i, j;
        corner(int(tile), i, j);
        unrolled<kTile * kTile>([&](auto a) PK_LAMBDA {
          constexpr int at = decltype(a)::value, down = at / kTile, right = at % kTile;
          if (i + down < dim && j + right <= i + down) add(i + down, j + right, sum.v[at]);
        });
      });
}

// Adds Σ_k f_k ∂log p/∂(μ, S) from whitened samples z, each sum if wanted; `pulled` is scratch, not z.
template <class V, template <class> class Scale>
PK_FN void add_scores(Warp team, const Scale<V>& scale, int count, const V* f, Vectors<V> z, Vectors<V> pulled,
                      Primal<V>* mean, Primal<V>* to_scale) {
  using P = Primal<V>;
  if constexpr (Scale<V>::triangular) {
    team.each(count, [&](int64_t k) PK_LAMBDA {
      scale.template whiten_transposed<1>(z[k], pulled[k]);
      for (int64_t i = 0; i < scale.dim; ++i) pulled[k][i] = f[k] * pulled[k][i];
    });
    using Pair = Several<V, 2>;
    team.sums<Pair>(
        scale.dim,
        [&](int64_t i, int part, int parts) PK_LAMBDA {
          Pair sum{};
          for (int k = part; k < count; k += parts) sum = sum + Pair{pulled[k][i], f[k]};
          return sum;
        },
        [&](int64_t i, const Pair& sum) PK_LAMBDA {
          if (mean) mean[i] = mean[i] + output(sum.v[0]);
          if (to_scale) {
            P& diagonal = to_scale[i * scale.dim + i];
            diagonal = diagonal - output(sum.v[1] * scale.inverse_diag[i]);
          }
        });
    if (to_scale) {
      outer(team, scale.dim, count, pulled, z, static_cast<const V*>(nullptr),
            [&](int64_t i, int64_t j, P sum)
                PK_LAMBDA { to_scale[i * scale.dim + j] = to_scale[i * scale.dim + j] + sum; });
    }
  } else {
    using Pair = Several<V, 2>;
    team.sums<Pair>(
        scale.dim,
        [&](int64_t j, int part, int parts) PK_LAMBDA {
          Pair sum{};
          for (int k = part; k < count; k += parts) {
            Scale<V>::add_score_terms(f[k], z[k][j], sum.v[0], sum.v[1]);
          }
          return sum;
        },
        [&](int64_t j, const Pair& sum) PK_LAMBDA {
          if (mean) mean[j] = mean[j] + output(sum.v[0] * scale.inverse_std[j]);
          if (to_scale) to_scale[j] = to_scale[j] + output(sum.v[1]);
        });
  }
}

// Adds the gradient of Σ_k slope_kᵀ S noise_k.
template <class V, template <class> class Scale>
PK_FN void add_paths(Warp team, const Scale<V>& scale, int count, Vectors<V> slope, Vectors<Primal<V>> noise,
                     Primal<V>* to_scale) {
  using P = Primal<V>;
  if constexpr (Scale<V>::triangular) {
    outer(team, scale.dim, count, slope, noise, static_cast<const V*>(nullptr),
          [&](int64_t i, int64_t j, P sum)
              PK_LAMBDA { to_scale[i * scale.dim + j] = to_scale[i * scale.dim + j] + sum; });
  } else {
    team.sums<V>(
        scale.dim,
        [&](int64_t j, int part, int parts) PK_LAMBDA {
          V sum{};
          for (int k = part; k < count; k += parts) sum = sum + slope[k][j] * noise[k][j];
          return sum;
        },
        [&](int64_t j, V sum) PK_LAMBDA { to_scale[j] = to_scale[j] + output(sum * scale.std[j]); });
  }
}

template <class P>
PK_FN void draw_noise(uint64_t seed, int64_t sample, uint64_t row, int64_t dim, P* to) {
  for (int64_t block = 0; 4 * block < dim; ++block) {
    P z[4];
    normals_of_block<1, 2>(seed, uint32_t(block), uint32_t(sample), uint32_t(row), uint32_t(row >> 32), z, 4);
    unrolled<4>([&](auto i) PK_LAMBDA {
      constexpr int at = decltype(i)::value;
      if (4 * block + at < dim) to[4 * block + at] = z[at];
    });
  }
}

// The log-density's derivative, as the w - 1 of a sample. Of z without derivatives there is none.
template <class V>
PK_FN V excess_of(int64_t dim, const V* z, V log_determinant) {
  if constexpr (is_dual<V>) {
    return {Primal<V>{}, gaussian_log_kernel(dim, z).t - log_determinant.t};
  } else {
    return V{};
  }
}

PK_FN Surrogate surrogate_of(const LossCall& call) {
  return {call.estimator, call.advantage, call.samples, call.entropy_coef, call.rbf_gamma, call.has_rbf};
}

// What a warp sums over its rows, in double: so many numbers, kept in shared memory.
struct Sums {
  double* total;
  int64_t terms;

  PK_FN Sums(Memory& memory, int64_t terms) : terms(kHead + terms) { total = memory.take<double>(kHead + terms); }
  PK_FN void clear(Warp team) const {
    team.each(terms, [&](int64_t i) PK_LAMBDA { total[i] = 0; });
  }
  PK_FN double* shared() const { return total + kHead; }

  // Of a row, which without a reduction are also results.
  template <class P>
  PK_FN void add(Warp team, const LossCall& call, int64_t row, P loss, const RowStats<P>& stats) const {
    const P numbers[kHead] = {loss,          stats.reward_mean, stats.reward_std,
                              stats.entropy, stats.log_prob,    stats.advantage_std};
    team.each(1, [&](int64_t) PK_LAMBDA {
      unrolled<int(kHead)>([&](auto i) PK_LAMBDA {
        constexpr int at = decltype(i)::value;
        if (at > 0 && call.stats == nullptr) return;
        total[at] += double(numbers[at]);
        if (call.reduction != kNoReduction) return;
        static_cast<P*>(at == 0 ? call.loss : call.stats)[at == 0 ? row : (at - 1) * call.rows + row] = numbers[at];
      });
    });
  }
};

// ---- Kernels: what a block and each of its warps hold, and the rows of a warp ----

template <class V, template <class> class Scale, bool closed>
struct PolicyLossRows {
  using Call = GaussianPolicyLoss;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = true;

  // What a row has so many of: samples, or the columns of S in the closed form.
  PK_FN static int64_t samples(const Call& call) { return closed ? call.dim : call.samples; }
  PK_FN static int64_t summed(const Call& call) {
    return call.grad_precision ? summed_terms(call.precision_kind, call.dim) : 0;
  }

  const Work<Call>& work;
  const int dim, count;
  const bool pathwise;
  Shared<V>* u;
  T* tiled;  // U in rows of whole tiles, where it is read by tiles; or null

  PK_FN PolicyLossRows(const Work<Call>& work, Memory& memory)
      : work(work), dim(int(work.call.dim)), count(int(samples(work.call))), pathwise(work.call.estimator == kReparam) {
    u = memory.take<Shared<V>>(precision_size(work.call.precision_kind, dim));
    tiled = nullptr;
    if constexpr (!is_dual<V> && !closed) {
      if (work.call.precision_kind != kFull) return;
      const int stride = whole_tiles(dim);
      tiled = stride == dim ? u : memory.take<T>(stride * stride);
    }
  }

  struct Warps {
    Sums sums;
    Policy<V, Scale> policy;
    V *target, *base, *pulled_sum, *group;
    P* mean_sum;
    Vectors<P> noise;
    Vectors<V> at, other;

    PK_FN Warps(const PolicyLossRows& k, Memory& memory)
        : sums(memory, summed(k.work.call)),
          policy(memory, k.dim),
          target(memory.take<V>(k.dim)),
          base(memory.take<V>(k.dim + kTile)),
          pulled_sum(memory.take<V>(k.dim)),
          group(memory.take<V>(4 * k.count)),
          mean_sum(memory.take<P>(k.dim)),
          noise(memory, k.dim, closed ? 0 : k.work.held),
          at(memory, k.dim, k.work.held),
          other(memory, k.dim, closed || k.pathwise || is_dual<V> ? k.work.held : 0) {}
  };

  // U, symmetrised.
  PK_FN void load_shared(Block team) const {
    const Call& call = work.call;
    team.each(precision_size(call.precision_kind, dim), [&](int64_t at) PK_LAMBDA {
      const Shared<V> value = value_at<Shared<V>>(call.precision, at);
      const int64_t mirrored = call.precision_kind == kFull ? at % dim * dim + at / dim : at;
      u[at] = (value + value_at<Shared<V>>(call.precision, mirrored)) * T(0.5);
    });
    if constexpr (!is_dual<V>) {
      const int stride = whole_tiles(dim);
      team.each(tiled && tiled != u ? stride * stride : 0, [&](int64_t at) PK_LAMBDA {
        const int i = int(at) / stride, j = int(at) % stride;
        tiled[at] = i < dim && j < dim ? u[i * dim + j] : T(0);
      });
    }
  }

  PK_FN void rows(Warp team, const Warps& held, int64_t first, int64_t step) const {
    held.sums.clear(team);
    for (int64_t row = first; row < work.call.rows; row += step) {
      const Scale<V> scale = held.policy.load(team, work.call, row, !closed || work.call.stats != nullptr);
      load_row(team, work.call.target, row, dim, held.target);
      P* to_scale = row_of<P>(work.call.grad_scale, row, scale.size());
      const V weight = weight_of<V>(work.call, row);
      if (to_scale) {
        team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
        scale.add_entropy(weight * T(-work.call.entropy_coef), to_scale, team);
      }
      const V log_determinant = scale.log_determinant(team);
      const V entropy = gaussian_entropy(dim, log_determinant);
      RowStats<V> stats{};
      V loss;
      if constexpr (closed) {
        loss = closed_form(team, held, scale, row, weight, to_scale, stats);
      } else {
        loss = sampled(team, held, scale, row, weight, to_scale, log_determinant, stats);
      }
      loss = loss - entropy * T(work.call.entropy_coef);
      RowStats<P> results{};
      if constexpr (!is_dual<V>) {
        if (work.call.stats) {
          stats.entropy = entropy;
          team.each(1, [&](int64_t) PK_LAMBDA {
            for (int64_t j = 0; j < dim; ++j) held.base[j] = held.target[j] - held.policy.mean[j];
            scale.template whiten<1>(held.base, held.pulled_sum);
            held.pulled_sum[0] = gaussian_log_density(dim, held.pulled_sum, log_determinant);
          });
          stats.log_prob = held.pulled_sum[0];
          results = stats;
        }
      }
      held.sums.add(team, work.call, row, output(loss), results);
    }
  }

  PK_FN Precision<V> precision() const { return {work.call.precision_kind, u}; }

  // xᵀ U x.
  PK_FN V squared(const V* x) const {
    if constexpr (!is_dual<V>) {
      if (tiled) return quadratic_by_tiles(tiled, int(dim), x);
    }
    V squares[1];
    quadratic<1>(precision(), dim, x, squares);
    return squares[0];
  }

  // Adds Σ_k weight_k x_k x_kᵀ as the gradient in U.
  PK_FN void add_precision(Warp team, const Warps& held, int samples, Vectors<V> x, const V* weight) const {
    double* total = held.sums.shared();
    if (work.call.precision_kind == kFull) {
      outer(team, dim, samples, x, x, weight,
            [&](int64_t i, int64_t j, P sum) PK_LAMBDA { total[i * (i + 1) / 2 + j] += double(sum); });
    } else {
      team.sums<P>(
          dim,
          [&](int64_t j, int part, int parts) PK_LAMBDA {
            P sum{};
            for (int k = part; k < samples; k += parts) sum = sum + output(weight[k] * x[k][j] * x[k][j]);
            return sum;
          },
          [&](int64_t j, P sum) PK_LAMBDA { total[j] += double(sum); });
    }
  }

  // The gradients in the mean and the target from U times what is in pulled_sum.
  PK_FN void store_pull(Warp team, const Warps& held, int64_t row, P* to_mean) const {
    P* to_target = row_of<P>(work.call.grad_target, row, dim);
    team.each(dim, [&](int64_t i) PK_LAMBDA {
      const V pull = apply_at(precision(), dim, held.pulled_sum, i) * T(2);
      if (to_mean) to_mean[i] = output(pull);
      if (to_target) to_target[i] = output(-pull);
    });
  }

  // δᵀUδ + tr(U S Sᵀ), δ = μ - y. The columns of S are weighted and summed as samples are.
  PK_FN V closed_form(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, V weight, P* to_scale,
                      RowStats<V>& stats) const {
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
      if (work.call.grad_precision == nullptr) continue;
      if constexpr (Scale<V>::triangular) {
        add_precision(team, held, columns, held.at, weights);
      } else {
        const bool full = work.call.precision_kind == kFull;
        team.each(columns, [&](int64_t k) PK_LAMBDA {
          const int64_t j = first + k;
          held.sums.shared()[full ? j * (j + 1) / 2 + j : j] += double(output(weight * square(scale.std[j])));
        });
      }
    }
    if (work.call.grad_precision) {
      Vectors<V> delta = held.at;
      delta.first = held.base;
      add_precision(team, held, 1, delta, weights);
    }
    store_pull(team, held, row, row_of<P>(work.call.grad_mean, row, dim));
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
        stats.reward_mean = -loss;
        stats.reward_std = stats.advantage_std = square_root(variance);
      }
    }
    return loss;
  }

  PK_FN V sampled(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, V weight, P* to_scale,
                  V log_determinant, RowStats<V>& stats) const {
    const Call& call = work.call;
    const Surrogate s = surrogate_of(call);
    const Group<V> group = group_in(held.group, count);
    const uint64_t seed = work.seed ? uint64_t(*work.seed) : call.seed;
    P* to_mean = row_of<P>(call.grad_mean, row, dim);
    const bool need_sum = call.grad_target || (pathwise && to_mean);
    const bool need_score = !pathwise && (to_mean || to_scale);
    // ŷ - y. Score-function samples are constants, so that only y carries a derivative.
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
        if (pass == 0 || work.held < count) {
          team.each(samples, [&](int64_t k) PK_LAMBDA {
            P* noise = held.noise[k];
            V* residual = held.at[k];
            draw_noise(seed, first + k, call.row_offset + uint64_t(row), dim, noise);
            scale.template stretch<1>(static_cast<const V*>(held.base), noise, residual);
            if constexpr (is_dual<V>) {
              if (!pathwise) {
                for (int64_t j = 0; j < dim; ++j) residual[j].t = held.base[j].t;
                scale.template whiten_noise<1>(held.policy.mean, noise, z[k]);
              }
            }
          });
        }
        if (pass == 0) {
          team.each(samples, [&](int64_t k) PK_LAMBDA {
            group.reward[first + k] = transformed_reward(s, -squared(held.at[k]));
            group.excess[first + k] = pathwise ? V{} : excess_of(dim, z[k], log_determinant);
          });
          continue;
        }
        const V* pull = group.pull + first;
        if (need_sum) {
          team.sums<V>(
              dim,
              [&](int64_t j, int part, int parts) PK_LAMBDA {
                V sum{};
                for (int k = part; k < samples; k += parts) sum = sum + pull[k] * held.at[k][j];
                return sum;
              },
              [&](int64_t j, V sum) PK_LAMBDA { held.pulled_sum[j] = held.pulled_sum[j] + sum; });
        }
        if (call.grad_precision) add_precision(team, held, samples, held.at, pull);
        if (pathwise && to_scale) {
          team.each(samples, [&](int64_t k) PK_LAMBDA {
            V* slope = held.other[k];
            apply<1>(precision(), dim, static_cast<const V*>(held.at[k]), slope);
            for (int64_t j = 0; j < dim; ++j) slope[j] = pull[k] * slope[j] * T(2);
          });
          add_paths(team, scale, samples, held.other, held.noise, to_scale);
        }
        if (need_score) {
          add_scores(team, scale, samples, static_cast<const V*>(group.excess + first), z, held.at, held.mean_sum,
                     to_scale);
        }
      }
      if (pass == 1) break;
      objective = finish(s, group, team);
      if constexpr (!is_dual<V>) {
        if (call.stats) stats = group_stats(s, group, team);
      }
      const V unit = weight * T(1.0 / double(count));
      team.each(count, [&](int64_t g) PK_LAMBDA {
        if (!pathwise) group.excess[g] = -(unit * score_factor(group, g));
        group.pull[g] = unit * group.pull[g];
      });
      if (!need_sum && !need_score && !call.grad_precision && to_scale == nullptr) return -objective;
    }
    if (need_sum) store_pull(team, held, row, pathwise ? to_mean : nullptr);
    if (!pathwise && to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    return -objective;
  }
};

template <class V, template <class> class Scale>
using ClosedFormRows = PolicyLossRows<V, Scale, true>;
template <class V, template <class> class Scale>
using SampledRows = PolicyLossRows<V, Scale, false>;

template <class V, template <class> class Scale>
struct SurrogateLossRows {
  using Call = GaussianSurrogateLoss;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = true;

  PK_FN static int64_t samples(const Call& call) { return call.samples; }
  PK_FN static int64_t summed(const Call&) { return 0; }

  const Work<Call>& work;
  const int dim, count;

  PK_FN SurrogateLossRows(const Work<Call>& work, Memory&)
      : work(work), dim(int(work.call.dim)), count(int(work.call.samples)) {}

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

  PK_FN void rows(Warp team, const Warps& held, int64_t first, int64_t step) const {
    held.sums.clear(team);
    for (int64_t row = first; row < work.call.rows; row += step) one(team, held, row);
  }

  PK_FN void one(Warp team, const Warps& held, int64_t row) const {
    const Call& call = work.call;
    const Surrogate s = surrogate_of(call);
    const Scale<V> scale = held.policy.load(team, call, row, true);
    const Group<V> group = group_in(held.group, count);
    const bool score = call.estimator != kReparam;
    const V weight = weight_of<V>(call, row);
    const V log_determinant = scale.log_determinant(team);
    const V entropy = gaussian_entropy(dim, log_determinant);
    P* to_mean = row_of<P>(call.grad_mean, row, dim);
    P* to_scale = row_of<P>(call.grad_scale, row, scale.size());
    team.each(count, [&](int64_t g) PK_LAMBDA {
      group.reward[g] = transformed_reward(s, value_at<V>(call.rewards, g * call.rows + row));
    });
    team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
    if (to_scale) {
      team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      scale.add_entropy(weight * T(-call.entropy_coef), to_scale, team);
    }
    V objective{}, log_prob{};
    RowStats<V> stats{};
    for (int pass = 0; pass < 2; ++pass) {
      for (int first = 0; first < count; first += work.held) {
        const int samples = count - first < work.held ? count - first : work.held;
        if (pass == 0 || work.held < count) {
          team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
            const Place place(i, dim, first, call.rows, row);
            const V sample = constant<V>(static_cast<const T*>(call.given)[place.at]);
            held.at[place.k][place.j] = sample - held.policy.mean[place.j];
          });
          team.each(samples, [&](int64_t k) PK_LAMBDA { scale.template whiten<1>(held.at[k], held.white[k]); });
        }
        if (pass == 0) {
          team.each(samples, [&](int64_t k) PK_LAMBDA {
            group.excess[first + k] = score ? excess_of(dim, held.white[k], log_determinant) : V{};
          });
          if constexpr (!is_dual<V>) {
            if (call.stats) {
              log_prob = log_prob + team.template sum<V>(samples, [&](int64_t k) PK_LAMBDA {
                return gaussian_log_density(dim, held.white[k], log_determinant);
              });
            }
          }
        } else {
          add_scores(team, scale, samples, static_cast<const V*>(group.excess + first), held.white, held.at,
                     held.mean_sum, to_scale);
        }
      }
      if (pass == 1) break;
      objective = finish(s, group, team);
      if constexpr (!is_dual<V>) {
        if (call.stats) {
          stats = group_stats(s, group, team);
          stats.log_prob = log_prob * T(1.0 / double(count));
          stats.entropy = entropy;
        }
      }
      const V unit = weight * T(-1.0 / double(count));
      team.each(count, [&](int64_t g) PK_LAMBDA {
        if (score) group.excess[g] = unit * score_factor(group, g);
        if (call.grad_rewards) static_cast<P*>(call.grad_rewards)[g * call.rows + row] = output(unit * group.pull[g]);
      });
      if (!score || (to_mean == nullptr && to_scale == nullptr)) break;
    }
    if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    const V loss = -objective - entropy * T(call.entropy_coef);
    RowStats<P> results{};
    if constexpr (!is_dual<V>) results = stats;
    held.sums.add(team, call, row, output(loss), results);
  }
};

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

  PK_FN void rows(Warp team, const Warps& held, int64_t first_row, int64_t step) const {
    const Call& call = work.call;
    for (int64_t row = first_row; row < call.rows; row += step) {
      const Scale<V> scale = held.policy.load(team, call, row, true);
      const V log_determinant = scale.log_determinant(team);
      P* to_mean = row_of<P>(call.grad_mean, row, dim);
      P* to_scale = row_of<P>(call.grad_scale, row, scale.size());
      team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
      if (to_scale) team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      for (int64_t first = 0; first < call.count; first += work.held) {
        const int samples = int(call.count - first < work.held ? call.count - first : work.held);
        team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
          const Place place(i, dim, first, call.rows, row);
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
          add_scores(team, scale, samples, static_cast<const V*>(held.factor), held.white, held.at, held.mean_sum,
                     to_scale);
        }
        if (call.grad_value == nullptr) continue;
        // ∂/∂value is minus ∂/∂μ of the sample.
        team.each(samples, [&](int64_t k) PK_LAMBDA {
          scale.template whiten_transposed<1>(held.white[k], held.at[k]);
          for (int64_t j = 0; j < dim; ++j) held.at[k][j] = -(held.factor[k] * held.at[k][j]);
        });
        team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
          const Place place(i, dim, first, call.rows, row);
          static_cast<P*>(call.grad_value)[place.at] = output(held.at[place.k][place.j]);
        });
      }
      if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    }
  }
};

template <class V, template <class> class Scale>
struct SampleRows {
  using Call = GaussianSample;
  using Value = V;
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = Scale<V>::triangular;
  static constexpr bool is_loss = false;

  PK_FN static int64_t samples(const Call& call) { return call.samples; }

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

  PK_FN void rows(Warp team, const Warps& held, int64_t first_row, int64_t step) const {
    const Call& call = work.call;
    const uint64_t seed = work.seed ? uint64_t(*work.seed) : call.seed;
    for (int64_t row = first_row; row < call.rows; row += step) {
      const Scale<V> scale = held.policy.load(team, call, row, false);
      P* to_mean = row_of<P>(call.grad_mean, row, dim);
      P* to_scale = row_of<P>(call.grad_scale, row, scale.size());
      team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
      if (to_scale) team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      for (int64_t first = 0; first < call.samples; first += work.held) {
        const int samples = int(call.samples - first < work.held ? call.samples - first : work.held);
        team.each(samples, [&](int64_t k) PK_LAMBDA {
          draw_noise(seed, first + k, call.row_offset + uint64_t(row), dim, held.noise[k]);
          scale.template stretch<1>(static_cast<const V*>(held.policy.mean), held.noise[k], held.at[k]);
        });
        if (call.out) {
          team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
            const Place place(i, dim, first, call.rows, row);
            static_cast<P*>(call.out)[place.at] = output(held.at[place.k][place.j]);
          });
        }
        if (to_mean == nullptr && to_scale == nullptr) continue;
        team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
          const Place place(i, dim, first, call.rows, row);
          held.at[place.k][place.j] = value_at<V>(call.cotangent, place.at);
        });
        team.sums<P>(
            dim,
            [&](int64_t j, int part, int parts) PK_LAMBDA {
              P sum{};
              for (int k = part; k < samples; k += parts) sum = sum + output(held.at[k][j]);
              return sum;
            },
            [&](int64_t j, P sum) PK_LAMBDA { held.mean_sum[j] = held.mean_sum[j] + sum; });
        if (to_scale) add_paths(team, scale, samples, held.at, held.noise, to_scale);
      }
      if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    }
  }
};

// Writes what the warps of a block have summed; their memory begins with it.
PK_FN void store_sums(Block team, const char* warps, size_t warp_bytes, int count, int64_t terms, double* to) {
  team.each(kHead + terms, [&](int64_t i) PK_LAMBDA {
    double total = 0;
    for (int w = 0; w < count; ++w) total += reinterpret_cast<const double*>(warps + w * warp_bytes)[i];
    to[i] = total;
  });
}

// Adds up what the blocks of a loss have summed, a warp a number: the loss, the statistics, then the gradient in U.
struct Finish {
  LossCall call;
  const double* partials;
  int64_t blocks, terms;
  int precision_kind;
  int64_t dim;
  void* grad_precision;

  // Of warps to run.
  PK_FN int64_t numbers() const { return kHead + (precision_kind == kScalar && terms > 0 ? 1 : terms); }

  template <class T>
  PK_FN void one(Warp team, int64_t number) const {
    const int64_t size = kHead + terms;
    if (number < kHead) {
      if (call.reduction == kNoReduction || (number > 0 && call.stats == nullptr)) return;
      const double total =
          team.template sum<double>(blocks, [&](int64_t b) PK_LAMBDA { return partials[b * size + number]; });
      const double count = call.rows > 0 ? double(call.rows) : 1.0;
      const bool mean = number > 0 || call.reduction == kMeanOverRows;
      T* to = number == 0 ? static_cast<T*>(call.loss) : static_cast<T*>(call.stats) + number - 1;
      team.each(1, [&](int64_t) PK_LAMBDA { *to = T(mean ? total / count : total); });
      return;
    }
    const int64_t of = number - kHead, width = precision_kind == kScalar ? terms : 1;
    const double total = team.template sum<double>(
        blocks * width, [&](int64_t i) PK_LAMBDA { return partials[i / width * size + kHead + of + i % width]; });
    T* to = static_cast<T*>(grad_precision);
    team.each(1, [&](int64_t) PK_LAMBDA {
      if (precision_kind != kFull) {
        to[of] = T(total);
        return;
      }
      int64_t i = 0;  // an off-diagonal term of x xᵀ stands at both of its places
      while ((i + 1) * (i + 2) / 2 <= of) ++i;
      const int64_t j = of - i * (i + 1) / 2;
      to[i * dim + j] = to[j * dim + i] = T(total);
    });
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
