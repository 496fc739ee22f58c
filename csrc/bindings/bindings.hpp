// What the files of the extension share. Kernels take tensors as addresses and sizes, so that the extension is
// linked to no torch; address 0 stands for what is absent. All arguments are keywords.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.hpp"

namespace po_kernels {

namespace py = pybind11;

// Takes arguments out of a keyword dictionary: each is required, and `finish` refuses what is left.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) : given_(given) {}

  template <class T>
  T take(const char* name) {
    return item(name).cast<T>();
  }

  void* address(const char* name) { return reinterpret_cast<void*>(take<uintptr_t>(name)); }

  RowInput rows(const char* name, const char* stride, const char* tangent) {
    return {address(name), take<int64_t>(stride), address(tangent)};
  }

  SharedInput shared(const char* name, const char* tangent) { return {address(name), address(tangent)}; }

  // What every loss op takes.
  void loss(LossCall& call) {
    call.is_double = take<bool>("is_double");
    call.dual = take<bool>("dual");
    call.rows = take<int64_t>("rows");
    call.reduction = take<int>("reduction");
    call.estimator = take<int>("estimator");
    call.advantage = take<int>("advantage");
    call.samples = take<int64_t>("samples");
    call.entropy_coef = take<double>("entropy_coef");
    const py::handle gamma = item("rbf_gamma");
    call.has_rbf = !gamma.is_none();
    call.rbf_gamma = call.has_rbf ? gamma.cast<double>() : 0.0;
    call.seed = static_cast<uint64_t>(take<int64_t>("seed"));
    call.row_offset = take<uint64_t>("row_offset");
    call.threads = take<int>("threads");
    call.cotangent = shared("cotangent", "cotangent_tangent");
    call.loss = address("loss");
    call.stats = address("stats");
  }

  void finish() const {
    if (taken_ != given_.size()) throw py::type_error("unexpected keyword argument");
  }

 private:
  py::handle item(const char* name) {
    PyObject* value = PyDict_GetItemString(given_.ptr(), name);
    if (value == nullptr) throw py::type_error(std::string("missing keyword argument ") + name);
    ++taken_;
    return value;
  }

  const py::kwargs& given_;
  size_t taken_ = 0;
};

// Runs a kernel without the interpreter's lock; (code, row) of its verdict.
template <class Call>
py::tuple run(Verdict (*kernel)(const Call&), const Call& call) {
  Verdict verdict;
  {
    py::gil_scoped_release release;
    verdict = kernel(call);
  }
  return py::make_tuple(verdict.code, verdict.row);
}

void register_gaussian(py::module_& module);
void register_categorical(py::module_& module);
#if defined(PK_CUDA)
void register_cuda(py::module_& module);
#endif

}  // namespace po_kernels
