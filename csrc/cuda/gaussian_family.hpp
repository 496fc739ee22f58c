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

// Of these, what a block puts out: for a U of one number, their sum.
PK_FN int64_t stored_terms(int precision_kind, int64_t terms) {
  return precision_kind == kScalar && terms > 0 ? 1 : terms;
}

constexpr int kTile = 4;  // entries of a vector, and of a matrix to a side, that a thread takes at once

PK_FN int whole_tiles(int64_t dim) {
  return (int(dim) + kTile - 1) / kTile * kTile;
}
PK_FN int tiles_of(int64_t dim) {
  const int side = whole_tiles(dim) / kTile;
  return side * (side + 1) / 2;
}

// How threads share out the blocks of four dimensions of so many samples. Of a last block of two dimensions or one,
// half the normals are enough: it is drawn apart, unless it costs nothing with the others.
struct Drawing {
  int all, whole;
  Divider by_count;

  PK_FN Drawing(int dim, int count) : all((dim + 3) / 4), by_count(count) {
    const bool half = (dim - 1) % 4 < 2 && count > kLanes;
    whole = half && (all * count - 1) / kLanes > ((all - 1) * count - 1) / kLanes ? all - 1 : all;
  }
};

// What depends on the shape alone: known where a kernel is launched, it takes no registers.
struct Shape {
  Shares pairs, tiles, columns;  // of sums for dimensions two by two, entries of a triangle, dimensions
  Divider by_dim;
  Shares samples;   // as many as are held
  Drawing drawing;  // of these

  PK_FN Shape(int dim, int held)
      : pairs((dim + 1) / 2), tiles(tiles_of(dim)), columns(dim), by_dim(dim), samples(held), drawing(dim, held) {}
};

// A call, and how its rows are shared out.
template <class C>
struct Work {
  C call;
  const int64_t* seed = nullptr;  // in memory of the device, or null for call.seed
  double* partials = nullptr;     // (blocks, kHead + stored_terms), of a loss
  int64_t blocks = 0;
  int warps = 1;         // of a block
  int held = 0;          // samples
  int shared_bytes = 0;  // of shared memory, what the block shares
  int warp_bytes = 0;    // after it, of each warp
  int of_block[4] = {};  // where what they hold begins
  int of_warp[16] = {};
  Shape shape{1, 1};

  PK_FN int64_t step() const { return blocks * warps; }  // between the rows of a warp
};

