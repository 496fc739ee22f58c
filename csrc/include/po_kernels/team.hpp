// Who runs a loop: one thread alone, or the threads of a warp side by side (csrc/cuda/warp.hpp).
//
// A team has
//   each(count, body)                   body(i) for all i < count, in any order: none may read what another writes
//   fold(count, start, term, combine)   term(0), ..., term(count - 1) combined in a fixed order, from `start` on,
//                                       which combined with itself is itself
//   sum<V>(count, term)                 their sum
// All threads of a team call these, with the same arguments, and all get the same results.
#pragma once

#include "po_kernels/sums.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

struct Alone {
  template <class Body>
  PK_FN void each(int64_t count, Body body) const {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
  template <class V, class Term, class Combine>
  PK_FN V fold(int64_t count, V start, Term term, Combine combine) const {
    for (int64_t i = 0; i < count; ++i) start = combine(start, term(i));
    return start;
  }
  template <class V, class Term>
  PK_FN V sum(int64_t count, Term term) const {
    return long_sum<V>(Index(count), term);
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
