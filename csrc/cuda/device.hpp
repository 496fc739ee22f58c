// Launches of the kernels of the Gaussian ops; included by what nvcc compiles.
#pragma once

#include <cuda_runtime.h>

#include "cuda/plan.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Blocks of the most threads that registers are shared out to: two, where nothing is spilled for it.
template <class Rows>
constexpr int kResident = sizeof(typename Rows::Value) == sizeof(float) && !Rows::triangular ? 2 : 1;

template <class Rows>
__global__ void __launch_bounds__(kLanes* kMostWarps, kResident<Rows>)
    gaussian_rows(const __grid_constant__ Work<typename Rows::Call> work) {
  extern __shared__ __align__(16) char memory[];
  Memory shared{memory, work.of_block};
  const Rows rows(work, shared);
  rows.load_shared(Block{});
  char* warps = memory + work.shared_bytes;
  const int warp = int(threadIdx.x) / kLanes;
  Memory own{warps + warp * work.warp_bytes, work.of_warp};
  const typename Rows::Warps held(rows, own);
  rows.rows(Warp{}, held, int64_t(blockIdx.x) * work.warps + warp);
  if constexpr (Rows::is_loss) {
    __syncthreads();
    const int64_t terms = Rows::summed(work.call), stored = Rows::stored(work.call);
    store_sums(Block{}, warps, work.warp_bytes, work.warps, terms, stored,
               work.launch.partials + blockIdx.x * (kHead + stored));
  }
}

template <class T>
__global__ void __launch_bounds__(kLanes* Finish::kParts) gaussian_finish(const __grid_constant__ Finish finish) {
  __shared__ double scratch[kLanes * Finish::kParts];
  finish.template group<T>(Block{}, blockIdx.x, scratch);
}

// Makes a device current, and then again the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

class OnDevice {
 public:
  explicit OnDevice(const CudaLaunch& launch, cudaError_t error)
      : stream_(static_cast<cudaStream_t>(launch.stream)), error_(error) {}

  template <class Rows>
  void rows(const Work<typename Rows::Call>& work, size_t bytes) {
    constexpr size_t unasked = 48 * 1024;  // more has to be asked for
    if (error_ == cudaSuccess && bytes > unasked) {
      error_ = cudaFuncSetAttribute(gaussian_rows<Rows>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    }
    if (error_ != cudaSuccess) return;
    gaussian_rows<Rows><<<unsigned(work.launch.blocks), unsigned(work.warps * kLanes), bytes, stream_>>>(work);
    error_ = cudaGetLastError();
  }

  template <class T>
  void finish(const Finish& finish) {
    if (error_ != cudaSuccess) return;
    gaussian_finish<T><<<unsigned(finish.groups()), kLanes * Finish::kParts, 0, stream_>>>(finish);
    error_ = cudaGetLastError();
  }

  std::string error() const { return error_ == cudaSuccess ? std::string() : std::string(cudaGetErrorString(error_)); }

 private:
  cudaStream_t stream_;
  cudaError_t error_;
};

template <template <class> class Scale, class C>
CudaOutcome on_device(const C& call, const CudaLaunch& launch) {
  const DeviceGuard guard(launch.device);
  return run_gaussian<Scale>(call, launch, OnDevice(launch, guard.error()));
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
