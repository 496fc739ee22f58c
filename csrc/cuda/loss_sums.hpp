// What a loss sums over rows: by a warp, by a block, then over blocks, in double and in a fixed order.
#pragma once

#include "cuda/work.hpp"
#include "po_kernels/precision.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Sums of a block of rows: the loss, the five statistics, then the gradient in the precision, of one number as of a
// diagonal.
constexpr int64_t kHead = 6;

PK_FN int64_t summed_terms(int precision_ndim, int64_t dim) {
  return precision_ndim == kFull ? dim * (dim + 1) / 2 : dim;
}

// Of these, what a block puts out: for a U of one number, their sum.
PK_FN int64_t stored_terms(int precision_ndim, int64_t terms) {
  return precision_ndim == kScalar && terms > 0 ? 1 : terms;
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
  int precision_ndim;
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
    if (precision_ndim != kFull) {
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
