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

// Where and how a kernel runs.
struct CudaLaunch {
  bool emulate = false;   // on the host, in its memory
  bool backward = false;  // there, in the other order (csrc/cuda/warp.hpp)
  int device = 0;
  void* stream = nullptr;                // a cudaStream_t
  const int64_t* device_seed = nullptr;  // in memory of the device; null for the seed of the call
  int64_t blocks = 0;                    // at least one if there are rows
  double* partials = nullptr;  // of a loss: (blocks, 6 and the terms of the gradient in the precision); else of more
                               // samples than a run: (rows, the numbers of the mean and the scale)

  PK_FIELDS((), emulate, backward, device, stream, device_seed, blocks, partials)
};

// A call and its launch, whose fields are arguments of one function.
template <class C>
struct Launched : C, CudaLaunch {
  template <class Visitor>
  void fields(Visitor& visit) {
    C::fields(visit);
    CudaLaunch::fields(visit);
  }
};

struct CudaOutcome {
  std::string refused;  // why no kernel can serve such shapes, or empty
  std::string failed;   // the error of a launch, or empty
};

#define PK_DECLARE(name, type)                                         \
  CudaOutcome cuda_##name(const type& call, const CudaLaunch& launch); \
  CudaOutcome emulated_##name(const type& call, const CudaLaunch& launch);
PK_FOR_EACH_CUDA_KERNEL(PK_DECLARE)
#undef PK_DECLARE

}  // namespace po_kernels
