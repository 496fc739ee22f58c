// What a kernel reads of the device's memory, and what a warp holds in shared memory.
#pragma once

#include "cuda/work.hpp"
#include "po_kernels/gaussian_family.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

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
PK_FN V in_row(const RowInput& input, int64_t row, int64_t columns, int64_t column) {
  return value_at<V>(input, row * input.stride + column, row * columns + column);
}

// Where number i of samples from `first` on, which a warp takes in the order of memory, stands: at dimension j of its
// sample k, and in the (samples, rows, dim) tensor.
struct Place {
  int k, j;
  int64_t at;

  PK_FN Place(const Divider& by_dim, int i, int dim, int64_t first, int64_t rows, int64_t row)
      : k(by_dim.quotient(i)), j(i - k * dim), at(((first + k) * rows + row) * dim + j) {}
};

template <class T>
PK_FN T* row_of(void* output, int64_t row, int64_t columns) {
  return output == nullptr ? nullptr : static_cast<T*>(output) + row * columns;
}

// The factor of a row's loss in what is differentiated.
template <class V>
PK_FN V weight_of(const LossCall& call, int64_t row) {
  using T = Element<V>;
  const T scale = call.reduction == kMeanOverRows ? ratio<T>(1, call.rows) : T(1);
  const int64_t at = call.reduction == kNoReduction ? row : 0;
  return (call.cotangent.value ? value_at<V>(call.cotangent, at) : constant<V>(T(1))) * scale;
}

// ---- What a warp holds ----

// Of N numbers, as many as one instruction loads or stores: 16 bytes, unless all are less.
template <class V, int N>
struct Chunk {
  static constexpr int size = N * sizeof(V) < 16 ? N : int(16 / sizeof(V));
  alignas(size * sizeof(V)) V v[size];
};

// N numbers at an address that is a multiple of their size, or of 16 bytes.
template <class V, int N>
PK_FN void load(const V* from, V (&to)[N]) {
  using C = Chunk<V, N>;
  unrolled<N / C::size>([&](auto c) PK_LAMBDA {
    const C chunk = reinterpret_cast<const C*>(from)[c];
    unrolled<C::size>([&](auto i) PK_LAMBDA { to[c * C::size + i] = chunk.v[i]; });
  });
}
template <class V, int N>
PK_FN void store(const V (&from)[N], V* to) {
  using C = Chunk<V, N>;
  unrolled<N / C::size>([&](auto c) PK_LAMBDA {
    C chunk;
    unrolled<C::size>([&](auto i) PK_LAMBDA { chunk.v[i] = from[c * C::size + i]; });
    reinterpret_cast<C*>(to)[c] = chunk;
  });
}

// Vectors of samples, an odd number of 16 bytes apart, so that threads at different samples use different banks. What
// stands beyond a vector, to a whole tile, is read with it, may be anything and is not used, unless said otherwise.
template <class U>
struct Vectors {
  int stride;
  U* first;

  PK_FN Vectors(Memory& memory, int64_t dim, int64_t count) {
    constexpr int chunk = 16 / sizeof(U);
    stride = (whole_tiles(dim) / chunk | 1) * chunk;
    first = count == 0 ? nullptr : memory.take<U>(int64_t(stride) * count);
  }
  PK_FN U* operator[](int k) const { return first + k * stride; }
};

// What a diagonal policy holds is followed by zeros, to a whole tile.
template <class V, template <class> class Scale>
struct Policy {
  static constexpr bool triangular = Scale<V>::triangular;
  int64_t dim;
  V *mean, *parameter, *scratch;

  PK_FN Policy(Memory& memory, int64_t dim) : dim(dim) {
    mean = memory.take<V>(whole_tiles(dim));
    parameter = memory.take<V>(triangular ? Scale<V>::size(dim) : whole_tiles(dim));
    scratch = memory.take<V>(Scale<V>::team_work(dim));
  }

  PK_FN void clear(Warp team) const {
    team.each(whole_tiles(dim), [&](int64_t j) PK_LAMBDA {
      mean[j] = V{};
      if (!triangular) parameter[j] = V{};
    });
    if (!triangular) team.each(Scale<V>::team_work(dim), [&](int64_t i) PK_LAMBDA { scratch[i] = V{}; });
  }

  // And what else the row has of as many numbers as it has dimensions, if anything.
  template <class C>
  PK_FN Scale<V> load(Warp team, const C& call, int64_t row, bool whitens, const RowInput* other = nullptr,
                      V* to_other = nullptr) const {
    team.each(dim, [&](int64_t j) PK_LAMBDA {
      mean[j] = in_row<V>(call.mean, row, dim, j);
      if (!triangular) parameter[j] = in_row<V>(call.scale, row, dim, j);
      if (other) to_other[j] = in_row<V>(*other, row, dim, j);
    });
    if (triangular) {
      const int64_t size = Scale<V>::size(dim);
      team.each(size, [&](int64_t i) PK_LAMBDA { parameter[i] = in_row<V>(call.scale, row, size, i); });
    }
    Scale<V> scale(dim, parameter);
    scale.prepare(scratch, whitens, team);
    return scale;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
