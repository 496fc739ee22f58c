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

// So many elements at once, of 8 or 16 bytes, as nvcc loads and stores them with one instruction.
#if defined(__CUDACC__)
PK_FN void load_chunk(const float* from, float (&to)[2]) {
  const float2 chunk = *reinterpret_cast<const float2*>(from);
  to[0] = chunk.x, to[1] = chunk.y;
}
PK_FN void load_chunk(const float* from, float (&to)[4]) {
  const float4 chunk = *reinterpret_cast<const float4*>(from);
  to[0] = chunk.x, to[1] = chunk.y, to[2] = chunk.z, to[3] = chunk.w;
}
PK_FN void load_chunk(const double* from, double (&to)[2]) {
  const double2 chunk = *reinterpret_cast<const double2*>(from);
  to[0] = chunk.x, to[1] = chunk.y;
}
PK_FN void store_chunk(const float (&from)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
PK_FN void store_chunk(const double (&from)[2], double* to) {
  *reinterpret_cast<double2*>(to) = make_double2(from[0], from[1]);
}
#else
template <class T, int N>
PK_FN void load_chunk(const T* from, T (&to)[N]) {
  memcpy(to, from, sizeof to);
}
template <class T, int N>
PK_FN void store_chunk(const T (&from)[N], T* to) {
  memcpy(to, from, sizeof from);
}
#endif

// N numbers at an address that is a multiple of their size, or of 16 bytes.
template <class V, int N>
struct Chunks {
  using T = Element<V>;
  static constexpr int per = int(sizeof(V) / sizeof(T));
  static constexpr int elements = N * per;
  static constexpr int size = elements * sizeof(T) < 16 ? elements : int(16 / sizeof(T));
};
template <class V, int N>
PK_FN void load(const V* from, V (&to)[N]) {
  using C = Chunks<V, N>;
  using T = Element<V>;
  T flat[C::elements];
  unrolled<C::elements / C::size>([&](auto c) PK_LAMBDA {
    constexpr int begin = c * C::size;
    T chunk[C::size];
    load_chunk(reinterpret_cast<const T*>(from) + begin, chunk);
    unrolled<C::size>([&](auto i) PK_LAMBDA { flat[begin + i] = chunk[i]; });
  });
  unrolled<N>([&](auto i) PK_LAMBDA {
    constexpr int at = i;
    if constexpr (is_dual<V>) {
      to[at] = V{flat[2 * at], flat[2 * at + 1]};
    } else {
      to[at] = flat[at];
    }
  });
}
template <class V, int N>
PK_FN void store(const V (&from)[N], V* to) {
  using C = Chunks<V, N>;
  using T = Element<V>;
  T flat[C::elements];
  unrolled<N>([&](auto i) PK_LAMBDA {
    constexpr int at = i;
    if constexpr (is_dual<V>) {
      flat[2 * at] = from[at].v;
      flat[2 * at + 1] = from[at].t;
    } else {
      flat[at] = from[at];
    }
  });
  unrolled<C::elements / C::size>([&](auto c) PK_LAMBDA {
    constexpr int begin = c * C::size;
    T chunk[C::size];
    unrolled<C::size>([&](auto i) PK_LAMBDA { chunk[i] = flat[begin + i]; });
    store_chunk(chunk, reinterpret_cast<T*>(to) + begin);
  });
}

// Vectors of samples, an odd number of 16 bytes apart, so that threads at different samples use different banks. What
// stands beyond a vector, to a whole tile, is finite and not used, unless said otherwise.
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
      if (!triangular) parameter[j] = scratch[j] = scratch[whole_tiles(dim) + j] = V{};
    });
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
