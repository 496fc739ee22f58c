#include "bindings/bindings.hpp"

namespace po_kernels {

void register_categorical(py::module_& module) {
  module.def("categorical_policy_loss", [](const py::kwargs& given) {
    Arguments arguments(given);
    CategoricalPolicyLoss call;
    arguments.loss(call);
    call.classes = arguments.take<int64_t>("classes");
    call.logits = arguments.rows("logits", "logits_stride", "logits_tangent");
    call.target = static_cast<const int64_t*>(arguments.address("target"));
    call.table = arguments.shared("reward_table", "reward_table_tangent");
    call.grad_logits = arguments.address("grad_logits");
    call.grad_table = arguments.address("grad_reward_table");
    arguments.finish();
    return run(kernels().categorical_policy_loss, call);
  });
}

}  // namespace po_kernels
