// The kernels, and what each of them is called with on the CPU and by CUDA.
//
// PK_FIELDS names the bases of a struct and its members: these names are the keyword arguments of the Python function
// that fill them (csrc/bindings/arguments.hpp), an input `x` taking `x`, `x_tangent`, `grad_x` and, with rows,
// `x_stride`.
#pragma once

#include <cstdint>
#include <utility>

#include "po_kernels/group.hpp"

#define PK_NAMED(...) #__VA_ARGS__, __VA_ARGS__
#define PK_FIELDS(bases, ...)                                     \
  template <class Visitor>                                        \
  void fields(Visitor& visit) {                                   \
    fields_of(*this, visit, static_cast<void(*) bases>(nullptr)); \
    visit(PK_NAMED(__VA_ARGS__));                                 \
  }

namespace po_kernels {

template <class Struct, class Visitor, class... Bases>
void fields_of(Struct& all, Visitor& visit, void (*)(Bases...)) {
  (static_cast<Bases&>(all).fields(visit), ...);
}

enum Reduction : int { kMeanOverRows = 0, kSumOverRows = 1, kNoReduction = 2 };
constexpr std::pair<const char*, int> kReductions[] = {
    {"mean", kMeanOverRows}, {"sum", kSumOverRows}, {"none", kNoReduction}};

// A contiguous tensor and its tangent; null for what is absent, and a null tangent is zero.
struct Input {
  const void* value = nullptr;
  const void* tangent = nullptr;
};

// With its gradient, which is contiguous like all outputs, and null if not wanted.
struct Differentiable : Input {
  void* gradient = nullptr;
};

// (rows, columns), whose rows may be strided while its tangent is contiguous.
struct RowInput : Differentiable {
  int64_t stride = 0;
};

// What every kernel takes. With `dual` it puts out the derivatives, in the direction of the tangents, of what it
// puts out without.
struct Call {
  bool is_double = false;
  bool dual = false;
  int64_t rows = 0;
  int threads = 1;  // of the CPU

  template <class Visitor>
  void fields(Visitor& visit) {
    visit(PK_NAMED(is_double, dual, rows));
    visit.optional(PK_NAMED(threads));
  }
};

struct LossCall : Call, Surrogate {
  int reduction = kMeanOverRows;
  Input cotangent;        // of one element, or `rows` with kNoReduction; null for ones
  void* out = nullptr;    // likewise
  void* stats = nullptr;  // (5) or (5, rows)

  PK_FIELDS((Call), reduction, estimator, advantage, num_samples, entropy_coef, rbf_gamma, cotangent, out, stats)
};

struct RandomNumbers {
  int64_t seed = 0;
  uint64_t row_offset = 0;

  PK_FIELDS((), seed, row_offset)
};

// Both Gaussians: `scale` holds dim logarithms of standard deviations, or a lower triangular (dim, dim).
struct GaussianPolicy {
  int64_t dim = 0;
  RowInput mean, scale;

  PK_FIELDS((), dim, mean, scale)
};

struct GaussianPolicyLoss : LossCall, RandomNumbers, GaussianPolicy {
  int precision_ndim = 0;
  RowInput target;
  Differentiable precision;

  PK_FIELDS((LossCall, RandomNumbers, GaussianPolicy), precision_ndim, target, precision)
};

struct GaussianSurrogateLoss : LossCall, GaussianPolicy {
  Differentiable rewards;         // (num_samples, rows)
  const void* samples = nullptr;  // (num_samples, rows, dim)

  PK_FIELDS((LossCall, GaussianPolicy), rewards, samples)
};

struct GaussianLogProb : Call, GaussianPolicy {
  int64_t count = 0;
  Differentiable value;  // (count, rows, dim)
  Input cotangent;       // (count, rows)
  void* out = nullptr;   // (count, rows)

  PK_FIELDS((Call, GaussianPolicy), count, value, cotangent, out)
};

struct GaussianSample : Call, RandomNumbers, GaussianPolicy {
  int64_t num_samples = 0;
  Input cotangent;      // (num_samples, rows, dim)
  void* out = nullptr;  // (num_samples, rows, dim)

