// What the CUDA C++ backend would launch: the host's part of a call, which plans it and says what each kernel gets.
#include <cxxabi.h>
#include <typeinfo>

#include "bindings/arguments.hpp"
#include "cuda/cuda.hpp"
#include "cuda/plan.hpp"
#include "po_kernels/gaussian.hpp"
#include "po_kernels/mvn.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

std::string demangled(const std::string& name) {
  char* found = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  std::string result = found ? found : name;
  std::free(found);
  return result;
}

// In place of launches: (template argument of the kernel, its parameter, blocks, threads, dynamic shared memory).
class Recorder {
 public:
  explicit Recorder(py::list& launches) : launches_(launches) {}

  template <class Rows>
  void rows(const Work<typename Rows::Call>& work, size_t bytes) {
    add<Rows>("gaussian_rows", work, work.launch.blocks, work.warps * kLanes, bytes);
  }
  template <class T>
  void finish(const Finish& finish) {
    add<T>("gaussian_finish", finish, finish.groups(), kLanes * Finish::kParts, 0);
  }
  std::string error() const { return {}; }

 private:
  template <class T, class P>
  void add(const char* kernel, const P& parameter, int64_t blocks, int threads, size_t shared) {
    launches_.append(py::make_tuple(std::string(kernel) + "<" + demangled(typeid(T).name()) + ">",
                                    py::bytes(reinterpret_cast<const char*>(&parameter), sizeof parameter), blocks,
                                    threads, shared));
  }
  py::list& launches_;
};

template <template <class> class Scale, class C>
void define(py::module_& module, const char* name) {
  module.def(name, [fields = Fields::of<Launched<C>>()](const py::kwargs& given) {
    Launched<C> call;
    fields.fill(&call, given);
    py::list launches;
    const CudaOutcome outcome = run_gaussian<Scale>(static_cast<const C&>(call), call, Recorder(launches));
    return py::make_tuple(outcome.refused, launches);
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels

PYBIND11_MODULE(launches, module) {
  using namespace po_kernels;
  module.def("demangled", demangled);
#define PK_DEFINE_DIAGONAL(name, type) define<DiagonalScale, type>(module, "cuda_" #name);
#define PK_DEFINE_TRIANGULAR(name, type) define<TriangularScale, type>(module, "cuda_" #name);
  PK_GAUSSIAN_KERNELS(PK_DEFINE_DIAGONAL, PK_NO_KERNEL, gaussian)
  PK_GAUSSIAN_KERNELS(PK_DEFINE_TRIANGULAR, PK_NO_KERNEL, mvn)
}
