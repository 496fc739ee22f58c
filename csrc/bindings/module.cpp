#include "bindings/bindings.hpp"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of po_kernels. Internal: call the operations of po_kernels instead.";
  module.def(
      "simd_level", [] { return po_kernels::kernels().level; },
      "The instruction-set level that the CPU kernels run at.");
  po_kernels::register_advantage(module);
  po_kernels::register_gaussian(module);
  po_kernels::register_categorical(module);
#if defined(PK_CUDA)
  po_kernels::register_cuda(module);
#endif
}
