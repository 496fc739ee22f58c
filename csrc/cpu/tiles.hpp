// Rows in tiles of one SIMD lane a row, or of one row across all lanes: how they are read, weighted, written back and
// summed.
//
// Nothing here depends on the number of threads. A row's results do not depend on the rows around it: each lane does
// the same work, and only sums over the batch (reduced losses, gradients of shared inputs) see other rows, in an order
// that the number of rows alone decides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "cpu/kernels.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "po_kernels/group.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Rows [begin, begin + count) of the batch, count <= width; the lanes past count repeat the last row.
struct Tile {
  int64_t begin;
  int count;
};

// Slice i of an (n, rows, columns) input.
template <class T>
inline RowInput slice(Input input, int64_t i, int64_t rows, int64_t columns) {
  const int64_t at = i * rows * columns;
  const auto of = [at](const void* from) { return from ? static_cast<const T*>(from) + at : nullptr; };
  return {{{of(input.value), of(input.tangent)}}, columns};
}

// The rows of the tile, one a lane.
template <class T, int width>
inline void row_addresses(Tile tile, T* from, int64_t stride, T* (&row)[width]) {
  for (int l = 0; l < width; ++l) row[l] = from + (tile.begin + std::min(l, tile.count - 1)) * stride;
}

// Asks for the next tile's rows.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i, 0, 2);
}

template <class V>
inline void load(Tile tile, RowInput input, int64_t columns, V* to) {
  using T = Element<V>;
  constexpr int width = LaneTraits<V>::width;
  constexpr int64_t step = sizeof(V) / sizeof(T);
  T* elements = reinterpret_cast<T*>(to);
  const T* value = static_cast<const T*>(input.value);
  const T* row[width];
  if (columns == 1 && input.stride == 1 && tile.count == width) {
    memcpy(elements, value + tile.begin, sizeof(Primal<V>));
  } else if (input.stride == 0) {
    for (int64_t c = 0; c < columns; ++c) {
      const Primal<V> all = broadcast<Primal<V>>(value[c]);
      memcpy(elements + c * step, &all, sizeof all);
    }
  } else {
    row_addresses(tile, value, input.stride, row);
    if (input.stride == columns) prefetch(value + (tile.begin + width) * columns, width * columns);
    rows_to_lanes<T, width>(row, columns, elements, step);
  }
  if constexpr (is_dual<V>) {
    if (input.tangent != nullptr) {
      row_addresses(tile, static_cast<const T*>(input.tangent), columns, row);
      rows_to_lanes<T, width>(row, columns, elements + width, step);
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c].t = Primal<V>{};
    }
  }
}

// The row of a tile across the lanes, which are -inf beyond its last column.
template <class V>
inline void load_across(Tile tile, RowInput input, int64_t columns, V* to) {
  using T = Element<V>;
  constexpr int64_t width = LaneTraits<V>::width, step = sizeof(V) / sizeof(T);
  T* elements = reinterpret_cast<T*>(to);
  const auto copy = [&](const T* from, T* lanes, T beyond) {
    int64_t c = 0;
    for (; c + width <= columns; c += width) memcpy(lanes + c / width * step, from + c, sizeof(Primal<V>));
    for (; c % width != 0 || c < columns; ++c) lanes[c / width * step + c % width] = c < columns ? from[c] : beyond;
  };
  copy(static_cast<const T*>(input.value) + tile.begin * input.stride, elements, -T(__builtin_huge_val()));
  if constexpr (is_dual<V>) {
    if (input.tangent != nullptr) {
      copy(static_cast<const T*>(input.tangent) + tile.begin * columns, elements + width, T(0));
    } else {
      for (int64_t i = 0; i * width < columns; ++i) to[i].t = Primal<V>{};
    }
  }
}

// Half after half, each of which is a register or a part of one.
template <class T, int N>
inline double lane_sum(const Pack<T, N>& x) {
  if constexpr (!std::is_same<T, double>::value) {
    return lane_sum(Pack<double, N>{__builtin_convertvector(x.v, typename Pack<double, N>::Vector)});
  } else if constexpr (N == 2) {
    return x.v[0] + x.v[1];
  } else {
    Pack<T, N / 2> half[2];
    memcpy(half, &x, sizeof x);
    return lane_sum(half[0] + half[1]);
  }
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
  // Null for an output that is not wanted.
  template <class U>
  U* take_for(const void* output, int64_t count) {
    return output == nullptr ? nullptr : take<U>(count);
  }
};

