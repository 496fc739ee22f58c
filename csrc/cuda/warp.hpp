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
template <class V>
__device__ __forceinline__ V shuffled(V x, int offset) {
  return __shfl_xor_sync(0xffffffffu, x, offset);
}
template <class V>
__device__ __forceinline__ Dual<V> shuffled(Dual<V> x, int offset) {
  return {shuffled(x.v, offset), shuffled(x.t, offset)};
}
template <class V, int M>
__device__ __forceinline__ Several<V, M> shuffled(const Several<V, M>& x, int offset) {
  Several<V, M> y;
  unrolled<M>([&](auto i) { y.v[decltype(i)::value] = shuffled(x.v[decltype(i)::value], offset); });
  return y;
}
#endif

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
    for (int offset = kLanes / 2; offset > 0; offset /= 2) mine = combine(mine, shuffled(mine, offset));
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

  // store(i, Σ_part term(i, part, parts)) for i < count, of which few are shared out as parts.
  template <class V, class Term, class Store>
  PK_FN void sums(int64_t count, Term term, Store store) const {
    int parts = 1;
    while (count * parts * 2 <= kLanes) parts *= 2;
#if defined(__CUDA_ARCH__)
    const int width = kLanes / parts, lane = int(threadIdx.x) % kLanes;
    PK_ROLLED
    for (int begin = 0; begin < int(count); begin += width) {
      const int i = begin + lane % width;
      V sum{};
      if (i < int(count)) sum = term(i, lane / width, parts);
      PK_ROLLED
      for (int offset = width; offset < kLanes; offset *= 2) sum = sum + shuffled(sum, offset);
      if (i < int(count) && lane < width) store(i, sum);
    }
    __syncwarp();
#else
    in_order(order, count, [&](int64_t i) {
      V of_part[kLanes];
      for (int part = 0; part < parts; ++part) of_part[part] = term(i, part, parts);
      for (int offset = 1; offset < parts; offset *= 2) {
        for (int part = 0; part < parts; part += 2 * offset) of_part[part] = of_part[part] + of_part[part + offset];
      }
      store(i, of_part[0]);
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
