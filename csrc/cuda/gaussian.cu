// Diagonal Gaussian policies on the device.
#include "po_kernels/gaussian.hpp"

#include "cuda/device.hpp"

namespace po_kernels {

CudaOutcome cuda_gaussian_policy_loss(const GaussianPolicyLoss& call, const CudaLaunch& launch) {
  return call.estimator == kClosedForm ? on_device<ClosedFormRows, DiagonalScale>(call, launch)
                                       : on_device<SampledRows, DiagonalScale>(call, launch);
}

CudaOutcome cuda_gaussian_surrogate_loss(const GaussianSurrogateLoss& call, const CudaLaunch& launch) {
  return on_device<SurrogateLossRows, DiagonalScale>(call, launch);
}

CudaOutcome cuda_gaussian_log_prob(const GaussianLogProb& call, const CudaLaunch& launch) {
  return on_device<LogProbRows, DiagonalScale>(call, launch);
}

CudaOutcome cuda_gaussian_sample(const GaussianSample& call, const CudaLaunch& launch) {
  return on_device<SampleRows, DiagonalScale>(call, launch);
}

}  // namespace po_kernels