  PK_FIELDS((Call, RandomNumbers, GaussianPolicy), num_samples, cotangent, out)
};

struct CategoricalPolicyLoss : LossCall, RandomNumbers {
  int64_t classes = 0;
  RowInput logits;
  Differentiable reward_table;      // (classes, classes)
  const int64_t* target = nullptr;  // (rows)

  PK_FIELDS((LossCall, RandomNumbers), classes, logits, reward_table, target)
};

struct CategoricalSurrogateLoss : LossCall {
  int64_t classes = 0;
  RowInput logits;
  Differentiable rewards;            // (num_samples, rows)
  const int64_t* samples = nullptr;  // (num_samples, rows)

  PK_FIELDS((LossCall), classes, logits, rewards, samples)
};

struct CategoricalLogProb : Call {
  int64_t classes = 0;
  int64_t count = 0;
  RowInput logits;
  const int64_t* value = nullptr;  // (count, rows)
  Input cotangent;                 // (count, rows)
  void* out = nullptr;             // (count, rows)

  PK_FIELDS((Call), classes, count, logits, value, cotangent, out)
};

struct CategoricalSample : Call, RandomNumbers {
  int64_t classes = 0;
  int64_t num_samples = 0;
  RowInput logits;
  int64_t* out = nullptr;  // (num_samples, rows)

  PK_FIELDS((Call, RandomNumbers), classes, num_samples, logits, out)
};

struct TokenLogProb : Call {
  int half = 0;  // the logits, their tangent and gradient are bfloat16 (1), float16 (2), or as `is_double` says
  int64_t classes = 0;
  double temperature = 1;
  MaybeNumber softcap;
  RowInput logits;
  const int64_t* token_ids = nullptr;  // (rows)
  const void* known = nullptr;         // `out` of the same call, or null
  Input cotangent;                     // (6, rows)
  void* out = nullptr;                 // (6, rows): log-probability, entropy, log-sum-exp, and what `known` is for

  PK_FIELDS((Call), half, classes, temperature, softcap, logits, token_ids, known, cotangent, out)
};

struct GroupAdvantage : Call {
  int advantage = 0;
  MaybeNumber rbf_gamma;
  int64_t num_samples = 0;
  Differentiable rewards;  // (num_samples, rows)
  Input cotangent;         // (num_samples, rows)
  void* out = nullptr;     // (num_samples, rows)

  PK_FIELDS((Call), advantage, rbf_gamma, num_samples, rewards, cotangent, out)
};

// How a step of an episode ended: not at all, or in a state without a value, or cut off before a state that has one.
enum Ended : uint8_t { kGoesOn = 0, kTerminated = 1, kTruncated = 2 };

struct Gae : Call {
  int64_t steps = 0, states = 0;   // states: one more than steps
  Differentiable rewards, values;  // (steps, rows) and (states, rows)
  const uint8_t* dones = nullptr;  // (steps, rows) of Ended
  const double *gamma = nullptr, *lam = nullptr;
  Input cotangent;      // (steps, rows)
  void* out = nullptr;  // (steps, rows)

  PK_FIELDS((Call), steps, states, rewards, values, dones, gamma, lam, cotangent, out)
};

enum Head : int { kGaussianHead = 0, kMvnHead = 1, kCategoricalHead = 2 };
constexpr std::pair<const char*, int> kHeads[] = {
    {"gaussian", kGaussianHead}, {"mvn", kMvnHead}, {"categorical", kCategoricalHead}};

enum Activation : int { kTanh = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3 };
constexpr std::pair<const char*, int> kActivations[] = {
    {"tanh", kTanh}, {"relu", kRelu}, {"gelu", kGelu}, {"gelu_tanh", kGeluTanh}};

// What the spread of a Gaussian is made of: log σ, the logit of where it stands between two bounds, or the logarithms
// of a triangular factor's diagonal and what is below it.
enum Spread : int { kLogStd = 0, kBounded = 1, kTriangular = 2 };
constexpr std::pair<const char*, int> kSpreads[] = {
    {"log_std", kLogStd}, {"bounded", kBounded}, {"triangular", kTriangular}};

enum Rule : int { kNoStep = 0, kAdam = 1, kAdamW = 2, kSgd = 3 };
constexpr std::pair<const char*, int> kRules[] = {{"none", kNoStep}, {"adam", kAdam}, {"adamw", kAdamW}, {"sgd", kSgd}};

// Linear layers with an activation between them, and what makes a distribution of their outputs. Parameters are
// numbered: weight (out, in) and bias (out) of each layer, whose address may be null, of the network of the mean or the
// logits, then those of the spread's network, or what it is made of where it is the same for all rows.
struct Network {
  int head = kGaussianHead, activation = kTanh, spread = kLogStd;
  double lowest = 0, highest = 0;  // of a bounded log σ
  int64_t depth = 0, spread_depth = 0;
  const int64_t *widths = nullptr, *spread_widths = nullptr;  // (depth + 1)

