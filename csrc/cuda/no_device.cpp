// The device's part of the extension where the kernels are built for the host alone.
#include "cuda/cuda.hpp"

namespace po_kernels {

namespace {
constexpr const char* kReason = "the extension was built for the emulator alone";
}

CudaState cuda_state() {
  CudaState state;
  state.error = kReason;
  return state;
}

#define PK_DEFINE(name, type)                               \
  CudaOutcome cuda_##name(const type&, const CudaLaunch&) { \
    return {{}, kReason};                                   \
  }
PK_FOR_EACH_CUDA_KERNEL(PK_DEFINE)

}  // namespace po_kernels
