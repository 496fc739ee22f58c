// Full-covariance Gaussian policies on the device.
#include "po_kernels/mvn.hpp"

#include "cuda/device.hpp"

namespace po_kernels {

#define PK_DEFINE(name, type)                                           \
  CudaOutcome cuda_##name(const type& call, const CudaLaunch& launch) { \
    return on_device<TriangularScale>(call, launch);                    \
  }
PK_GAUSSIAN_KERNELS(PK_DEFINE, PK_NO_KERNEL, mvn)

}  // namespace po_kernels
