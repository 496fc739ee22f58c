// The CUDA part of the extension as the bindings see it. No header of CUDA is needed to call it.
#pragma once

#include <cstdint>
#include <string>

#include "calls.hpp"

namespace po_kernels {

struct CudaState {
  int devices = 0;
  int runtime_version = 0;  // 1000 major + 10 minor
  int driver_version = 0;   // 0 without a driver
  std::string error;        // why there is no device, or empty
};

CudaState cuda_state();

// Standard normals of rows [0, rows) x samples, (samples, rows, dim), into device memory of the current device, on
// `stream` (a cudaStream_t). Returns an error message, empty if the launch was accepted.
std::string cuda_standard_normals(bool is_double, uint64_t seed, uint64_t row_offset, int64_t samples, int64_t rows,
                                  int64_t dim, void* out, void* stream);

// Where and how a kernel runs.
struct CudaLaunch {
  bool emulate = false;   // on the host, in its memory
  bool backward = false;  // there, in the other order (csrc/cuda/warp.hpp)
  int device = 0;
  void* stream = nullptr;         // a cudaStream_t
  const int64_t* seed = nullptr;  // in memory of the device; null for the seed of the call
  int64_t blocks = 0;             // at least one if there are rows
  double* partials = nullptr;     // of a loss: (blocks, 6 and the terms of the gradient in the precision)
};

struct CudaOutcome {
  std::string refused;  // why no kernel can serve such shapes, or empty
  std::string failed;   // the error of a launch, or empty
};

#define PK_FOR_EACH_CUDA_KERNEL(do)                                                                                           \
  do                                                                                                                          \
  (gaussian_policy_loss, GaussianPolicyLoss) do(gaussian_surrogate_loss, GaussianSurrogateLoss) do(                           \
      gaussian_log_prob,                                                                                                      \
      GaussianLogProb) do(gaussian_sample,                                                                                    \
                          GaussianSample) do(mvn_policy_loss,                                                                 \
                                             GaussianPolicyLoss) do(mvn_surrogate_loss,                                       \
                                                                    GaussianSurrogateLoss) do(mvn_log_prob,                   \
                                                                                              GaussianLogProb) do(mvn_sample, \
                                                                                                                  GaussianSample)

#define PK_DECLARE(name, type)                                         \
  CudaOutcome cuda_##name(const type& call, const CudaLaunch& launch); \
  CudaOutcome emulated_##name(const type& call, const CudaLaunch& launch);
PK_FOR_EACH_CUDA_KERNEL(PK_DECLARE)
#undef PK_DECLARE

}  // namespace po_kernels