// Takes shared memory bit by bit. Where what is taken stands was found out before a launch: it takes no registers.
struct Memory {
  char* base;
  const int* known = nullptr;
  int* found = nullptr;
  size_t used = 0;
  template <class U>
  PK_FN U* take(int64_t count) {
    if (known) return reinterpret_cast<U*>(base + *known++);
    if (found) *found++ = int(used);
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

// sum + a b, a chain of fused operations also on duals; and of its output alone.
template <class V, class R>
PK_FN V plus_product(V sum, V a, R b) {
  if constexpr (is_dual<V> && is_dual<R>) {
    return {sum.v + a.v * b.v, sum.t + a.v * b.t + a.t * b.v};
  } else if constexpr (is_dual<V>) {
    return {sum.v + a.v * b, sum.t + a.t * b};
  } else {
    return sum + a * b;
  }
}
template <class V, class R>
PK_FN Primal<V> plus_output(Primal<V> sum, V a, R b) {
  if constexpr (is_dual<V> && is_dual<R>) {
    return sum + a.v * b.t + a.t * b.v;
  } else {
    return sum + output(a * b);
  }
}

// ---- Quadratic forms ----

// By tiles, U is symmetric and zero from dim on, with rows of `stride` numbers, whole tiles; so are vectors x. Adds of
// xᵀ U x what rows i to i + kTile of U contribute up to the diagonal, for S vectors.
template <int S, class V>
PK_FN void add_quadratic_of_rows(const Shared<V>* u, int stride, int i, const V* const (&x)[S], V (&total)[S]) {
  using T = Element<V>;
  V sums[S][kTile] = {}, here[S][kTile];
  const auto add = [&](int j, const V(&from)[S][kTile]) PK_LAMBDA {
    unrolled<kTile>([&](auto r) PK_LAMBDA {
      Shared<V> entries[kTile];
      load(u + (i + r) * stride + j, entries);
      unrolled<S * kTile>([&](auto a) PK_LAMBDA {
        constexpr int s = a / kTile, c = a % kTile;
        V& sum = sums[s][r];
        sum = plus_product(sum, from[s][c], entries[c]);
      });
    });
  };
  PK_ROLLED
  for (int j = 0; j < i; j += kTile) {
    unrolled<S>([&](auto s) PK_LAMBDA { load(x[s] + j, here[s]); });
    add(j, here);
  }
  unrolled<S>([&](auto s) PK_LAMBDA { load(x[s] + i, here[s]); });
  unrolled<S * kTile>([&](auto a) PK_LAMBDA {  // a tile below the diagonal stands for two
    V& sum = sums[a / kTile][a % kTile];
    sum = sum * T(2);
  });
  add(i, here);
  unrolled<S * kTile>([&](auto a) PK_LAMBDA {
    constexpr int s = a / kTile, r = a % kTile;
    total[s] = plus_product(total[s], here[s][r], sums[s][r]);
  });
}

// Up to kPacked dimensions, x is in registers, and U is packed: row by row its lower triangle, off the diagonal twice.
constexpr int kPacked = 24;

template <int S, class T>
PK_FN void quadratic_packed(const T* u, int dim, const T* const (&x)[S], T (&total)[S]) {
  T values[S][kPacked], entries[kTile];
  unrolled<S>([&](auto s) PK_LAMBDA { total[s] = T{}; });
  unrolled_while<kPacked>([&](auto row) PK_LAMBDA {
    constexpr int i = row;
    if (i >= dim) return false;
    if constexpr (i % kTile == 0) {
      unrolled<S>([&](auto s) PK_LAMBDA {
        T tile[kTile];
        load(x[s] + i, tile);
        unrolled<kTile>([&](auto c) PK_LAMBDA { values[s][i + c] = tile[c]; });
      });
    }
    T sums[S] = {};
    unrolled<i + 1>([&](auto column) PK_LAMBDA {
      constexpr int j = column, at = i * (i + 1) / 2 + j;
      if constexpr (at % kTile == 0) load(u + at, entries);
      unrolled<S>([&](auto s) PK_LAMBDA {
        constexpr int of = s;
        sums[of] = sums[of] + values[of][j] * entries[at % kTile];
      });
    });
    unrolled<S>([&](auto s) PK_LAMBDA {
      constexpr int of = s;
      total[of] = total[of] + values[of][i] * sums[of];
    });
    return true;
  });
}

// ---- Sums over samples ----

// Number of a triangle's entry, row by row, to its row and column.
PK_FN void corner(int number, int& i, int& j) {
  i = int((square_root_of_normal(float(8 * number + 1)) - 1.0f) * 0.5f);  // exact: below 2^21
  j = number - i * (i + 1) / 2;
}

template <class P>
using Tile = Several<P, kTile * kTile>;

// Adds Σ weight_k left_ki right_kj over every `step`th k from `first` on, for a tile from (i, j) on; no weights are
// ones.
template <class V, class R>
PK_FN void add_products(int i, int j, int first, int step, int count, Vectors<V> left, Vectors<R> right,
                        const V* weight, Tile<Primal<V>>& sum) {
  constexpr int at_once = sizeof(V) == sizeof(float) ? 4 : 1;
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
  if (weight) {
    PK_ROLLED
    for (int k = first; k < count; k += step) add(k, Constant<true>{});
    return;
  }
  int k = first;
  PK_ROLLED
  for (; k + (at_once - 1) * step < count; k += at_once * step) {
    unrolled<at_once>([&](auto) PK_LAMBDA { add(k, Constant<false>{}); });
  }
  PK_ROLLED
  for (; k < count; k += step) add(k, Constant<false>{});
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

  // A thread's numbers, 16 bytes at a time.
  PK_FN P* at(int lane, int number) const {
    constexpr int chunk = 16 / sizeof(P);
    return first + (number / chunk * kLanes + lane) * chunk + number % chunk;
  }
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
      unrolled<kTile>([&](auto r) PK_LAMBDA {
        constexpr int row = r * kTile;
        constexpr int chunk = 16 / sizeof(P);
        unrolled<kTile / chunk>([&](auto c) PK_LAMBDA {
          P some[chunk];
          load(at(int(lane), row + c * chunk), some);
          unrolled<chunk>([&](auto n) PK_LAMBDA { sum.v[row + c * chunk + n] = some[n]; });
        });
      });
      add_products(i * kTile, j * kTile, part, tiles.parts, count, x, x, weight, sum);
      unrolled<kTile>([&](auto r) PK_LAMBDA {
        constexpr int row = r * kTile;
        constexpr int chunk = 16 / sizeof(P);
        unrolled<kTile / chunk>([&](auto c) PK_LAMBDA {
          P some[chunk];
          unrolled<chunk>([&](auto n) PK_LAMBDA { some[n] = sum.v[row + c * chunk + n]; });
          store(some, at(int(lane), row + c * chunk));
        });
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
        if (sum && weight) {
          PK_ROLLED
          for (int k = part; k < count; k += parts) add(k, Constant<true>{});
          return sums;
        }
        constexpr int at_once = sizeof(V) == sizeof(float) ? 4 : 1;
        int k = part;
        PK_ROLLED
        for (; k + (at_once - 1) * parts < count; k += at_once * parts) {
          unrolled<at_once>([&](auto i) PK_LAMBDA { add(k + i * parts, Constant<false>{}); });
        }
        PK_ROLLED
        for (; k < count; k += parts) add(k, Constant<false>{});
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
    if (mean) mean[j] = mean[j] + output(of_z * scale.inverse_std[j]);
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
            diagonal = diagonal - output(sum.v[1] * scale.inverse_diag[i]);
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

// store(k, block, z) for the normals of each block of four dimensions of samples first + k, k < count: threads take
// blocks of samples. Beyond dim, z is finite.
template <class P, class Store>
PK_FN void draw(Warp team, uint64_t seed, int64_t first, uint64_t row, int count, const Drawing& drawing, Store store) {
  constexpr int S = sizeof(P) == sizeof(float) ? 2 : 1;  // at once, as far as registers last
  const auto drawn = [&](int i, int begin, int end, auto number, auto pairs) PK_LAMBDA {
    constexpr int N = number, pair = pairs;
    uint32_t blocks[N], samples[N];
    int of[N];
    unrolled<N>([&](auto n) PK_LAMBDA {
      constexpr int at = n;
      const int block = pair == 1 ? 0 : drawing.by_count.quotient(i + at * kLanes);
      of[at] = i + at * kLanes - block * count;
      blocks[at] = uint32_t(begin + block);
      samples[at] = uint32_t(first) + uint32_t(of[at]);
    });
    P z[4 * N] = {};
    normals_of_blocks<N, pair>(seed, blocks, samples, uint32_t(row), uint32_t(row >> 32), z, 4);
    unrolled<N>([&](auto n) PK_LAMBDA {
      constexpr int at = n;
      const P some[4] = {z[4 * at], z[4 * at + 1], z[4 * at + 2], z[4 * at + 3]};
      if (at == 0 || (pair == 1 ? of[at] < count : int(blocks[at]) < end)) store(of[at], int(blocks[at]), some);
    });
  };
  team.many<S>(drawing.whole * count,
               [&](int i, auto number) PK_LAMBDA { drawn(i, 0, drawing.whole, number, Constant<2>{}); });
  if (drawing.whole == drawing.all) return;
  team.many<S, true>(
      count, [&](int i, auto number) PK_LAMBDA { drawn(i, drawing.whole, drawing.all, number, Constant<1>{}); });
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
  return {call.estimator,    call.advantage,       call.num_samples,
          call.entropy_coef, call.rbf_gamma.value, call.rbf_gamma.given};
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

  // One of the numbers of a row, which without a reduction are also results: the loss, or a statistic.
  template <class P>
  PK_FN void add(Warp team, const LossCall& call, int64_t row, int number, P value) const {
    team.each(1, [&](int64_t) PK_LAMBDA {
      total[number] += double(value);
      if (call.reduction != kNoReduction) return;
      static_cast<P*>(number == 0 ? call.out : call.stats)[number == 0 ? row : (number - 1) * call.rows + row] = value;
    });
  }
};

// Numbers of a row.
enum : int { kLoss = 0, kRewardMean = 1, kRewardStd = 2, kEntropy = 3, kLogProb = 4, kAdvantageStd = 5 };

template <class P>
PK_FN void add_group_stats(Warp team, const Sums& sums, const LossCall& call, int64_t row, const RowStats<P>& stats) {
  sums.add(team, call, row, kRewardMean, stats.reward_mean);
  sums.add(team, call, row, kRewardStd, stats.reward_std);
  sums.add(team, call, row, kAdvantageStd, stats.advantage_std);
}

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
  PK_FN static int64_t samples(const Call& call) { return closed ? call.dim : call.num_samples; }
  PK_FN static int64_t summed(const Call& call) {
    return call.precision.gradient ? summed_terms(call.precision_ndim, call.dim) : 0;
  }
  PK_FN static int64_t stored(const Call& call) { return stored_terms(call.precision_ndim, summed(call)); }

  static constexpr int at_once = sizeof(V) <= 8 ? 2 : 1;  // samples of a thread, as far as registers last

  const Work<Call>& work;
  const int dim, count;
  const bool pathwise, full;
  const bool uniform;  // all samples of all rows weigh the same
  Shared<V>* u;
  Shared<V>* tiled;   // U in rows of whole tiles, or null where memory is short
  Shared<V>* packed;  // U as of quadratic_packed, or null

  PK_FN PolicyLossRows(const Work<Call>& work, Memory& memory)
      : work(work),
        dim(int(work.call.dim)),
        count(int(samples(work.call))),
        pathwise(work.call.estimator == kReparam),
        full(work.call.precision_ndim == kFull),
        uniform(!is_dual<V> && !work.call.rbf_gamma.given &&
                (work.call.cotangent.value == nullptr || work.call.reduction != kNoReduction)) {
    const int stride = whole_tiles(dim);
    u = memory.take<Shared<V>>(precision_size(work.call.precision_ndim, dim) + kTile);
    tiled = packed = nullptr;
    if (closed || !full) return;
    if (packs && dim <= kPacked) {
      packed = memory.take<Shared<V>>(dim * (dim + 1) / 2 + kTile);
    } else if (stride == dim) {
      tiled = u;
    } else if (sizeof(Shared<V>) * size_t(stride * stride) <= kMostTiled) {
      tiled = memory.take<Shared<V>>(stride * stride);
    }
  }

  static constexpr bool packs = std::is_same<V, float>::value;
  static constexpr size_t kMostTiled = 24 * 1024;
  static constexpr int kFew = kLanes / 2;  // samples, of which several threads share one's quadratic form

  struct Warps {
    Sums sums;
    Policy<V, Scale> policy;
    V *target, *base, *pulled_sum, *group;
    P *mean_sum, *scale_sum;
    Tally<P> tally;  // of the gradient in a full U, where each tile has a thread
    Vectors<P> noise;
    Vectors<V> at, other;

    PK_FN Warps(const PolicyLossRows& k, Memory& memory)
        : sums(memory, summed(k.work.call)),
          policy(memory, k.dim),
          target(memory.take<V>(k.dim)),
          base(memory.take<V>(whole_tiles(k.dim))),
          pulled_sum(memory.take<V>(whole_tiles(k.dim))),
          group(memory.take<V>(4 * k.count)),
          mean_sum(memory.take<P>(k.dim)),
          scale_sum(memory.take<P>(triangular ? 0 : k.dim)),
          tally{!closed && k.work.call.precision.gradient && k.full && tiles_of(k.dim) <= kLanes
                    ? memory.take<P>(Tally<P>::size)
                    : nullptr},
          noise(memory, k.dim, closed || (is_dual<V> && !triangular && !k.pathwise) ? 0 : k.work.held),
          at(memory, k.dim, k.work.held),
          other(memory, k.dim, closed || k.pathwise || is_dual<V> ? k.work.held : 0) {}
  };

  // U, symmetrised.
  PK_FN void load_shared(Block team) const {
    const Call& call = work.call;
    const int size = int(precision_size(call.precision_ndim, dim));
    const auto entry = [&](int at, int mirrored) PK_LAMBDA {
      return (value_at<Shared<V>>(call.precision, at) + value_at<Shared<V>>(call.precision, mirrored)) * T(0.5);
    };
    team.each(size + kTile, [&](int64_t number) PK_LAMBDA {
      const int at = int(number);
      u[at] = at < size ? entry(at, full ? at % dim * dim + at / dim : at) : Shared<V>{};
    });
    if (tiled && tiled != u) {
      const int stride = whole_tiles(dim);
      team.each(stride * stride, [&](int64_t at) PK_LAMBDA {
        const int i = int(at) / stride, j = int(at) % stride;
        tiled[at] = i < dim && j < dim ? entry(i * dim + j, j * dim + i) : Shared<V>{};
      });
    }
    if (packed) {
      const int terms = dim * (dim + 1) / 2;
      team.each(terms + kTile, [&](int64_t at) PK_LAMBDA {
        int i, j;
        corner(int(at), i, j);
        packed[at] = at < terms ? entry(i * dim + j, j * dim + i) * T(i == j ? 1 : 2) : Shared<V>{};
      });
    }
  }

  PK_FN void rows(Warp team, const Warps& held, int64_t first) const {
    held.sums.clear(team);
    held.policy.clear(team);
    team.each(whole_tiles(dim), [&](int64_t j) PK_LAMBDA { held.base[j] = held.pulled_sum[j] = V{}; });
    if (held.tally.first) held.tally.clear(team);
    int tallied = 0;
    for (int64_t row = first; row < work.call.rows; row += work.step()) {
      const Scale<V> scale =
          held.policy.load(team, work.call, row, !closed || work.call.stats != nullptr, &work.call.target, held.target);
      // A gradient of dim numbers is added up in memory of the warp. Never one or the other: nvcc has to know which.
      P* scale_sum = triangular ? row_of<P>(work.call.scale.gradient, row, scale.size()) : held.scale_sum;
      if (work.call.scale.gradient == nullptr) scale_sum = nullptr;
      const V weight = weight_of<V>(work.call, row);
      if (scale_sum) {
        team.each(scale.size(), [&](int64_t i) PK_LAMBDA { scale_sum[i] = P{}; });
        scale.add_entropy(weight * T(-work.call.entropy_coef), scale_sum, team);
      }
      const V log_determinant = scale.log_determinant(team);
      const V entropy = gaussian_entropy(dim, log_determinant);
      if constexpr (!is_dual<V>) {
        if (work.call.stats) {
          held.sums.add(team, work.call, row, kEntropy, entropy);
          held.sums.add(team, work.call, row, kLogProb, log_prob(team, held, scale, log_determinant));
        }
      }
      V loss;
      if constexpr (closed) {
        loss = closed_form(team, held, scale, row, weight, scale_sum);
      } else {
        loss = sampled(team, held, scale, row, weight, scale_sum, log_determinant);
      }
      if (!triangular && work.call.scale.gradient) {
        P* to_scale = row_of<P>(work.call.scale.gradient, row, dim);
        team.each(dim, [&](int64_t j) PK_LAMBDA { to_scale[j] = held.scale_sum[j]; });
      }
      loss = loss - entropy * T(work.call.entropy_coef);
      held.sums.add(team, work.call, row, kLoss, output(loss));
      tallied += count;
      if (held.tally.first && (tallied >= kTallied || row + work.step() >= work.call.rows)) {
        const P factor = uniform ? output(weight_of<V>(work.call, 0)) * ratio<T>(1, count) : P{} + T(1);
        held.tally.flush(team, work.shape.tiles, dim, factor, held.sums.shared());
        tallied = 0;
      }
    }
  }

  // Of the target.
  PK_FN V log_prob(Warp team, const Warps& held, const Scale<V>& scale, V log_determinant) const {
    team.each(1, [&](int64_t) PK_LAMBDA {
      for (int j = 0; j < dim; ++j) held.base[j] = held.target[j] - held.policy.mean[j];
      scale.template whiten<1>(held.base, held.pulled_sum);
      held.pulled_sum[0] = gaussian_log_density(dim, held.pulled_sum, log_determinant);
    });
    return held.pulled_sum[0];
  }

  // Samples after which sums in the precision of V go on in double.
  static constexpr int kTallied = 512;

  PK_FN Precision<V> precision() const { return {work.call.precision_ndim, u}; }

  // xᵀ U x of S vectors.
  template <int S>
  PK_FN void squared(const V* const (&x)[S], V (&squares)[S]) const {
    if constexpr (packs) {
      if (packed) {
        quadratic_packed<S>(packed, dim, x, squares);
        return;
      }
    }
    if (tiled) {
      const int stride = whole_tiles(dim);
      unrolled<S>([&](auto s) PK_LAMBDA { squares[s] = V{}; });
      PK_ROLLED
      for (int i = 0; i < stride; i += kTile) add_quadratic_of_rows<S>(tiled, stride, i, x, squares);
      return;
    }
    unrolled<S>([&](auto s) PK_LAMBDA {
      V square[1];
      quadratic<1>(precision(), dim, x[s], square);
      squares[s] = square[0];
    });
  }

  // Adds Σ_k weight_k x_k x_kᵀ as the gradient in U, where no weights are `each`.
  PK_FN void add_precision(Warp team, const Warps& held, int samples, Vectors<V> x, const V* weight, P each) const {
    double* total = held.sums.shared();
    if (held.tally.first) {  // which `each` weighs later
      held.tally.add(team, work.shape.tiles, samples, x, weight);
    } else if (full) {
      outer(team, work.shape.tiles, dim, samples, x, x, weight,
            [&](int i, int j, P sum) PK_LAMBDA { total[i * (i + 1) / 2 + j] += double(sum * each); });
    } else {
      team.sums<P>(
          work.shape.columns,
          [&](int j, int part, int parts) PK_LAMBDA {
            P sum{};
            for (int k = part; k < samples; k += parts) {
              const V value = x[k][j];
              sum = sum + output(weight ? weight[k] * value * value : value * value);
            }
            return sum;
          },
          [&](int j, P sum) PK_LAMBDA { total[j] += double(sum * each); });
    }
  }

  // The gradients in the mean and the target from U times what is in pulled_sum.
  PK_FN void store_pull(Warp team, const Warps& held, int64_t row, P* to_mean) const {
    P* to_target = row_of<P>(work.call.target.gradient, row, dim);
    team.each(dim, [&](int64_t at) PK_LAMBDA {
      const int i = int(at);
      V sum{};
      if (full) {
        const Shared<V>* entries = u + i * dim;  // beyond the row, times zero
        PK_ROLLED
        for (int j = 0; j < dim; j += kTile) {
          V pulled[kTile];
          load(held.pulled_sum + j, pulled);
          unrolled<kTile>([&](auto c) PK_LAMBDA { sum = sum + pulled[c] * entries[j + c]; });
        }
      } else {
        sum = apply_at(precision(), dim, held.pulled_sum, i);
      }
      const V pull = sum * T(2);
      if (to_mean) to_mean[i] = output(pull);
      if (to_target) to_target[i] = output(-pull);
    });
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
          held.sums.shared()[full ? j * (j + 1) / 2 + j : j] += double(output(weight * square(scale.std[j])));
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

  // Draws samples and their residuals ŷ - y, of which score-function samples carry a derivative by y only.
  PK_FN void draw_samples(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, int first,
                          int samples) const {
    const Call& call = work.call;
    const uint64_t seed = work.seed ? uint64_t(*work.seed) : call.seed;
    const Vectors<V> z = held.other;
    draw<P>(team, seed, first, call.row_offset + uint64_t(row), samples,
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
                  V mean[kTile], parameter[kTile], inverse[kTile], white[kTile];
                  load(held.policy.mean + j, mean);
                  load(held.policy.parameter + j, parameter);
                  load(scale.inverse_std + j, inverse);
                  unrolled<kTile>([&](auto i) PK_LAMBDA {
                    constexpr int at = i;
                    white[at] = Scale<V>::whitened(mean[at].t * inverse[at].v, parameter[at].t, noise[at]);
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
      if constexpr (is_dual<V>) group.excess[first + k] = pathwise ? V{} : excess_of(dim, z[k], log_determinant);
    };
    if (tiled && samples <= kFew) {
      const int stride = whole_tiles(dim);
      team.sums<V>(
          samples == work.held ? work.shape.samples : Shares(samples),
          [&](int k, int part, int parts) PK_LAMBDA {
            const V* const x[1] = {held.at[k]};
            V square[1] = {};
            PK_ROLLED
            for (int i = part * kTile; i < stride; i += parts * kTile) {
              add_quadratic_of_rows<1>(tiled, stride, i, x, square);
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
      squared<S>(x, squares);
      unrolled<S>([&](auto i) PK_LAMBDA {
        const int of = k + i * kLanes;
        if (of < samples) set(of, squares[i]);
      });
    });
  }

  PK_FN V sampled(Warp team, const Warps& held, const Scale<V>& scale, int64_t row, V weight, P* to_scale,
                  V log_determinant) const {
    const Call& call = work.call;
    const Surrogate s = surrogate_of(call);
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

  PK_FN static int64_t samples(const Call& call) { return call.num_samples; }
  PK_FN static int64_t summed(const Call&) { return 0; }
  PK_FN static int64_t stored(const Call&) { return 0; }

  const Work<Call>& work;
  const int dim, count;

  PK_FN SurrogateLossRows(const Work<Call>& work, Memory&)
      : work(work), dim(int(work.call.dim)), count(int(work.call.num_samples)) {}

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

  PK_FN void rows(Warp team, const Warps& held, int64_t first) const {
    held.sums.clear(team);
    held.policy.clear(team);
    for (int64_t row = first; row < work.call.rows; row += work.step()) one(team, held, row);
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
    P* to_mean = row_of<P>(call.mean.gradient, row, dim);
    P* to_scale = row_of<P>(call.scale.gradient, row, scale.size());
    team.each(count, [&](int64_t g) PK_LAMBDA {
      group.reward[g] = transformed_reward(s, value_at<V>(call.rewards, g * call.rows + row));
    });
    team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
    if (to_scale) {
      team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
      scale.add_entropy(weight * T(-call.entropy_coef), to_scale, team);
    }
    V objective{}, log_prob{};
    for (int pass = 0; pass < 2; ++pass) {
      for (int first = 0; first < count; first += work.held) {
        const int samples = count - first < work.held ? count - first : work.held;
        if (pass == 0 || work.held < count) {
          team.each(samples * dim, [&](int64_t i) PK_LAMBDA {
            const Place place(work.shape.by_dim, int(i), dim, first, call.rows, row);
            const V sample = constant<V>(static_cast<const T*>(call.samples)[place.at]);
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
          add_scores(team, work.shape, scale, samples, static_cast<const V*>(group.excess + first), held.white, held.at,
                     held.mean_sum, to_scale);
        }
      }
      if (pass == 1) break;
      objective = finish(s, group, team);
      if constexpr (!is_dual<V>) {
        if (call.stats) {
          add_group_stats(team, held.sums, call, row, group_stats(s, group, team));
          held.sums.add(team, call, row, kLogProb, log_prob * ratio<T>(1, count));
          held.sums.add(team, call, row, kEntropy, entropy);
        }
      }
      const V unit = weight * -ratio<T>(1, count);
      team.each(count, [&](int64_t g) PK_LAMBDA {
        if (score) group.excess[g] = unit * score_factor(group, g);
        if (call.rewards.gradient)
          static_cast<P*>(call.rewards.gradient)[g * call.rows + row] = output(unit * group.pull[g]);
      });
      if (!score || (to_mean == nullptr && to_scale == nullptr)) break;
    }
    if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    const V loss = -objective - entropy * T(call.entropy_coef);
    held.sums.add(team, call, row, kLoss, output(loss));
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
    const uint64_t seed = work.seed ? uint64_t(*work.seed) : call.seed;
    held.policy.clear(team);
    for (int64_t row = first_row; row < call.rows; row += work.step()) {
      const Scale<V> scale = held.policy.load(team, call, row, false);
      P* to_mean = row_of<P>(call.mean.gradient, row, dim);
      P* to_scale = row_of<P>(call.scale.gradient, row, scale.size());
      team.each(dim, [&](int64_t j) PK_LAMBDA { held.mean_sum[j] = P{}; });
      if (to_scale) team.each(scale.size(), [&](int64_t i) PK_LAMBDA { to_scale[i] = P{}; });
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
      }
      if (to_mean) team.each(dim, [&](int64_t j) PK_LAMBDA { to_mean[j] = held.mean_sum[j]; });
    }
  }
};

// Writes what the warps of a block have summed, of which `terms` are the gradient in U; their memory begins with it.
// That of one number is the sum of all.
PK_FN void store_sums(Block team, const char* warps, int warp_bytes, int count, int64_t terms, int64_t stored,
                      double* to) {
  const auto total = [&](int64_t i) PK_LAMBDA {
    double sum = 0;
    for (int w = 0; w < count; ++w) sum += reinterpret_cast<const double*>(warps + w * warp_bytes)[i];
    return sum;
  };
  team.each(kHead + stored, [&](int64_t i) PK_LAMBDA {
    double sum = total(i);
    for (int64_t j = i + 1; i == kHead && stored < terms && j < kHead + terms; ++j) sum += total(j);
    to[i] = sum;
  });
}

// Adds up what the blocks of a loss have summed: the loss, the statistics, then the gradient in U. A block of threads
// takes kLanes of these numbers, side by side as they stand in memory, in kParts parts.
struct Finish {
  static constexpr int kParts = 32;

  LossCall call;
  const double* partials;
  int64_t blocks, terms;  // terms that a block stores
  int precision_kind;
  int64_t dim;
  void* grad_precision;

  PK_FN int64_t groups() const { return (kHead + terms + kLanes - 1) / kLanes; }

  // scratch: kParts kLanes.
  template <class T>
  PK_FN void group(Block team, int64_t number, double* scratch) const {
    const int64_t size = kHead + terms;
    team.each(kParts * kLanes, [&](int64_t i) PK_LAMBDA {
      const int64_t column = number * kLanes + i % kLanes;
      double sum = 0;
      for (int64_t b = i / kLanes; column < size && b < blocks; b += kParts) sum += partials[b * size + column];
      scratch[i] = sum;
    });
    team.each(kLanes, [&](int64_t lane) PK_LAMBDA {
      const int64_t column = number * kLanes + lane;
      double total = 0;
      for (int part = 0; part < kParts; ++part) total += scratch[part * kLanes + lane];
      if (column < kHead) {
        store_number<T>(column, total);
      } else if (column < size) {
        store_term<T>(column - kHead, T(total));
      }
    });
  }

  template <class T>
  PK_FN void store_number(int64_t number, double total) const {
    if (call.reduction == kNoReduction || (number > 0 && call.stats == nullptr)) return;
    if (number > 0 || call.reduction == kMeanOverRows) total /= call.rows > 0 ? double(call.rows) : 1.0;
    *(number == 0 ? static_cast<T*>(call.out) : static_cast<T*>(call.stats) + number - 1) = T(total);
  }

  template <class T>
  PK_FN void store_term(int64_t term, T value) const {
    T* to = static_cast<T*>(grad_precision);
    if (precision_kind != kFull) {
      to[term] = value;
      return;
    }
    int64_t i = 0;  // an off-diagonal term of x xᵀ stands at both of its places
    while ((i + 1) * (i + 2) / 2 <= term) ++i;
    const int64_t j = term - i * (i + 1) / 2;
    to[i * dim + j] = to[j * dim + i] = value;
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
