// The Python module: a function for each kernel of csrc/calls.hpp, and what Python has to know of the numbers in a
// call.
#include <chrono>

#include "bindings/arguments.hpp"
#include "cpu/kernels.hpp"
#include "cpu/parallel.hpp"
#if defined(PK_CUDA)
#include "cuda/cuda.hpp"
#endif

namespace po_kernels {

namespace {

// Runs the problems of a batch, and gives the first verdict against one, and whose it is. Threads are woken for whole
// problems, if what the first of them took says that it is worth it.
template <class C>
std::pair<Verdict, size_t> run_batch(std::vector<C>& calls, Verdict (*kernel)(const C&)) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::microseconds kWorthAThread(50);
  const int count = int(calls.size()), threads = calls[0].threads;
  std::vector<Verdict> verdicts(calls.size());
  const auto begin = Clock::now();
  verdicts[0] = kernel(calls[0]);
  const bool spread = count > threads && (Clock::now() - begin) * (count - 1) > kWorthAThread * threads;
  parallel_for(count - 1, spread ? threads : 1, [&](int64_t i) {
    C& call = calls[size_t(i) + 1];
    if (spread) call.threads = 1;
    verdicts[size_t(i) + 1] = kernel(call);
  });
  for (size_t i = 0; i < verdicts.size(); ++i) {
    if (verdicts[i].code != kAccepted) return {verdicts[i], i};
  }
  return {};
}

// (code, row, problem) of the verdict. The call of a batch also has the number of its problems and the steps between
// them.
template <class C>
void define(py::module_& module, const char* name, Verdict (*kernel)(const C&)) {
  module.def(name, [kernel, fields = Fields::of<C>()](const py::args& batch, const py::kwargs& given) {
    C call;
    fields.fill(&call, given);
    std::pair<Verdict, size_t> found;
    if (batch.empty()) {
      py::gil_scoped_release release;
      found.first = kernel(call);
    } else {
      std::vector<C> calls = fields.batch(call, batch[0].cast<size_t>(), batch[1].cast<py::dict>());
      py::gil_scoped_release release;
      found = run_batch(calls, kernel);
    }
    return py::make_tuple(found.first.code, found.first.row, found.second);
  });
}

#if defined(PK_CUDA)
// (why such shapes are refused, the error of a launch), each empty if there is none.
template <class C>
void define_cuda(py::module_& module, const char* name, CudaOutcome (*on_device)(const C&, const CudaLaunch&),
                 CudaOutcome (*emulated)(const C&, const CudaLaunch&)) {
  module.def(name, [on_device, emulated, fields = Fields::of<Launched<C>>()](const py::kwargs& given) {
    Launched<C> call;
    fields.fill(&call, given);
    CudaOutcome outcome;
    {
      py::gil_scoped_release release;
      outcome = (call.emulate ? emulated : on_device)(call, call);
    }
    return py::make_tuple(outcome.refused, outcome.failed);
  });
}

py::dict cuda_state_as_dict() {
  const CudaState state = cuda_state();
  py::dict result;
  result["devices"] = state.devices;
  result["runtime_version"] = state.runtime_version;
  result["driver_version"] = state.driver_version;
  result["error"] = state.error;
  return result;
}
#endif

template <size_t N>
py::dict as_dict(const std::pair<const char*, int> (&numbers)[N]) {
  py::dict result;
  for (const auto& [name, number] : numbers) result[name] = number;
  return result;
}

py::dict enums() {
  py::dict result;
  result["Estimator"] = as_dict(kEstimators);
  result["Advantage"] = as_dict(kAdvantages);
  result["Reduction"] = as_dict(kReductions);
  result["Refusal"] = as_dict(kRefusals);
  result["Head"] = as_dict(kHeads);
  result["Activation"] = as_dict(kActivations);
  result["Spread"] = as_dict(kSpreads);
  result["Rule"] = as_dict(kRules);
  return result;
}

}  // namespace

}  // namespace po_kernels

PYBIND11_MODULE(_native, module) {
  using namespace po_kernels;
  module.doc() = "Compiled kernels of po_kernels. Internal: call the operations of po_kernels instead.";
  module.def("simd_level", [] { return kernels().level; }, "The instruction-set level that the CPU kernels run at.");
  module.def("enums", enums, "The numbers that stand for options and refusals, by name.");
#define PK_DEFINE(name, type) define(module, #name, kernels().name);
  PK_FOR_EACH_KERNEL(PK_DEFINE)
#if defined(PK_CUDA)
  module.def("cuda_state", cuda_state_as_dict, "What the CUDA runtime linked into the extension sees on this machine.");
#define PK_DEFINE_CUDA(name, type) define_cuda<type>(module, "cuda_" #name, cuda_##name, emulated_##name);
  PK_FOR_EACH_CUDA_KERNEL(PK_DEFINE_CUDA)
#endif
}
