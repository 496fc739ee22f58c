#include "bindings/bindings.hpp"

namespace po_kernels {

void register_gaussian(py::module_& module) {
  module.def("gaussian_policy_loss", [](const py::kwargs& given) {
    Arguments arguments(given);
    GaussianPolicyLoss call;
    arguments.loss(call);
    call.dim = arguments.take<int64_t>("dim");
    call.precision_kind = arguments.take<int>("precision_kind");
    call.mean = arguments.rows("mean", "mean_stride", "mean_tangent");
    call.log_std = arguments.rows("log_std", "log_std_stride", "log_std_tangent");
    call.target = arguments.rows("target", "target_stride", "target_tangent");
    call.precision = arguments.shared("precision", "precision_tangent");
    call.grad_mean = arguments.address("grad_mean");
    call.grad_log_std = arguments.address("grad_log_std");
    call.grad_target = arguments.address("grad_target");
    call.grad_precision = arguments.address("grad_precision");
    arguments.finish();
    return run(kernels().gaussian_policy_loss, call);
  });
}

}  // namespace po_kernels