// One number a row.
template <class P>
inline void store(Tile tile, const P& from, void* to) {
  memcpy(static_cast<Element<P>*>(to) + tile.begin, &from, size_t(tile.count) * sizeof(Element<P>));
}

// A row a lane, unless there is none, by way of the arena: the rows are neighbours in memory, which takes them up
// fastest as one piece.
template <class P, class V>
inline void store(Tile tile, const P* from, int64_t columns, void* to, Arena<V> arena) {
  if (from == nullptr) return;
  using T = Element<P>;
  constexpr int width = LaneTraits<P>::width;
  T* rows = reinterpret_cast<T*>(arena.template take<P>(columns));
  T* row[width];
  for (int l = 0; l < width; ++l) row[l] = rows + l * columns;
  lanes_to_rows<T, width>(from, columns, row);
  memcpy(static_cast<T*>(to) + tile.begin * columns, rows, size_t(tile.count * columns) * sizeof(T));
}

template <class P>
inline void store_across(Tile tile, const P* from, int64_t columns, void* to) {
  using T = Element<P>;
  if (from != nullptr) memcpy(static_cast<T*>(to) + tile.begin * columns, from, size_t(columns) * sizeof(T));
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
template <class V, bool across = false>
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
  if constexpr (across) return from_lane(weight, 0);
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

// Sum over the first lanes, or all, in double and in a fixed order.
template <class P>
inline double lane_sum(const P& x, int count) {
  double sum = 0;
  for (int l = 0; l < count; ++l) sum += double(x.v[l]);
  return sum;
}

constexpr int64_t kMostChunks = 64;

// Tiles after which sums over their rows, in the precision of the rows, go on in double: their error is then that of so
// many numbers, whatever the batch.
constexpr int kFlushed = 64;

// Consecutive rows in chunks of whole tiles, in float and in double: the unit of parallel work and of sums.
struct Chunks {
  int64_t rows, size, count;

  explicit Chunks(int64_t rows, int64_t most = kMostChunks, int64_t least_rows = 32, int64_t multiple = 16)
      : rows(rows),
        size((std::max(least_rows, (rows + most - 1) / most) + multiple - 1) / multiple * multiple),
        count((rows + size - 1) / size) {}

  // body(tile) for the tiles of a chunk, until one is refused.
  template <int width, class Body>
  Verdict for_each_tile(int64_t chunk, Body body) const {
    const int64_t end = std::min(rows, (chunk + 1) * size);
    for (int64_t begin = chunk * size; begin < end; begin += width) {
      const Verdict verdict = body(Tile{begin, int(std::min<int64_t>(width, end - begin))});
      if (verdict.code != kAccepted) return verdict;
    }
    return {};
  }
};

// Threads that get some fifty microseconds each of rows that cost so many elementary operations. Waking one takes a
// tenth of that, and where others use the machine too, a loop waits for a thread that has nothing to run on.
inline int worthwhile_threads(const Call& call, int64_t operations) {
  constexpr double kOperationsPerThread = 1 << 20;
  const double wanted = double(call.rows) * double(operations) / kOperationsPerThread;
  return int(std::clamp(wanted, 1.0, double(std::max(call.threads, 1))));
}

// The first refusal, in the order of rows.
inline Verdict first_refusal(const Chunks& chunks, const Verdict* verdicts) {
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    if (verdicts[chunk].code != kAccepted) return verdicts[chunk];
  }
  return {};
}

// Runs body(tile, arena) over all rows of so many operations each. A body that refuses a row says so before it reads
// what that row would lead it to; what has been written by then is of no use.
template <class V, bool across = false, class Body>
Verdict for_each_tile(const Call& call, int64_t operations, size_t scratch_bytes, Body body) {
  const Chunks chunks = across ? Chunks(call.rows, kMostChunks, 1, 1) : Chunks(call.rows);
  Verdict verdicts[kMostChunks];
  parallel_for(chunks.count, worthwhile_threads(call, operations), [&](int64_t chunk) {
    const Arena<V> arena{static_cast<char*>(scratch(scratch_bytes))};
    constexpr int width = across ? 1 : LaneTraits<V>::width;
    verdicts[chunk] = chunks.for_each_tile<width>(chunk, [&](Tile tile) { return body(tile, arena); });
  });
  return first_refusal(chunks, verdicts);
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
  int64_t terms = 0;
  bool wanted = false;
  bool by_lane = true;
};

