// The CPU kernels as the bindings see them: one table of functions for each instruction-set level.
#pragma once

#include <cstdint>

#include "calls.hpp"

namespace po_kernels {

// Refusals of values, with the names of po_kernels/backends/contract.py, which a test holds to these numbers.
enum Refusal : int {
  kAccepted = 0,
  kPrecisionNotPositive = 1,
  kPrecisionNotSymmetric = 2,
  kLabelOutOfRange = 3,
  kAllMasked = 4,
  kNotTriangular = 5,
  kSingular = 6,
  kLabelMasked = 7,
  kLogitsNotFinite = 8,
  kScaleNotFinite = 9,
};
constexpr std::pair<const char*, int> kRefusals[] = {
    {"precision_not_positive", kPrecisionNotPositive},
    {"precision_not_symmetric", kPrecisionNotSymmetric},
    {"label_out_of_range", kLabelOutOfRange},
    {"all_masked", kAllMasked},
    {"not_triangular", kNotTriangular},
    {"singular", kSingular},
    {"label_masked", kLabelMasked},
    {"logits_not_finite", kLogitsNotFinite},
    {"scale_not_finite", kScaleNotFinite},
};

// MATRIX_TOLERANCE of contract.py.
constexpr double kMatrixTolerance = 1e-4;

struct Verdict {
  int code = kAccepted;
  int64_t row = 0;
};

struct KernelTable {
  const char* level;
#define PK_MEMBER(name, type) Verdict (*name)(const type&);
  PK_FOR_EACH_KERNEL(PK_MEMBER)
#undef PK_MEMBER
};

// The level for this processor, or the one that the environment variable PO_KERNELS_SIMD names.
// Throws std::runtime_error for a level that is unknown, not built, or not supported here.
const KernelTable& kernels();

}  // namespace po_kernels
