// What the files of the extension share. Kernels take tensors as addresses and sizes, so that the extension is
// linked to no torch; address 0 stands for what is absent. All arguments are keywords.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>

#include "cpu/kernels.hpp"

namespace po_kernels {

namespace py = pybind11;

// Takes arguments out of a keyword dictionary: each is required but an address, which is null when left out, and the
// number of threads; `finish` refuses what is left.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& given) : given_(given) {}

  template <class T>
  T take(const std::string& name) {
    const py::handle value = find(name);
    if (!value) throw py::type_error("missing keyword argument " + name);
    return value.cast<T>();
  }

  void* address(const std::string& name) {
    const py::handle value = find(name);
    return value ? reinterpret_cast<void*>(value.cast<uintptr_t>()) : nullptr;
  }

  const int64_t* labels(const std::string& name) { return static_cast<const int64_t*>(address(name)); }

  // Arguments <name> and <name>_tangent.
  Input input(const std::string& name) { return {address(name), address(name + "_tangent")}; }

  // These and <name>_stride.
  RowInput rows(const std::string& name) { return {input(name), take<int64_t>(name + "_stride")}; }

  void call(Call& call) {
    call.is_double = take<bool>("is_double");
    call.dual = take<bool>("dual");
    call.rows = take<int64_t>("rows");
    if (const py::handle threads = find("threads")) call.threads = threads.cast<int>();
  }

  void rbf(bool& has_rbf, double& rbf_gamma) {
    const py::handle gamma = find("rbf_gamma");
    has_rbf = gamma && !gamma.is_none();
    rbf_gamma = has_rbf ? gamma.cast<double>() : 0.0;
  }

  void loss(LossCall& call) {
    this->call(call);
    call.reduction = take<int>("reduction");
    call.estimator = take<int>("estimator");
    call.advantage = take<int>("advantage");
    call.samples = take<int64_t>("num_samples");
    call.entropy_coef = take<double>("entropy_coef");
    rbf(call.has_rbf, call.rbf_gamma);
    call.cotangent = input("cotangent");
    call.loss = address("out");
    call.stats = address("stats");
  }

  void random(RandomNumbers& numbers) {
    numbers.seed = static_cast<uint64_t>(take<int64_t>("seed"));
    numbers.row_offset = take<uint64_t>("row_offset");
  }

  void finish() const {
    if (taken_ != given_.size()) throw py::type_error("unexpected keyword argument");
  }

 private:
  py::handle find(const std::string& name) {
    PyObject* value = PyDict_GetItemWithError(given_.ptr(), key(name));
    if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (value != nullptr) ++taken_;
    return value;
  }

  // The name as Python keeps it: looking it up takes as long as a small kernel if its string is made each time.
  static PyObject* key(const std::string& name) {
    static std::unordered_map<std::string, PyObject*> keys;
    PyObject*& known = keys[name];
    if (known == nullptr) known = PyUnicode_InternFromString(name.c_str());
    return known;
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

void register_advantage(py::module_& module);
void register_gaussian(py::module_& module);
void register_categorical(py::module_& module);
#if defined(PK_CUDA)
void register_cuda(py::module_& module);
#endif

}  // namespace po_kernels
