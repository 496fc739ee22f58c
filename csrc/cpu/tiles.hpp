// Rows in tiles of one SIMD lane a row: how they are read, weighted, written back and summed.
//
// Nothing here depends on the number of threads. A row's results do not depend on the rows around it: each lane does
// the same work, and only sums over the batch (reduced losses, gradients of shared inputs) see other rows, in an order
// that the number of rows alone decides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/kernels.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "po_kernels/group.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

inline Surrogate surrogate(const LossCall& call) {
  return {call.estimator, call.advantage, call.samples, call.entropy_coef, call.rbf_gamma, call.has_rbf};
}

// Rows [begin, begin + count) of the batch, count <= width; the lanes past count repeat the last row.
struct Tile {
  int64_t begin;
  int count;
};

// Column c of the rows in the tile, into to[c * step], one element a lane.
template <class T, int width>
inline void load_columns(Tile tile, const T* from, int64_t stride, int64_t columns, T* to, int64_t step) {
  for (int l = 0; l < width; ++l) {
    const T* row = from + (tile.begin + std::min(l, tile.count - 1)) * stride;
    for (int64_t c = 0; c < columns; ++c) to[c * step + l] = row[c];
  }
}

// Slice i of an (n, rows, columns) input.
template <class T>
inline RowInput slice(Input input, int64_t i, int64_t rows, int64_t columns) {
  const int64_t at = i * rows * columns;
  return {
      {static_cast<const T*>(input.value) + at, input.tangent ? static_cast<const T*>(input.tangent) + at : nullptr},
      columns};
}

template <class V>
inline void load(Tile tile, RowInput input, int64_t columns, V* to) {
  using T = Element<V>;
  constexpr int width = LaneTraits<V>::width;
  constexpr int64_t step = sizeof(V) / sizeof(T);
  T* elements = reinterpret_cast<T*>(to);
  load_columns<T, width>(tile, static_cast<const T*>(input.value), input.stride, columns, elements, step);
  if constexpr (is_dual<V>) {
    if (input.tangent != nullptr) {
      const T* tangent = static_cast<const T*>(input.tangent);
      load_columns<T, width>(tile, tangent, columns, columns, elements + width, step);
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c].t = Primal<V>{};
    }
  }
}

template <class P>
inline void store(Tile tile, const P* from, int64_t columns, void* to) {
  using T = Element<P>;
  constexpr int width = LaneTraits<P>::width;
  const T* elements = reinterpret_cast<const T*>(from);
  T* rows = static_cast<T*>(to) + tile.begin * columns;
  for (int l = 0; l < tile.count; ++l) {
    for (int64_t c = 0; c < columns; ++c) rows[l * columns + c] = elements[c * width + l];
  }
}

// Slice i of an (n, rows, columns) output.
template <class T>
inline void* slice(void* output, int64_t i, int64_t rows, int64_t columns) {
  return static_cast<T*>(output) + i * rows * columns;
}

// One label a lane.
template <class W>
inline W load_labels(Tile tile, const int64_t* from) {
  constexpr int width = sizeof(W) / sizeof(uint32_t);
  W labels{};
  for (int l = 0; l < width; ++l) labels.v[l] = uint32_t(from[tile.begin + std::min(l, tile.count - 1)]);
  return labels;
}

// Numbers that all rows share, with their tangents on duals.
template <class V>
inline void load_shared(Input input, int64_t count, Shared<V>* to) {
  using T = Element<V>;
  const T* value = static_cast<const T*>(input.value);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (is_dual<V>) {
      to[i] = {value[i], input.tangent ? static_cast<const T*>(input.tangent)[i] : T(0)};
    } else {
      to[i] = value[i];
    }
  }
}

// The factor of a row's loss in what is differentiated: cotangent, and 1/rows for a mean; 0 past the tile's end.
template <class V>
inline V load_weight(const LossCall& call, Tile tile) {
  using T = Element<V>;
  constexpr int width = LaneTraits<V>::width;
  const T scale = call.reduction == kMeanOverRows ? T(1.0 / double(call.rows)) : T(1);
  const bool per_row = call.reduction == kNoReduction;
  V weight{};
  T* elements = reinterpret_cast<T*>(&weight);
  for (int l = 0; l < tile.count; ++l) {
    const int64_t at = per_row ? tile.begin + l : 0;
    elements[l] = scale * (call.cotangent.value ? static_cast<const T*>(call.cotangent.value)[at] : T(1));
    if constexpr (is_dual<V>) {
      if (call.cotangent.tangent) {
        elements[width + l] = scale * static_cast<const T*>(call.cotangent.tangent)[at];
      }
    }
  }
  return weight;
}

// Number of each row in the lanes, as two words.
template <class W>
inline void row_numbers(const RandomNumbers& call, Tile tile, W& low, W& high) {
  constexpr int width = sizeof(W) / sizeof(uint32_t);
  for (int l = 0; l < width; ++l) {
    const uint64_t row = call.row_offset + uint64_t(tile.begin + l);
    low.v[l] = uint32_t(row);
    high.v[l] = uint32_t(row >> 32);
  }
}

// Sum over the lanes, in order, in double.
template <class P>
inline double lane_sum(P x, int count) {
  double sum = 0;
  for (int l = 0; l < count; ++l) sum += double(x.v[l]);
  return sum;
}

// Bump allocation of lane values.
template <class V>
struct Arena {
  char* next;
  template <class U = V>
  U* take(int64_t count) {
    U* at = reinterpret_cast<U*>(next);
    next += (sizeof(U) * size_t(count) + 63) / 64 * 64;
    return at;
  }
};

