#include "cuda/cuda.hpp"

#include "bindings/gaussian.hpp"

namespace po_kernels {

namespace {

using Outcome = CudaOutcome;

// (why such shapes are refused, the error of a launch), each empty if there is none.
template <class C>
void define(py::module_& module, const std::string& name, Outcome (*on_device)(const C&, const CudaLaunch&),
            Outcome (*emulated)(const C&, const CudaLaunch&)) {
  const std::string scale = name.rfind("mvn", 0) == 0 ? "scale_tril" : "log_std";
  module.def(("cuda_" + name).c_str(), [=](const py::kwargs& given) {
    Arguments arguments(given);
    C call;
    CudaLaunch launch;
    take(arguments, call, scale);
    launch.emulate = arguments.take<bool>("emulate");
    launch.backward = arguments.take<bool>("backward");
    launch.device = arguments.take<int>("device");
    launch.stream = arguments.address("stream");
    launch.seed = arguments.labels("device_seed");
    launch.blocks = arguments.take<int64_t>("blocks");
    launch.partials = static_cast<double*>(arguments.address("partials"));
    arguments.finish();
    Outcome outcome;
    {
      py::gil_scoped_release release;
      outcome = launch.emulate ? emulated(call, launch) : on_device(call, launch);
    }
    return py::make_tuple(outcome.refused, outcome.failed);
  });
}

}  // namespace

void register_cuda(py::module_& module) {
  module.def(
      "cuda_state",
      [] {
        const CudaState state = cuda_state();
        py::dict result;
        result["devices"] = state.devices;
        result["runtime_version"] = state.runtime_version;
        result["driver_version"] = state.driver_version;
        result["error"] = state.error;
        return result;
      },
      "What the CUDA runtime linked into the extension sees on this machine.");
  module.def("cuda_standard_normals", [](const py::kwargs& given) {
    Arguments arguments(given);
    const bool is_double = arguments.take<bool>("is_double");
    const auto seed = static_cast<uint64_t>(arguments.take<int64_t>("seed"));
    const auto row_offset = arguments.take<uint64_t>("row_offset");
    const auto samples = arguments.take<int64_t>("num_samples");
    const auto rows = arguments.take<int64_t>("rows");
    const auto dim = arguments.take<int64_t>("dim");
    void* out = arguments.address("out");
    void* stream = arguments.address("stream");
    arguments.finish();
    return cuda_standard_normals(is_double, seed, row_offset, samples, rows, dim, out, stream);
  });
#define PK_DEFINE(name, type) define<type>(module, #name, cuda_##name, emulated_##name);
  PK_FOR_EACH_CUDA_KERNEL(PK_DEFINE)
#undef PK_DEFINE
}

}  // namespace po_kernels
