// Long sums. With u the unit roundoff, n numbers in one accumulator err by up to n u Σ|x|, and equal ones do. Here runs
// of kRun are added up as such, and what the accumulator of the runs rounds off goes with the next one (Kahan 1965;
// Higham, Accuracy and Stability of Numerical Algorithms, 4.3): at most (kRun + 3) u Σ|x|, and n / kRun u² Σ|x|.
#pragma once

#include "po_kernels/blocks.hpp"

namespace po_kernels {

constexpr int kRun = 32;
constexpr int kSampleRun = 256;  // samples in a run of sums that stand in memory, with 64 blocks in an accumulator

inline namespace PK_LEVEL {

template <class V>
struct Total {
  V sum{}, rest{};

  PK_FN void add(V x) {
    x = x + rest;
    const V total = sum + x;
    const V part = total - sum;
    rest = or_zero((sum - (total - part)) + (x - part));
    sum = total;
  }
  PK_FN V value() const { return sum + rest; }

  // Of inf nothing is rounded off, and the difference is nan.
  PK_FN static V or_zero(V x) {
    if constexpr (is_dual<V>) {
      return {Total<Primal<V>>::or_zero(x.v), Total<Primal<V>>::or_zero(x.t)};
    } else {
      return select(x == x, x, V{});
    }
  }
};

// total[n] = N sums of `count` terms: body(first, last, run) adds those in [first, last) to run[n].
template <class V, int N, class Body>
PK_FN void long_sums(Index count, V (&total)[N], Body body) {
#if defined(__CUDA_ARCH__)
  // What shared memory holds are some thousands, and registers are dear: no rest, and (kRun + n / kRun) u Σ|x|.
  V run[N];
  unrolled<N>([&](auto n) PK_LAMBDA { total[n] = run[n] = V{}; });
  _Pragma("unroll 1") for (Index i = 0; i < count; ++i) {
    body(i, i + 1, run);
    if (i % kRun < kRun - 1 && i < count - 1) continue;
    unrolled<N>([&](auto n) PK_LAMBDA {
      total[n] = total[n] + run[n];
      run[n] = V{};
    });
  }
#else
  Total<V> totals[N];
  for (Index first = 0; first < count; first += kRun) {
    V run[N];
    unrolled<N>([&](auto n) PK_LAMBDA { run[n] = V{}; });
    body(first, first + kRun < count ? first + kRun : count, run);
    if (count <= kRun) {
      unrolled<N>([&](auto n) PK_LAMBDA { total[n] = run[n]; });
      return;
    }
    unrolled<N>([&](auto n) PK_LAMBDA { totals[n].add(run[n]); });
  }
  unrolled<N>([&](auto n) PK_LAMBDA { total[n] = totals[n].value(); });
#endif
}

// term(0) + ... + term(count - 1), each called once and in that order.
template <class V, class Term>
PK_FN V long_sum(Index count, Term term) {
  V total[1];
  long_sums(count, total, [&](Index first, Index last, V(&run)[1]) PK_LAMBDA {
    for (Index i = first; i < last; ++i) run[0] = run[0] + term(i);
  });
  return total[0];
}

// Terms that are added up in a row of products before their sum goes to the others: n of them err by at most
// (kRowRun + n / kRowRun) u Σ|x|.
constexpr Index kRowRun = 128;

// Adds to the sums of R rows and S vectors what add(begin, end, run) adds to run[r][s] for products [begin, end). On a
// device, where what shared memory holds are some hundreds and registers are dear, there are no runs.
template <bool runs = true, int R, int S, class V, class Add>
PK_FN void row_sums(Index first, Index end, V (&sums)[R][S], Add add) {
#if !defined(__CUDA_ARCH__)
  for (; runs && end - first > kRowRun; first += kRowRun) {
    V run[R][S];
    unrolled<R>([&](auto r) PK_LAMBDA { unrolled<S>([&](auto s) PK_LAMBDA { run[r][s] = V{}; }); });
    add(first, first + kRowRun, run);
    unrolled<R>([&](auto r) PK_LAMBDA { unrolled<S>([&](auto s) PK_LAMBDA { sums[r][s] = sums[r][s] + run[r][s]; }); });
  }
#endif
  add(first, end, sums);
}

// body(whether rows of so many products have runs), for rows that are so short that asking each takes a tenth of them.
template <class Body>
PK_FN void rows_in_runs(Index count, Body body) {
#if !defined(__CUDA_ARCH__)
  if (count > kRowRun) return body(std::true_type{});
#endif
  body(std::false_type{});
}

// Numbers that are summed over samples, null if not wanted.
template <class P>
struct Summed {
  P* to;
  Index size;
};
template <class V>
PK_FN Summed<Primal<V>> summed(V* to, Index size) {
  return {reinterpret_cast<Primal<V>*>(to), to == nullptr ? 0 : size * Index(sizeof(V) / sizeof(Primal<V>))};
}

// Scratch of the sum below, for so many numbers.
PK_FN Index run_work(Index count, Index size) {
  return count > kSampleRun ? 2 * size : 0;
}

// Adds to all numbers of `sums` what body(first, last, to) adds to those at to[0], to[1], ... for samples [first,
// last), in runs of kSampleRun where these are not all.
template <class P, int N, class Body>
PK_FN void in_sample_runs(Index count, const Summed<P> (&sums)[N], P* scratch, Body body) {
  const bool all = count <= kSampleRun;
  P* to[N];
  for (int n = 0; n < N; ++n) {
    to[n] = all || sums[n].to == nullptr ? sums[n].to : scratch;
    for (Index i = 0; !all && i < 2 * sums[n].size; ++i) *scratch++ = P{};
  }
  for (Index first = 0; first < count; first += kSampleRun) {
    body(first, all ? count : first + kSampleRun < count ? first + kSampleRun : count, to);
    if (all) return;
    const bool last = first + kSampleRun >= count;
    for (int n = 0; n < N; ++n) {
      P* rest = to[n] + sums[n].size;
      for (Index i = 0; i < sums[n].size; ++i) {
        Total<P> total{sums[n].to[i], rest[i]};
        total.add(to[n][i]);
        sums[n].to[i] = last ? total.value() : total.sum;
        rest[i] = total.rest;
        to[n][i] = P{};
      }
    }
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
