// Normals, drawn by the threads of a warp.
#pragma once

#include "cuda/work.hpp"
#include "po_kernels/philox.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

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

}  // namespace PK_LEVEL
}  // namespace po_kernels
