#include "bindings/gaussian.hpp"

namespace po_kernels {

namespace {

template <class C>
void define(py::module_& module, const char* name, const std::string& scale, Verdict (*kernel)(const C&)) {
  module.def(name, [=](const py::kwargs& given) {
    Arguments arguments(given);
    C call;
    take(arguments, call, scale);
    arguments.finish();
    return run(kernel, call);
  });
}

}  // namespace

void register_gaussian(py::module_& module) {
  const KernelTable& table = kernels();
  define(module, "gaussian_policy_loss", "log_std", table.gaussian_policy_loss);
  define(module, "gaussian_surrogate_loss", "log_std", table.gaussian_surrogate_loss);
  define(module, "gaussian_log_prob", "log_std", table.gaussian_log_prob);
  define(module, "gaussian_sample", "log_std", table.gaussian_sample);
  define(module, "mvn_policy_loss", "scale_tril", table.mvn_policy_loss);
  define(module, "mvn_surrogate_loss", "scale_tril", table.mvn_surrogate_loss);
  define(module, "mvn_log_prob", "scale_tril", table.mvn_log_prob);
  define(module, "mvn_sample", "scale_tril", table.mvn_sample);
}

}  // namespace po_kernels
