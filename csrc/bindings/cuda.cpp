#include "cuda/cuda.hpp"

#include "bindings/bindings.hpp"

namespace po_kernels {

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
    const auto samples = arguments.take<int64_t>("samples");
    const auto rows = arguments.take<int64_t>("rows");
    const auto dim = arguments.take<int64_t>("dim");
    void* out = arguments.address("out");
    void* stream = arguments.address("stream");
    arguments.finish();
    return cuda_standard_normals(is_double, seed, row_offset, samples, rows, dim, out, stream);
  });
}

}  // namespace po_kernels
