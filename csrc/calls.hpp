// What the kernels of the CPU and of CUDA are called with.
#pragma once

#include <cstdint>

namespace po_kernels {

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
  int threads = 1;  // of the CPU
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

}  // namespace po_kernels
