// The CUDA part of the extension as the bindings see it. No header of CUDA is needed to call it.
#pragma once

#include <cstdint>
#include <string>

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

}  // namespace po_kernels
