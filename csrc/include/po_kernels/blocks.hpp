// Loops over blocks of samples and over tiles of matrices, whose values stay in registers.
//
// The samples of a row share what the row is made of: working on a few at a time, a number is read from memory once for
// all of them, and their sums do not wait for one another. Hence also the local copies below: what might have been
// written through another pointer would be read again.
#pragma once

#include <type_traits>
#include <utility>

#include "po_kernels/math.hpp"

namespace po_kernels {

constexpr int kBlock = 4;  // samples in a block

template <int N>
using Constant = std::integral_constant<int, N>;

inline namespace PK_LEVEL {

template <class Body, int... I>
PK_FN void unrolled_over(const Body& body, std::integer_sequence<int, I...>) {
  (body(Constant<I>{}), ...);
}
// body(Constant<0>{}), ..., body(Constant<N - 1>{}): arrays indexed by such constants need no memory.
template <int N, class Body>
PK_FN void unrolled(const Body& body) {
  unrolled_over(body, std::make_integer_sequence<int, N>{});
}

// The same as long as body returns true.
template <class Body, int... I>
PK_FN void unrolled_while_over(const Body& body, std::integer_sequence<int, I...>) {
  (void)(body(Constant<I>{}) && ...);
}
template <int N, class Body>
PK_FN void unrolled_while(const Body& body) {
  unrolled_while_over(body, std::make_integer_sequence<int, N>{});
}

// body(g, Constant<S>{}) for blocks of S samples g of [first, last), S being kBlock while there are as many, then 1.
template <class Body>
PK_FN void in_blocks(Index first, Index last, Body body) {
  Index g = first;
  for (; g + kBlock <= last; g += kBlock) body(g, Constant<kBlock>{});
  for (; g < last; ++g) body(g, Constant<1>{});
}

// A tile of the sum below: rows i..i+4, columns j..j+4, on the diagonal (i = j) its lower triangle.
template <int S, bool diagonal, class V, class R, class Rows>
PK_FN void add_outer_tile(Index dim, Index i, Index j, const V* left, const R* right, Rows row) {
  using P = Primal<V>;
  P tile[4][4];
  unrolled<4>([&](auto r) PK_LAMBDA {
    unrolled<diagonal ? r + 1 : 4>([&](auto c) PK_LAMBDA { tile[r][c] = row(i + r)[j + c]; });
  });
  unrolled<S>([&](auto s) PK_LAMBDA {
    const V* l = left + s * dim + i;
    const R* r = right + s * dim + j;
    unrolled<4>([&](auto a) PK_LAMBDA {
      unrolled<diagonal ? a + 1 : 4>([&](auto c) PK_LAMBDA {
        constexpr int at = a, to = c;
        tile[at][to] = tile[at][to] + output(l[at] * r[to]);
      });
    });
  });
  unrolled<4>([&](auto r) PK_LAMBDA {
    unrolled<diagonal ? r + 1 : 4>([&](auto c) PK_LAMBDA { row(i + r)[j + c] = tile[r][c]; });
  });
}

// row(i)[j] += Σ_s left[s][i] right[s][j] for first <= j <= i < dim; left and right are (S, dim).
template <int S, class V, class R, class Rows>
PK_FN void add_outer(Index dim, Index first, const V* left, const R* right, Rows row) {
  Index i = first;
  if constexpr (S > 1) {  // a sum of one term has nothing to keep in registers
    for (; i + 4 <= dim; i += 4) {
      for (Index j = first; j < i; j += 4) add_outer_tile<S, false>(dim, i, j, left, right, row);
      add_outer_tile<S, true>(dim, i, i, left, right, row);
    }
  }
  for (; i < dim; ++i) {
    Primal<V>* to = row(i);
    V factor[S];
    unrolled<S>([&](auto s) PK_LAMBDA { factor[s] = left[s * dim + i]; });
    for (Index j = first; j <= i; ++j) {
      Primal<V> sum = to[j];
      unrolled<S>([&](auto s) PK_LAMBDA { sum = sum + output(factor[s] * right[s * dim + j]); });
      to[j] = sum;
    }
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
