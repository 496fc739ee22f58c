// Full-covariance Gaussian policies on the CPU.
#include "po_kernels/mvn.hpp"

#include "cpu/gaussian_family.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

#define PK_DEFINE(name, type)                      \
  Verdict name(const type& call) {                 \
    return gaussian_kernel<TriangularScale>(call); \
  }
PK_GAUSSIAN_KERNELS(PK_DEFINE, PK_DEFINE, mvn)

}  // namespace PK_LEVEL
}  // namespace po_kernels
