// Products of matrices whose rows are packs of lanes, in tiles that stay in registers.
#pragma once

#include "cpu/pack.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Of a tile: rows of the result, and packs of each.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTilePacks = 4;
#else
constexpr int kTileRows = 4, kTilePacks = 2;
#endif

// An element of a matrix at row r and column c is value[r * row + c * column].
template <class T>
struct Strided {
  const T* value;
  int64_t row, column;
};

template <int rows, int packs, class P>
PK_FN void add_product_tile(Strided<Element<P>> a, int64_t inner, const P* b, int64_t b_row, P* to, int64_t to_row) {
  P sum[rows][packs];
  unrolled<rows>([&](auto r) PK_LAMBDA { unrolled<packs>([&](auto p) PK_LAMBDA { sum[r][p] = to[r * to_row + p]; }); });
  for (int64_t k = 0; k < inner; ++k) {
    P x[packs];
    unrolled<packs>([&](auto p) PK_LAMBDA { x[p] = b[k * b_row + p]; });
    unrolled<rows>([&](auto r) PK_LAMBDA {
      const P factor{a.value[r * a.row + k * a.column] - P{}.v};  // less zero, which is nothing to compute
      unrolled<packs>([&](auto p) PK_LAMBDA { sum[r][p] = sum[r][p] + factor * x[p]; });
    });
  }
  unrolled<rows>([&](auto r) PK_LAMBDA { unrolled<packs>([&](auto p) PK_LAMBDA { to[r * to_row + p] = sum[r][p]; }); });
}

// Columns of so many packs of the product.
template <int packs, class P>
void add_product_columns(Strided<Element<P>> a, int64_t rows, int64_t inner, const P* b, int64_t b_row, P* to,
                         int64_t to_row) {
  int64_t r = 0;
  const auto from = [&a](int64_t r) { return Strided<Element<P>>{a.value + r * a.row, a.row, a.column}; };
  for (; r + kTileRows <= rows; r += kTileRows) {
    add_product_tile<kTileRows, packs>(from(r), inner, b, b_row, to + r * to_row, to_row);
  }
  for (; r < rows; ++r) add_product_tile<1, packs>(from(r), inner, b, b_row, to + r * to_row, to_row);
}

// to += a b, (rows, packs) = (rows, inner) (inner, packs); b and `to` have so many packs from a row to the next.
template <class P>
void add_product(Strided<Element<P>> a, int64_t rows, int64_t inner, int64_t packs, const P* b, int64_t b_row, P* to,
                 int64_t to_row) {
  int64_t p = 0;
  for (; p + kTilePacks <= packs; p += kTilePacks) {
    add_product_columns<kTilePacks>(a, rows, inner, b + p, b_row, to + p, to_row);
  }
  unrolled_while<kTilePacks - 1>([&](auto less) PK_LAMBDA {
    constexpr int rest = kTilePacks - 1 - less;
    if (packs - p < rest) return true;
    add_product_columns<rest>(a, rows, inner, b + p, b_row, to + p, to_row);
    return false;
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
