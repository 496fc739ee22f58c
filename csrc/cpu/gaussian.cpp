// Diagonal Gaussian policies on the CPU.
#include "po_kernels/gaussian.hpp"

#include "cpu/gaussian_family.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

Verdict gaussian_policy_loss(const GaussianPolicyLoss& call) {
  return gaussian_policy_loss_of<DiagonalScale>(call);
}

Verdict gaussian_surrogate_loss(const GaussianSurrogateLoss& call) {
  return gaussian_surrogate_loss_of<DiagonalScale>(call);
}

Verdict gaussian_log_prob(const GaussianLogProb& call) {
  return gaussian_log_prob_of<DiagonalScale>(call);
}

Verdict gaussian_sample(const GaussianSample& call) {
  return gaussian_sample_of<DiagonalScale>(call);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
