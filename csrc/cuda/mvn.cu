// Full-covariance Gaussian policies on the device.
#include "po_kernels/mvn.hpp"

#include "cuda/device.hpp"

namespace po_kernels {

CudaOutcome cuda_mvn_policy_loss(const GaussianPolicyLoss& call, const CudaLaunch& launch) {
  return call.estimator == kClosedForm ? on_device<ClosedFormRows, TriangularScale>(call, launch)
                                       : on_device<SampledRows, TriangularScale>(call, launch);
}

CudaOutcome cuda_mvn_surrogate_loss(const GaussianSurrogateLoss& call, const CudaLaunch& launch) {
  return on_device<SurrogateLossRows, TriangularScale>(call, launch);
}

CudaOutcome cuda_mvn_log_prob(const GaussianLogProb& call, const CudaLaunch& launch) {
  return on_device<LogProbRows, TriangularScale>(call, launch);
}

CudaOutcome cuda_mvn_sample(const GaussianSample& call, const CudaLaunch& launch) {
  return on_device<SampleRows, TriangularScale>(call, launch);
}

}  // namespace po_kernels
