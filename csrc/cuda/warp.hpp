// The threads that share a row, a warp, and those that share a block's memory; and both on the host, which runs the
// same kernels without a GPU.
//
// Kernels are written from the view of a whole warp: what lies outside the bodies of each, fold and sum is the same in
// all its threads. Hence the host needs one pass through that code, and runs the bodies one after another, in either
// order: a body that reads what another one of the same call writes then gives other results. Sums are added up in the
// order of the device.
#pragma once

#include "po_kernels/several.hpp"
#include "po_kernels/team.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

constexpr int kLanes = 32;

// Of a loop with few passes on the device.
#if defined(__CUDACC__)
#define PK_ROLLED _Pragma("unroll 1")
#else
#define PK_ROLLED
#endif

// On the host, runs the bodies of each from the last to the first.
enum class Order { forward, backward };

template <class Body>
inline void in_order(Order order, int64_t count, Body body) {
  for (int64_t i = 0; i < count; ++i) body(order == Order::forward ? i : count - 1 - i);
}

#if defined(__CUDACC__)
// The value of another thread: at this one's number with these bits changed, or so many further on.
enum class Exchange { across, down };

template <Exchange how, class V>
__device__ __forceinline__ V exchanged(V x, int by) {
  return how == Exchange::across ? __shfl_xor_sync(0xffffffffu, x, by) : __shfl_down_sync(0xffffffffu, x, by);
}
template <Exchange how, class V>
__device__ __forceinline__ Dual<V> exchanged(Dual<V> x, int by) {
  return {exchanged<how>(x.v, by), exchanged<how>(x.t, by)};
}
template <Exchange how, class V, int M>
__device__ __forceinline__ Several<V, M> exchanged(const Several<V, M>& x, int by) {
  Several<V, M> y;
  unrolled<M>([&](auto i) { y.v[i] = exchanged<how>(x.v[i], by); });
  return y;
}
#endif

// Quotients of i by a divisor, without a division, where i times the divisor is below 2^31.
struct Divider {
  uint32_t factor;

  PK_FN explicit Divider(int divisor) : factor((uint32_t(1) << 31) / uint32_t(divisor) + (divisor > 1)) {}
  PK_FN int quotient(int i) const {
    uint32_t high, low;
    multiply_wide(uint32_t(i) * 2, factor, high, low);
    return int(high);
  }
};

// How a warp takes `count` sums: where there are fewer than threads, each is shared out as parts.
struct Shares {
  int count, parts;
  Divider by_count;

  PK_FN explicit Shares(int count)
      : count(count), parts(count < kLanes ? kLanes / (count > 0 ? count : 1) : 1), by_count(count > 0 ? count : 1) {}
};

struct Warp {
  Order order;

  template <class Body>
  PK_FN void each(int64_t count, Body body) const {
#if defined(__CUDA_ARCH__)
    PK_ROLLED
    for (int i = int(threadIdx.x) % kLanes; i < int(count); i += kLanes) body(i);
    __syncwarp();
#else
    in_order(order, count, body);
#endif
  }

  template <class V, class Term, class Combine>
  PK_FN V fold(int64_t count, V start, Term term, Combine combine) const {
#if defined(__CUDA_ARCH__)
    V mine = start;
    PK_ROLLED
    for (int i = int(threadIdx.x) % kLanes; i < int(count); i += kLanes) mine = combine(mine, term(i));
    __syncwarp();
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      mine = combine(mine, exchanged<Exchange::across>(mine, offset));
    }
    return mine;
#else
    V of_lane[kLanes], next[kLanes];
    for (V& mine : of_lane) mine = start;
    in_order(order, kLanes, [&](int64_t l) {
      for (int64_t i = l; i < count; i += kLanes) of_lane[l] = combine(of_lane[l], term(i));
    });
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      for (int l = 0; l < kLanes; ++l) next[l] = combine(of_lane[l], of_lane[l ^ offset]);
      for (int l = 0; l < kLanes; ++l) of_lane[l] = next[l];
    }
    return of_lane[0];
#endif
  }

  template <class V, class Term>
  PK_FN V sum(int64_t count, Term term) const {
    return fold<V>(count, V{}, term, [](V a, V b) PK_LAMBDA { return a + b; });
  }

  // body(i, Constant<n>{}) for i, i + kLanes, ... below i + n kLanes: n is S, and the last of them may then be count or
  // more, or 1 where no more than kLanes are left, unless that is not worth a second copy of the body.
  template <int S, bool always = false, class Body>
  PK_FN void many(int count, Body body) const {
    static_assert(S <= 2, "of more than 32 and fewer than 32 S left, body would be called for 32 alone");
    constexpr int least = S == 1 || always ? 0 : kLanes * (S - 1);
    int begin = 0;
#if defined(__CUDA_ARCH__)
    const int lane = int(threadIdx.x) % kLanes;
    PK_ROLLED
    for (; begin + least < count; begin += S * kLanes) {
      if ((S > 1 && !always) || begin + lane < count) body(begin + lane, Constant<S>{});
    }
    if constexpr (S > 1 && !always) {
      if (begin + lane < count) body(begin + lane, Constant<1>{});
    }
    __syncwarp();
#else
    const auto lanes = [&](auto number) {
      in_order(order, count - begin < kLanes ? count - begin : kLanes,
               [&](int64_t l) { body(begin + int(l), number); });
    };
    for (; begin + least < count; begin += S * kLanes) lanes(Constant<S>{});
    if (begin < count) lanes(Constant<1>{});
#endif
  }

  // store(i, Σ_part term(i, part, parts)) for all i of `shares`.
  template <class V, class Term, class Store>
  PK_FN void sums(const Shares& shares, Term term, Store store) const {
    const int count = shares.count, parts = shares.parts;
#if defined(__CUDA_ARCH__)
    const int lane = int(threadIdx.x) % kLanes, part = parts > 1 ? shares.by_count.quotient(lane) : 0;
    PK_ROLLED
    for (int begin = 0; begin < count; begin += kLanes) {
      const int i = begin + lane - part * count;
      const bool busy = i < count && part < parts;
      V sum{};
      if (busy) sum = term(i, part, parts);
      PK_ROLLED
      for (int left = parts; left > 1;) {
        const int half = (left + 1) / 2;
        const V other = exchanged<Exchange::down>(sum, half * count);
        if (part + half < left) sum = sum + other;
        left = half;
      }
      if (busy && part == 0) store(i, sum);
    }
    __syncwarp();
#else
    in_order(order, count, [&](int64_t i) {
      V of_part[kLanes];
      for (int part = 0; part < parts; ++part) of_part[part] = term(int(i), part, parts);
      for (int left = parts; left > 1;) {
        const int half = (left + 1) / 2;
        for (int part = 0; part + half < left; ++part) of_part[part] = of_part[part] + of_part[part + half];
        left = half;
      }
      store(int(i), of_part[0]);
    });
#endif
  }
};

// All threads of a block.
struct Block {
  Order order;

  template <class Body>
  PK_FN void each(int64_t count, Body body) const {
#if defined(__CUDA_ARCH__)
    PK_ROLLED
    for (int i = int(threadIdx.x); i < int(count); i += int(blockDim.x)) body(i);
    __syncthreads();
#else
    in_order(order, count, body);
#endif
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
