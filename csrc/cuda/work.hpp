// How the rows of a call are shared out, as far as a kernel has to know it.
//
// The threads of a warp take the samples of a row, then the entries of what is summed over them. All that they share is
// in shared memory: the row's policy, its group, and as many of its samples at a time as `held` says. Where these are
// not all, the second pass over them draws or reads them again.
#pragma once

#include "cuda/cuda.hpp"
#include "cuda/warp.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

constexpr int kTile = 4;  // entries of a vector, and of a matrix to a side, that a thread takes at once

PK_FN int whole_tiles(int64_t dim) {
  return (int(dim) + kTile - 1) / kTile * kTile;
}
PK_FN int tiles_of(int64_t dim) {
  const int side = whole_tiles(dim) / kTile;
  return side * (side + 1) / 2;
}

// Number of a triangle's entry, row by row, to its row and column.
PK_FN void corner(int number, int& i, int& j) {
  i = int((square_root_of_normal(float(8 * number + 1)) - 1.0f) * 0.5f);  // exact: below 2^21
  j = number - i * (i + 1) / 2;
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
  CudaLaunch launch;
  int warps = 1;         // of a block
  int held = 0;          // samples
  int shared_bytes = 0;  // of shared memory, what the block shares
  int warp_bytes = 0;    // after it, of each warp
  int of_block[4] = {};  // where what they hold begins
  int of_warp[16] = {};
  Shape shape{1, 1};

  PK_FN int64_t step() const { return launch.blocks * warps; }  // between the rows of a warp
  PK_FN uint64_t seed() const { return uint64_t(launch.device_seed ? *launch.device_seed : call.seed); }
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

}  // namespace PK_LEVEL
}  // namespace po_kernels
