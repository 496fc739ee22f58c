#include <cuda_runtime.h>

#include "cuda/cuda.hpp"

namespace po_kernels {

CudaState cuda_state() {
  CudaState state;
  cudaRuntimeGetVersion(&state.runtime_version);
  cudaDriverGetVersion(&state.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&state.devices);
  if (error != cudaSuccess) {
    state.devices = 0;
    state.error = cudaGetErrorString(error);
    cudaGetLastError();  // leave no sticky error to the caller's own CUDA code
  }
  return state;
}

}  // namespace po_kernels
