#include "bindings/bindings.hpp"

namespace po_kernels {

namespace {

template <class C>
void take_policy(Arguments& arguments, C& call, const std::string& scale) {
  call.dim = arguments.take<int64_t>("dim");
  call.mean = arguments.rows("mean");
  call.scale = arguments.rows(scale);
  call.grad_mean = arguments.address("grad_mean");
  call.grad_scale = arguments.address("grad_" + scale);
}

// The ops of one Gaussian, whose scale parameter has this name.
void register_family(py::module_& module, const std::string& family, const std::string& scale,
                     Verdict (*policy_loss)(const GaussianPolicyLoss&),
                     Verdict (*surrogate_loss)(const GaussianSurrogateLoss&),
                     Verdict (*log_prob)(const GaussianLogProb&), Verdict (*sample)(const GaussianSample&)) {
  module.def((family + "_policy_loss").c_str(), [=](const py::kwargs& given) {
    Arguments arguments(given);
    GaussianPolicyLoss call;
    arguments.loss(call);
    arguments.random(call);
    take_policy(arguments, call, scale);
    call.precision_kind = arguments.take<int>("precision_kind");
    call.target = arguments.rows("target");
    call.precision = arguments.input("precision");
    call.grad_target = arguments.address("grad_target");
    call.grad_precision = arguments.address("grad_precision");
    arguments.finish();
    return run(policy_loss, call);
  });
  module.def((family + "_surrogate_loss").c_str(), [=](const py::kwargs& given) {
    Arguments arguments(given);
    GaussianSurrogateLoss call;
    arguments.loss(call);
    take_policy(arguments, call, scale);
    call.rewards = arguments.input("rewards");
    call.given = arguments.address("given");
    call.grad_rewards = arguments.address("grad_rewards");
    arguments.finish();
    return run(surrogate_loss, call);
  });
  module.def((family + "_log_prob").c_str(), [=](const py::kwargs& given) {
    Arguments arguments(given);
    GaussianLogProb call;
    arguments.call(call);
    take_policy(arguments, call, scale);
    call.count = arguments.take<int64_t>("count");
    call.value = arguments.input("at");
    call.cotangent = arguments.input("cotangent");
    call.out = arguments.address("value");
    call.grad_value = arguments.address("grad_at");
    arguments.finish();
    return run(log_prob, call);
  });
  module.def((family + "_sample").c_str(), [=](const py::kwargs& given) {
    Arguments arguments(given);
    GaussianSample call;
    arguments.call(call);
    arguments.random(call);
    take_policy(arguments, call, scale);
    call.samples = arguments.take<int64_t>("samples");
    call.cotangent = arguments.input("cotangent");
    call.out = arguments.address("value");
    arguments.finish();
    return run(sample, call);
  });
}

}  // namespace

void register_gaussian(py::module_& module) {
  const KernelTable& table = kernels();
  register_family(module, "gaussian", "log_std", table.gaussian_policy_loss, table.gaussian_surrogate_loss,
                  table.gaussian_log_prob, table.gaussian_sample);
  register_family(module, "mvn", "scale_tril", table.mvn_policy_loss, table.mvn_surrogate_loss, table.mvn_log_prob,
                  table.mvn_sample);
}

}  // namespace po_kernels
