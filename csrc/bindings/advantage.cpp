#include "bindings/bindings.hpp"

namespace po_kernels {

void register_advantage(py::module_& module) {
  module.def("group_advantage", [](const py::kwargs& given) {
    Arguments arguments(given);
    GroupAdvantage call;
    arguments.call(call);
    call.advantage = arguments.take<int>("advantage");
    arguments.rbf(call.has_rbf, call.rbf_gamma);
    call.samples = arguments.take<int64_t>("num_samples");
    call.rewards = arguments.input("rewards");
    call.cotangent = arguments.input("cotangent");
    call.out = arguments.address("out");
    call.grad_rewards = arguments.address("grad_rewards");
    arguments.finish();
    return run(kernels().group_advantage, call);
  });
}

}  // namespace po_kernels
