// The random numbers of the package on the device, a thread a block of four dimensions.
#include "po_kernels/philox.hpp"

#include <cuda_runtime.h>

#include "cuda/cuda.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

template <class T>
__global__ void standard_normals_kernel(uint64_t seed, uint64_t row_offset, int64_t samples, int64_t rows, int64_t dim,
                                        T* out) {
  const int64_t blocks = (dim + 3) / 4;
  const int64_t total = samples * rows * blocks;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t block = i % blocks, row = i / blocks % rows, sample = i / (blocks * rows);
    const uint64_t number = row_offset + uint64_t(row);
    T z[4];
    normals_of_block<1, 2>(seed, uint32_t(block), uint32_t(sample), uint32_t(number), uint32_t(number >> 32), z, 4);
    for (int64_t j = 0; j < 4 && block * 4 + j < dim; ++j) out[(sample * rows + row) * dim + block * 4 + j] = z[j];
  }
}

template <class T>
std::string launch(uint64_t seed, uint64_t row_offset, int64_t samples, int64_t rows, int64_t dim, void* out,
                   void* stream) {
  const int64_t total = samples * rows * ((dim + 3) / 4);
  if (total == 0) return {};
  constexpr int threads = 256;
  const int64_t wanted = (total + threads - 1) / threads;
  const unsigned grid = unsigned(wanted < 65535 ? wanted : 65535);
  standard_normals_kernel<T><<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(seed, row_offset, samples, rows,
                                                                                      dim, static_cast<T*>(out));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? std::string() : std::string(cudaGetErrorString(error));
}

}  // namespace

}  // namespace PK_LEVEL

std::string cuda_standard_normals(bool is_double, uint64_t seed, uint64_t row_offset, int64_t samples, int64_t rows,
                                  int64_t dim, void* out, void* stream) {
  return is_double ? launch<double>(seed, row_offset, samples, rows, dim, out, stream)
                   : launch<float>(seed, row_offset, samples, rows, dim, out, stream);
}

}  // namespace po_kernels
