// Keyword arguments of a Python function, and the struct of csrc/calls.hpp that they fill. Tensors are addresses and
// sizes, so that the extension is linked to no torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "calls.hpp"

namespace po_kernels {

namespace py = pybind11;

// The fields of a struct by name. Numbers are required; an address that is left out, or 0, is null.
class Fields {
 public:
  template <class Struct>
  static Fields of() {
    Struct example;
    Fields fields(reinterpret_cast<const char*>(&example));
    example.fields(fields);
    return fields;
  }

  // Called by the struct's `fields`: names, separated by commas, and as many members.
  template <class... Members>
  void operator()(const char* names, Members&... members) {
    (add(next(names), members, true), ...);
  }
  template <class... Members>
  void optional(const char* names, Members&... members) {
    (add(next(names), members, false), ...);
  }

  // Fills a struct of that kind.
  void fill(void* to, const py::kwargs& given) const {
    size_t taken = 0;
    for (const Field& field : fields_) {
      PyObject* value = PyDict_GetItemWithError(given.ptr(), field.name.ptr());
      if (value != nullptr) {
        field.set(static_cast<char*>(to) + field.offset, value);
        ++taken;
      } else if (field.required) {
        throw py::type_error("missing keyword argument " + std::string(field.name));
      }
    }
    if (taken != given.size()) refuse_unknown(given);
  }

  // As many calls as `first`, in each of which an address lies so many bytes after that of the call before, and a
  // number is its own: by name, `steps` has bytes or a list of numbers.
  template <class Struct>
  std::vector<Struct> batch(const Struct& first, size_t count, const py::dict& steps) const {
    std::vector<Struct> calls(count, first);
    for (const Field& field : fields_) {
      if (!steps.contains(field.name)) continue;
      const py::object step = steps[field.name];
      const bool listed = py::isinstance<py::list>(step);
      const size_t bytes = listed ? 0 : step.cast<size_t>();
      for (size_t i = 0; i < count; ++i) {
        char* member = reinterpret_cast<char*>(&calls[i]) + field.offset;
        if (listed) {
          field.set(member, step[py::int_(i)]);
          continue;
        }
        char* address;
        std::memcpy(&address, member, sizeof address);
        address += i * bytes;
        std::memcpy(member, &address, sizeof address);
      }
    }
    return calls;
  }

 private:
  explicit Fields(const char* base) : base_(base) {}

  struct Field {
    py::str name;  // interned, as the names in a call are: dictionaries compare such by address
    std::ptrdiff_t offset;
    void (*set)(void* to, py::handle value);
    bool required;
  };

  template <class T>
  static void set_number(void* to, py::handle value) {
    *static_cast<T*>(to) = value.cast<T>();
  }
  template <class T>
  static void set_address(void* to, py::handle value) {
    *static_cast<T**>(to) = reinterpret_cast<T*>(value.cast<uintptr_t>());
  }
  static void set_maybe(void* to, py::handle value) {
    if (!value.is_none()) *static_cast<MaybeNumber*>(to) = {true, value.cast<double>()};
  }

  template <class T>
  void add(const std::string& name, T& number, bool required) {
    add(name, &number, set_number<T>, required);
  }
  template <class T>
  void add(const std::string& name, T*& address, bool) {
    add(name, &address, set_address<T>, false);
  }
  void add(const std::string& name, MaybeNumber& number, bool) { add(name, &number, set_maybe, false); }
  void add(const std::string& name, Input& input, bool) {
    add(name, input.value, false);
    add(name + "_tangent", input.tangent, false);
  }
  void add(const std::string& name, Differentiable& input, bool) {
    add(name, static_cast<Input&>(input), false);
    add("grad_" + name, input.gradient, false);
  }
  void add(const std::string& name, RowInput& input, bool) {
    add(name, static_cast<Differentiable&>(input), false);
    add(name + "_stride", input.stride, true);
  }
  void add(const std::string& name, void* member, void (*set)(void*, py::handle), bool required) {
    auto key = py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name.c_str()));
    fields_.push_back({std::move(key), static_cast<char*>(member) - base_, set, required});
  }

  // The first of the names, which then begin with the next.
  static std::string next(const char*& names) {
    names += std::strspn(names, ", ");
    const size_t length = std::strcspn(names, ", ");
    names += length;
    return std::string(names - length, length);
  }

  [[noreturn]] void refuse_unknown(const py::kwargs& given) const {
    for (const auto& [name, value] : given) {
      bool known = false;
      for (const Field& field : fields_) known = known || field.name.equal(name);
      if (!known) throw py::type_error("unexpected keyword argument " + std::string(py::str(name)));
    }
    throw py::type_error("unexpected keyword arguments");
  }

  const char* base_;
  std::vector<Field> fields_;
};

}  // namespace po_kernels