// Consecutive rows in chunks of whole tiles, in float and in double: the unit of parallel work and of sums.
struct Chunks {
  int64_t rows, size, count;

  Chunks(int64_t rows, int64_t most)
      : rows(rows),
        size(std::max<int64_t>(32, ((rows + most - 1) / most + 15) / 16 * 16)),
        count((rows + size - 1) / size) {}

  template <int width, class Body>
  void for_each_tile(int64_t chunk, Body body) const {
    const int64_t end = std::min(rows, (chunk + 1) * size);
    for (int64_t begin = chunk * size; begin < end; begin += width) {
      body(Tile{begin, int(std::min<int64_t>(width, end - begin))});
    }
  }
};

// Threads worth waking for rows that cost so many elementary operations each: waking one takes as long as some ten
// thousand of them.
inline int worthwhile_threads(const Call& call, int64_t operations) {
  constexpr double kOperationsPerThread = 65536;
  const double wanted = double(call.rows) * double(operations) / kOperationsPerThread;
  return int(std::min(double(call.threads), 1.0 + wanted));
}

// Runs body(tile, arena) over all rows of so many operations each.
template <class V, class Body>
void for_each_tile(const Call& call, int64_t operations, size_t scratch_bytes, Body body) {
  const Chunks chunks(call.rows, 64);
  parallel_for(chunks.count, worthwhile_threads(call, operations), [&](int64_t chunk) {
    const Arena<V> arena{static_cast<char*>(scratch(scratch_bytes))};
    chunks.for_each_tile<LaneTraits<V>::width>(chunk, [&](Tile tile) { body(tile, arena); });
  });
}

// Runs kernel(lane value, call) in the precision, and on the duals, that the call asks for.
template <class Kernel, class C>
Verdict with_lanes(const C& call, Kernel kernel) {
  if (call.is_double) return call.dual ? kernel(Dual<Lanes<double>>{}, call) : kernel(Lanes<double>{}, call);
  return call.dual ? kernel(Dual<Lanes<float>>{}, call) : kernel(Lanes<float>{}, call);
}

// Sums of one chunk of rows: the loss, the five statistics, then what a kernel adds (the gradient of a shared input).
constexpr int64_t kSumsBeforeShared = 6;

// What a kernel adds up over rows for a shared input: lane values that are summed over their lanes at the end, or
// plain elements. `terms` is their number whether or not they are wanted, for the order of sums to be the same.
struct SharedSums {
  int64_t terms;
  bool wanted;
  bool by_lane;
};

// Runs body(tile, arena, shared, loss, stats) over all rows, of so many operations each: it writes one lane value for
// the losses of the tile's rows and five for their statistics, and adds to `shared`. Writes call.loss and call.stats.
// Returns the totals of the shared terms.
template <class V, class Body>
std::unique_ptr<double[]> for_each_tile(const LossCall& call, int64_t operations, SharedSums sums, size_t scratch_bytes,
                                        Body body) {
  using P = Primal<V>;
  using T = Element<V>;
  constexpr int width = LaneTraits<V>::width;
  // At most 64 chunks and 16 MiB of sums.
  const int64_t most = std::max<int64_t>(1, (int64_t(1) << 21) / std::max<int64_t>(sums.terms, 1));
  const Chunks chunks(call.rows, std::min<int64_t>(64, most));
  const int64_t shared_terms = sums.wanted ? sums.terms : 0;
  const int64_t shared_packs = sums.by_lane ? shared_terms : (shared_terms + width - 1) / width;
  const int64_t terms = kSumsBeforeShared + shared_terms;
  std::unique_ptr<double[]> partial(new double[size_t(std::max<int64_t>(chunks.count, 1) * terms)]());

  parallel_for(chunks.count, worthwhile_threads(call, operations), [&](int64_t chunk) {
    Arena<V> arena{static_cast<char*>(scratch(scratch_bytes + sizeof(P) * size_t(shared_packs) + 64))};
    P* shared = arena.template take<P>(shared_packs);
    for (int64_t i = 0; i < shared_packs; ++i) shared[i] = P{};
    double* total = partial.get() + chunk * terms;
    chunks.for_each_tile<width>(chunk, [&](Tile tile) {
      P loss{};
      RowStats<P> row_stats{};
      body(tile, arena, shared, loss, row_stats);
      total[0] += lane_sum(loss, tile.count);
      if (call.reduction == kNoReduction) store(tile, &loss, 1, call.loss);
      if (call.stats == nullptr) return;
      const P stats[5] = {row_stats.reward_mean, row_stats.reward_std, row_stats.entropy, row_stats.log_prob,
                          row_stats.advantage_std};
      for (int i = 0; i < 5; ++i) {
        total[1 + i] += lane_sum(stats[i], tile.count);
        if (call.reduction == kNoReduction) store(tile, stats + i, 1, slice<T>(call.stats, i, call.rows, 1));
      }
    });
    const T* elements = reinterpret_cast<const T*>(shared);
    for (int64_t i = 0; i < shared_terms; ++i) {
      total[kSumsBeforeShared + i] = sums.by_lane ? lane_sum(shared[i], width) : double(elements[i]);
    }
  });

  for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
    for (int64_t i = 0; i < terms; ++i) partial[i] += partial[chunk * terms + i];
  }
  if (call.reduction != kNoReduction) {
    const double count = double(std::max<int64_t>(call.rows, 1));
    *static_cast<T*>(call.loss) = T(call.reduction == kMeanOverRows ? partial[0] / count : partial[0]);
    for (int i = 0; call.stats != nullptr && i < 5; ++i) static_cast<T*>(call.stats)[i] = T(partial[1 + i] / count);
  }
  return partial;
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
