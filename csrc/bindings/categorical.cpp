#include "bindings/bindings.hpp"

namespace po_kernels {

void register_categorical(py::module_& module) {
  module.def("categorical_policy_loss", [](const py::kwargs& given) {
    Arguments arguments(given);
    CategoricalPolicyLoss call;
    arguments.loss(call);
    arguments.random(call);
    call.classes = arguments.take<int64_t>("classes");
    call.logits = arguments.rows("logits");
    call.reward_table = arguments.input("reward_table");
    call.target = arguments.labels("target");
    call.grad_logits = arguments.address("grad_logits");
    call.grad_reward_table = arguments.address("grad_reward_table");
    arguments.finish();
    return run(kernels().categorical_policy_loss, call);
  });
  module.def("categorical_surrogate_loss", [](const py::kwargs& given) {
    Arguments arguments(given);
    CategoricalSurrogateLoss call;
    arguments.loss(call);
    call.classes = arguments.take<int64_t>("classes");
    call.logits = arguments.rows("logits");
    call.rewards = arguments.input("rewards");
    call.given = arguments.labels("samples");
    call.grad_logits = arguments.address("grad_logits");
    call.grad_rewards = arguments.address("grad_rewards");
    arguments.finish();
    return run(kernels().categorical_surrogate_loss, call);
  });
  module.def("categorical_log_prob", [](const py::kwargs& given) {
    Arguments arguments(given);
    CategoricalLogProb call;
    arguments.call(call);
    call.classes = arguments.take<int64_t>("classes");
    call.count = arguments.take<int64_t>("count");
    call.logits = arguments.rows("logits");
    call.value = arguments.labels("value");
    call.cotangent = arguments.input("cotangent");
    call.out = arguments.address("out");
    call.grad_logits = arguments.address("grad_logits");
    arguments.finish();
    return run(kernels().categorical_log_prob, call);
  });
  module.def("categorical_sample", [](const py::kwargs& given) {
    Arguments arguments(given);
    CategoricalSample call;
    arguments.call(call);
    arguments.random(call);
    call.classes = arguments.take<int64_t>("classes");
    call.samples = arguments.take<int64_t>("num_samples");
    call.logits = arguments.rows("logits");
    call.out = static_cast<int64_t*>(arguments.address("out"));
    arguments.finish();
    return run(kernels().categorical_sample, call);
  });
}

}  // namespace po_kernels
