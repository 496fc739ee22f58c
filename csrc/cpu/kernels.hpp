// The CPU kernels as the bindings see them: one table of functions for each instruction-set level.
#pragma once

#include <cstdint>

#include "calls.hpp"

namespace po_kernels {

// Refusals of values, numbered as in po_kernels/backends/contract.py.
enum Refusal : int {
  kAccepted = 0,
  kPrecisionNotPositive = 1,
  kPrecisionNotSymmetric = 2,
  kLabelOutOfRange = 3,
  kAllMasked = 4,
  kNotTriangular = 5,
  kSingular = 6,
  kLabelMasked = 7,
  kLogitsNotFinite = 8,
};

// MATRIX_TOLERANCE of contract.py.
constexpr double kMatrixTolerance = 1e-4;

struct Verdict {
  int code = kAccepted;
  int64_t row = 0;
};

// clang-format off
#define PK_FOR_EACH_KERNEL(do)                                                                 \
  do(gaussian_policy_loss, GaussianPolicyLoss) do(gaussian_surrogate_loss, GaussianSurrogateLoss) \
  do(gaussian_log_prob, GaussianLogProb) do(gaussian_sample, GaussianSample)                   \
  do(mvn_policy_loss, GaussianPolicyLoss) do(mvn_surrogate_loss, GaussianSurrogateLoss)        \
  do(mvn_log_prob, GaussianLogProb) do(mvn_sample, GaussianSample)                             \
  do(categorical_policy_loss, CategoricalPolicyLoss)                                           \
  do(categorical_surrogate_loss, CategoricalSurrogateLoss)                                     \
  do(categorical_log_prob, CategoricalLogProb) do(categorical_sample, CategoricalSample)       \
  do(group_advantage, GroupAdvantage)
// clang-format on

struct KernelTable {
  const char* level;
#define PK_MEMBER(name, type) Verdict (*name)(const type&);
  PK_FOR_EACH_KERNEL(PK_MEMBER)
#undef PK_MEMBER
};

// The level for this processor, or the one that the environment variable PO_KERNELS_SIMD names.
// Throws std::runtime_error for a level that is unknown, not built, or not supported here.
const KernelTable& kernels();

}  // namespace po_kernels
