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

enum Reduction : int { kMeanOverRows = 0, kSumOverRows = 1, kNoReduction = 2 };

// A contiguous input and its tangent; null for what is absent, and a null tangent is zero.
struct Input {
  const void* value = nullptr;
  const void* tangent = nullptr;
};

// A (rows, columns) input, whose rows may be strided while its tangent is contiguous.
struct RowInput : Input {
  int64_t stride = 0;
};

// What every kernel takes. With `dual` it puts out the derivatives, in the direction of the tangents, of what it
// puts out without. All outputs are contiguous, and null if not wanted.
struct Call {
  bool is_double = false;
  bool dual = false;
  int64_t rows = 0;
  int threads = 1;
};

struct LossCall : Call {
  int reduction = kMeanOverRows;
  int estimator = 0;
  int advantage = 0;
  int64_t samples = 0;
  double entropy_coef = 0.0;
  bool has_rbf = false;
  double rbf_gamma = 0.0;
  Input cotangent;        // of one element, or `rows` with kNoReduction; null for ones
  void* loss = nullptr;   // likewise
  void* stats = nullptr;  // (5) or (5, rows)
};

struct RandomNumbers {
  uint64_t seed = 0;
  uint64_t row_offset = 0;
};

// Both Gaussians: `scale` holds dim logarithms of standard deviations, or a lower triangular (dim, dim).
struct GaussianPolicyLoss : LossCall, RandomNumbers {
  int64_t dim = 0;
  int precision_kind = 0;
  RowInput mean, scale, target;
  Input precision;
  void *grad_mean = nullptr, *grad_scale = nullptr, *grad_target = nullptr, *grad_precision = nullptr;
};

struct GaussianSurrogateLoss : LossCall {
  int64_t dim = 0;
  RowInput mean, scale;
  Input rewards;                // (samples, rows)
  const void* given = nullptr;  // (samples, rows, dim)
  void *grad_mean = nullptr, *grad_scale = nullptr, *grad_rewards = nullptr;
};

struct GaussianLogProb : Call {
  int64_t dim = 0;
  int64_t count = 0;
  RowInput mean, scale;
  Input value;          // (count, rows, dim)
  Input cotangent;      // (count, rows)
  void* out = nullptr;  // (count, rows)
  void *grad_mean = nullptr, *grad_scale = nullptr, *grad_value = nullptr;
};

struct GaussianSample : Call, RandomNumbers {
  int64_t dim = 0;
  int64_t samples = 0;
  RowInput mean, scale;
  Input cotangent;      // (samples, rows, dim)
  void* out = nullptr;  // (samples, rows, dim)
  void *grad_mean = nullptr, *grad_scale = nullptr;
};

struct CategoricalPolicyLoss : LossCall, RandomNumbers {
  int64_t classes = 0;
  RowInput logits;
  Input reward_table;               // (classes, classes)
  const int64_t* target = nullptr;  // (rows)
  void *grad_logits = nullptr, *grad_reward_table = nullptr;
};

struct CategoricalSurrogateLoss : LossCall {
  int64_t classes = 0;
  RowInput logits;
  Input rewards;                   // (samples, rows)
  const int64_t* given = nullptr;  // (samples, rows)
  void *grad_logits = nullptr, *grad_rewards = nullptr;
};

struct CategoricalLogProb : Call {
  int64_t classes = 0;
  int64_t count = 0;
  RowInput logits;
  const int64_t* value = nullptr;  // (count, rows)
  Input cotangent;                 // (count, rows)
  void* out = nullptr;             // (count, rows)
  void* grad_logits = nullptr;
};

struct CategoricalSample : Call, RandomNumbers {
  int64_t classes = 0;
  int64_t samples = 0;
  RowInput logits;
  int64_t* out = nullptr;  // (samples, rows)
};

struct GroupAdvantage : Call {
  int advantage = 0;
  bool has_rbf = false;
  double rbf_gamma = 0.0;
  int64_t samples = 0;
  Input rewards;        // (samples, rows)
  Input cotangent;      // (samples, rows)
  void* out = nullptr;  // (samples, rows)
  void* grad_rewards = nullptr;
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
