// xᵀ U x for the precision U that the warps of a block share.
#pragma once

#include "cuda/memory.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

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

// U in the shared memory of a block, symmetrised; to score samples by, a full one also in one of the forms above, where
// memory allows it.
template <class V>
struct SharedPrecision {
  using S = Shared<V>;
  static constexpr bool packs = std::is_same<V, float>::value;
  static constexpr size_t kMostTiled = 24 * 1024;

  const int dim;
  const bool full;
  S *u, *tiled = nullptr, *packed = nullptr;

  PK_FN SharedPrecision(Memory& memory, int ndim, int dim, bool scores)
      : dim(dim), full(ndim == kFull), u(memory.take<S>(precision_size(ndim, dim) + kTile)) {
    const int stride = whole_tiles(dim);
    if (!scores || !full) return;
    if (packs && dim <= kPacked) {
      packed = memory.take<S>(dim * (dim + 1) / 2 + kTile);
    } else if (stride == dim) {
      tiled = u;
    } else if (sizeof(S) * size_t(stride * stride) <= kMostTiled) {
      tiled = memory.take<S>(stride * stride);
    }
  }

  PK_FN void load(Block team, Input input, int ndim) const {
    using T = Element<V>;
    const int size = int(precision_size(ndim, dim));
    const auto entry = [&](int at, int mirrored)
                           PK_LAMBDA { return (value_at<S>(input, at) + value_at<S>(input, mirrored)) * T(0.5); };
    team.each(size + kTile, [&](int64_t number) PK_LAMBDA {
      const int at = int(number);
      u[at] = at < size ? entry(at, full ? at % dim * dim + at / dim : at) : S{};
    });
    if (tiled && tiled != u) {
      const int stride = whole_tiles(dim);
      team.each(stride * stride, [&](int64_t at) PK_LAMBDA {
        const int i = int(at) / stride, j = int(at) % stride;
        tiled[at] = i < dim && j < dim ? entry(i * dim + j, j * dim + i) : S{};
      });
    }
    if (packed) {
      const int terms = dim * (dim + 1) / 2;
      team.each(terms + kTile, [&](int64_t at) PK_LAMBDA {
        int i, j;
        corner(int(at), i, j);
        packed[at] = at < terms ? entry(i * dim + j, j * dim + i) * T(i == j ? 1 : 2) : S{};
      });
    }
  }

  // xᵀ U x of N vectors.
  template <int N>
  PK_FN void squared(Precision<V> precision, const V* const (&x)[N], V (&squares)[N]) const {
    if constexpr (packs) {
      if (packed) {
        quadratic_packed<N>(packed, dim, x, squares);
        return;
      }
    }
    if (tiled) {
      const int stride = whole_tiles(dim);
      unrolled<N>([&](auto s) PK_LAMBDA { squares[s] = V{}; });
      PK_ROLLED
      for (int i = 0; i < stride; i += kTile) add_quadratic_of_rows<N>(tiled, stride, i, x, squares);
      return;
    }
    unrolled<N>([&](auto s) PK_LAMBDA {
      V square[1];
      quadratic<1>(precision, dim, x[s], square);
      squares[s] = square[0];
    });
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