// The totals over all rows, unless one was refused.
struct Totals {
  Verdict verdict;
  std::unique_ptr<double[]> sums;
  const double* shared() const { return sums.get() + kSumsBeforeShared; }
};

// Runs body(tile, arena, shared, loss, stats), as above, over all rows: it writes one lane value for the losses of the
// tile's rows and five for their statistics, and adds to `shared`. Writes call.out and call.stats.
template <class V, bool across = false, class Body>
Totals for_each_tile(const LossCall& call, int64_t operations, SharedSums sums, size_t scratch_bytes, Body body) {
  using P = Primal<V>;
  using T = Element<V>;
  constexpr int width = LaneTraits<V>::width;
  // At most 16 MiB of sums.
  const int64_t most = std::max<int64_t>(1, (int64_t(1) << 21) / std::max<int64_t>(sums.terms, 1));
  // Large enough that the sums over lanes at a chunk's end are little next to its rows.
  const int64_t least_rows = std::clamp<int64_t>(2048 * sums.terms / operations, 32, 1024);
  const Chunks chunks(call.rows, std::min(kMostChunks, most), across ? 1 : least_rows, across ? 1 : 16);
  Verdict verdicts[kMostChunks];
  const int64_t shared_terms = sums.wanted ? sums.terms : 0;
  const int64_t shared_packs = sums.by_lane ? shared_terms : (shared_terms + width - 1) / width;
  const int64_t terms = kSumsBeforeShared + shared_terms;
  std::unique_ptr<double[]> partial(new double[size_t(std::max<int64_t>(chunks.count, 1) * terms)]());

  parallel_for(chunks.count, worthwhile_threads(call, operations), [&](int64_t chunk) {
    Arena<V> arena{static_cast<char*>(scratch(scratch_bytes + sizeof(P) * size_t(shared_packs) + 64))};
    P* shared = arena.template take<P>(shared_packs);
    for (int64_t i = 0; i < shared_packs; ++i) shared[i] = P{};
    double* total = partial.get() + chunk * terms;
    const auto flush = [&] {
      const T* elements = reinterpret_cast<const T*>(shared);
      for (int64_t i = 0; i < shared_terms; ++i) {
        total[kSumsBeforeShared + i] += sums.by_lane ? lane_sum(shared[i]) : double(elements[i]);
      }
      for (int64_t i = 0; i < shared_packs; ++i) shared[i] = P{};
    };
    int unflushed = 0;
    verdicts[chunk] = chunks.for_each_tile<across ? 1 : width>(chunk, [&](Tile tile) -> Verdict {
      P loss{};
      RowStats<P> row_stats{};
      const Verdict verdict = body(tile, arena, shared, loss, row_stats);
      if (verdict.code != kAccepted) return verdict;
      if (++unflushed == kFlushed) {
        flush();
        unflushed = 0;
      }
      total[0] += lane_sum(loss, tile.count);
      if (call.reduction == kNoReduction) store(tile, loss, call.out);
      if (call.stats == nullptr) return {};
      const P stats[5] = {row_stats.reward_mean, row_stats.reward_std, row_stats.entropy, row_stats.log_prob,
                          row_stats.advantage_std};
      for (int i = 0; i < 5; ++i) {
        total[1 + i] += lane_sum(stats[i], tile.count);
        if (call.reduction == kNoReduction) store(tile, stats[i], slice<T>(call.stats, i, call.rows, 1));
      }
      return {};
    });
    flush();
  });

  const Verdict verdict = first_refusal(chunks, verdicts);
  if (verdict.code != kAccepted) return {verdict, nullptr};
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
    for (int64_t i = 0; i < terms; ++i) partial[i] += partial[chunk * terms + i];
  }
  if (call.reduction != kNoReduction) {
    const double count = double(std::max<int64_t>(call.rows, 1));
    *static_cast<T*>(call.out) = T(call.reduction == kMeanOverRows ? partial[0] / count : partial[0]);
    for (int i = 0; call.stats != nullptr && i < 5; ++i) static_cast<T*>(call.stats)[i] = T(partial[1 + i] / count);
  }
  return {verdict, std::move(partial)};
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