  PK_FIELDS((), head, activation, spread, lowest, highest, depth, spread_depth, widths, spread_widths)
};

// A step of an optimiser, as torch.optim has them; the state of parameter i is at first[i] and second[i].
struct Optimizer {
  int rule = kNoStep, nesterov = 0;
  double beta1 = 0, beta2 = 0, epsilon = 0, weight_decay = 0, momentum = 0, dampening = 0;
  double max_norm = 0;            // of a gradient, 0 for any
  int64_t steps_before = 0;       // of Adam
  const double* rates = nullptr;  // (steps)
  const int64_t *first = nullptr, *second = nullptr;

  PK_FIELDS((), rule, nesterov, beta1, beta2, epsilon, weight_decay, momentum, dampening, max_norm, steps_before, rates,
            first, second)
};

// The policy loss of a network, or without a reward its negative log-likelihood, and its gradient, for `steps` batches
// one after the other with a step of the optimiser after each.
struct NetworkLoss : Call, Surrogate, Network, Optimizer {
  int64_t dim = 0, observations = 1;
  int precision_ndim = 0;
  double l2 = 0;                 // (l2/2) ‖parameters‖² is added
  const void* inputs = nullptr;  // (rows, in)
  const void* target = nullptr;  // (observations, rows, dim), or labels (observations, rows)
  Differentiable reward;         // the precision, or a table (dim, dim)
  int64_t steps = 1;
  const int64_t* batch_rows = nullptr;  // (steps)
  const int64_t* index = nullptr;       // rows of the batches, all together; null for all rows each time
  const int64_t* seeds = nullptr;       // (steps)
  const int64_t *values = nullptr, *tangents = nullptr, *gradients = nullptr;  // an address for each parameter
  double *losses = nullptr, *norms = nullptr;                                  // (steps)
  int64_t* done = nullptr;                                                     // the steps before a refusal

  PK_FIELDS((Call, Network, Optimizer), dim, observations, precision_ndim, l2, inputs, target, reward, steps,
            batch_rows, index, seeds, values, tangents, gradients, losses, norms, done, estimator, advantage,
            num_samples, entropy_coef, rbf_gamma)
};

// Every kernel and what it is called with: `both` for one that CUDA has too, `cpu` for one that only the CPU has.
#define PK_GAUSSIAN_KERNELS(both, cpu, family)                                                        \
  both(family##_policy_loss, GaussianPolicyLoss) both(family##_surrogate_loss, GaussianSurrogateLoss) \
      both(family##_log_prob, GaussianLogProb) both(family##_sample, GaussianSample)
#define PK_KERNELS(both, cpu)                                                                                   \
  PK_GAUSSIAN_KERNELS(both, cpu, gaussian)                                                                      \
  PK_GAUSSIAN_KERNELS(both, cpu, mvn)                                                                           \
  cpu(categorical_policy_loss, CategoricalPolicyLoss) cpu(categorical_surrogate_loss, CategoricalSurrogateLoss) \
      cpu(categorical_log_prob, CategoricalLogProb) cpu(categorical_sample, CategoricalSample)                  \
          cpu(token_log_prob, TokenLogProb) cpu(group_advantage, GroupAdvantage) cpu(gae, Gae)                  \
              cpu(network_loss, NetworkLoss)
#define PK_NO_KERNEL(name, type)
#define PK_FOR_EACH_KERNEL(do) PK_KERNELS(do, do)
#define PK_FOR_EACH_CUDA_KERNEL(do) PK_KERNELS(do, PK_NO_KERNEL)

}  // namespace po_kernels
