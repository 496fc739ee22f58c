// How a call of a Gaussian op is shared out over warps and blocks; the same on every device, and on the host.
#pragma once

#include <algorithm>

#include "cuda/closed_form.hpp"
#include "cuda/log_prob.hpp"
#include "cuda/sample.hpp"
#include "cuda/sampled_loss.hpp"
#include "cuda/surrogate_loss.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Bytes of shared memory: what a block may have on every device from sm_80 on, what it has if a warp can do with less
// (four blocks then fit a multiprocessor of sm_90, three of sm_80), and what a warp has before it draws samples twice.
constexpr size_t kMostShared = 99 * 1024;
constexpr size_t kBlockShared = 54 * 1024;
constexpr size_t kWarpShared = 32 * 1024;
constexpr int kMostWarps = 8;

struct Plan {
  size_t bytes = 0;  // of shared memory of a block
  std::string refused;
};

// Sets what of `work` says how rows are shared out.
template <class Rows, class C>
Plan plan(Work<C>& work) {
  const int64_t dim = work.call.dim, samples = std::max<int64_t>(1, Rows::samples(work.call));
  const auto too_large = [&]() -> Plan {
    return {0, "expected a row that, with its samples, fits the shared memory of a block, " +
                   std::to_string(kMostShared) + " bytes, got one of " + std::to_string(dim) + " dimensions and " +
                   std::to_string(samples) + " samples"};
  };
  // Beyond these, sizes are no int.
  if (dim > int64_t(kMostShared) || (Rows::is_loss && samples > int64_t(kMostShared))) return too_large();
  size_t common = 0;
  const auto bytes_of = [&](int64_t held) {
    work.held = int(held);
    Memory shared{reinterpret_cast<char*>(16), nullptr, work.of_block};
    const Rows rows(work, shared);
    common = shared.used;
    work.shared_bytes = int(common);
    Memory own{reinterpret_cast<char*>(16), nullptr, work.of_warp};
    typename Rows::Warps warps(rows, own);
    return own.used;
  };
  const size_t least = bytes_of(1);
  if (common + least > kMostShared) return too_large();
  const size_t of_sample = (bytes_of(kLanes + 1) - bytes_of(1)) / kLanes + 1;
  const auto fitting = [&](size_t bytes) { return 1 + int64_t((std::max(bytes, least) - least) / of_sample); };
  int64_t held = std::max<int64_t>(kLanes, fitting(kWarpShared) / kLanes * kLanes);
  held = std::min({samples, held, fitting(kMostShared - common)});
  work.warp_bytes = int(bytes_of(held));
  work.shape = Shape(int(dim), int(held));
  const int64_t fit = (std::max(kBlockShared, common) - common) / work.warp_bytes;
  const int64_t wanted = (work.call.rows + work.launch.blocks - 1) / std::max<int64_t>(work.launch.blocks, 1);
  work.warps = int(std::clamp<int64_t>(std::min(fit, wanted), 1, kMostWarps));
  return {common + work.warps * work.warp_bytes, {}};
}

inline Finish finish_of(const Work<GaussianPolicyLoss>& work) {
  const GaussianPolicyLoss& call = work.call;
  const int64_t summed = call.precision.gradient ? summed_terms(call.precision_ndim, call.dim) : 0;
  const int64_t terms = stored_terms(call.precision_ndim, summed);
  return {call,     work.launch.partials,   work.launch.blocks, terms, call.precision_ndim,
          call.dim, call.precision.gradient};
}
inline Finish finish_of(const Work<GaussianSurrogateLoss>& work) {
  return {work.call, work.launch.partials, work.launch.blocks, 0, 0, 0, nullptr};
}

template <class Rows, class C, class Runner>
CudaOutcome run_rows(const C& call, const CudaLaunch& launch, Runner runner) {
  Work<C> work{call, launch};
  const Plan found = plan<Rows>(work);
  if (!found.refused.empty()) return {found.refused, {}};
  if (call.rows > 0) runner.template rows<Rows>(work, found.bytes);
  if constexpr (Rows::is_loss) {
    const Finish finish = finish_of(work);
    if (call.reduction != kNoReduction || finish.terms > 0) runner.template finish<typename Rows::T>(finish);
  }
  return {{}, runner.error()};
}

template <template <class, template <class> class> class RowsOf, template <class> class Scale, class C, class Runner>
CudaOutcome run_as(const C& call, const CudaLaunch& launch, Runner runner) {
  if (call.is_double) {
    return call.dual ? run_rows<RowsOf<Dual<double>, Scale>>(call, launch, runner)
                     : run_rows<RowsOf<double, Scale>>(call, launch, runner);
  }
  return call.dual ? run_rows<RowsOf<Dual<float>, Scale>>(call, launch, runner)
                   : run_rows<RowsOf<float, Scale>>(call, launch, runner);
}

// Runs a call's rows, then what adds them up, by way of `runner`: on a device or on the host.
template <template <class> class Scale, class Runner>
CudaOutcome run_gaussian(const GaussianPolicyLoss& call, const CudaLaunch& launch, Runner runner) {
  return call.estimator == kClosedForm ? run_as<ClosedFormRows, Scale>(call, launch, runner)
                                       : run_as<SampledRows, Scale>(call, launch, runner);
}
template <template <class> class Scale, class Runner>
CudaOutcome run_gaussian(const GaussianSurrogateLoss& call, const CudaLaunch& launch, Runner runner) {
  return run_as<SurrogateLossRows, Scale>(call, launch, runner);
}
template <template <class> class Scale, class Runner>
CudaOutcome run_gaussian(const GaussianLogProb& call, const CudaLaunch& launch, Runner runner) {
  return run_as<LogProbRows, Scale>(call, launch, runner);
}
template <template <class> class Scale, class Runner>
CudaOutcome run_gaussian(const GaussianSample& call, const CudaLaunch& launch, Runner runner) {
  return run_as<SampleRows, Scale>(call, launch, runner);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
