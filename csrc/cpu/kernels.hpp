// The CPU kernels as the bindings see them: one table of functions for each instruction-set level.
#pragma once

#include <cstdint>

namespace po_kernels {

// Refusals of values, numbered as in po_kernels/backends/contract.py.
enum Refusal : int {
  kAccepted = 0,
  kPrecisionNotPositive = 1,
  kPrecisionNotSymmetric = 2,
  kLabelOutOfRange = 3,
  kAllMasked = 4,
};

struct Verdict {
  int code = kAccepted;
  int64_t row = 0;
};

enum Reduction : int { kMeanOverRows = 0, kSumOverRows = 1, kNoReduction = 2 };

// A (rows, columns) input whose columns are contiguous. A tangent is contiguous as a whole, null for zero.
struct RowInput {
  const void* value = nullptr;
  int64_t stride = 0;
  const void* tangent = nullptr;
};

struct SharedInput {
  const void* value = nullptr;
  const void* tangent = nullptr;
};

// What every loss kernel takes. With `dual` it puts out the derivative of the loss and of the gradients in the
// direction of the tangents, else these themselves. Outputs are contiguous, null if not wanted.
struct LossCall {
  bool is_double = false;
  bool dual = false;
  int64_t rows = 0;
  int reduction = kMeanOverRows;
  int estimator = 0;
  int advantage = 0;
  int64_t samples = 0;
  double entropy_coef = 0.0;
  bool has_rbf = false;
  double rbf_gamma = 0.0;
  uint64_t seed = 0;
  uint64_t row_offset = 0;
  int threads = 1;
  SharedInput cotangent;  // of one, or of `rows` elements with kNoReduction; null value for ones
  void* loss = nullptr;   // one element, or rows
  void* stats = nullptr;  // (5) or (5, rows)
};

struct GaussianPolicyLoss : LossCall {
  int64_t dim = 0;
  int precision_kind = 0;
  RowInput mean, log_std, target;
  SharedInput precision;
  void *grad_mean = nullptr, *grad_log_std = nullptr, *grad_target = nullptr, *grad_precision = nullptr;
};

struct CategoricalPolicyLoss : LossCall {
  int64_t classes = 0;
  RowInput logits;
  const int64_t* target = nullptr;
  SharedInput table;
  void *grad_logits = nullptr, *grad_table = nullptr;
};

struct KernelTable {
  const char* level;
  Verdict (*gaussian_policy_loss)(const GaussianPolicyLoss&);
  Verdict (*categorical_policy_loss)(const CategoricalPolicyLoss&);
};

// The level for this processor, or the one that the environment variable PO_KERNELS_SIMD names.
// Throws std::runtime_error for a level that is unknown, not built, or not supported here.
const KernelTable& kernels();

}  // namespace po_kernels
