// The arguments of the Gaussian ops, the same for the kernels of the CPU and of CUDA.
#pragma once

#include "bindings/bindings.hpp"

namespace po_kernels {

template <class C>
void take_policy(Arguments& arguments, C& call, const std::string& scale) {
  call.dim = arguments.take<int64_t>("dim");
  call.mean = arguments.rows("mean");
  call.scale = arguments.rows("scale");
  call.grad_mean = arguments.address("grad_mean");
  call.grad_scale = arguments.address("grad_scale");
}

inline void take(Arguments& arguments, GaussianPolicyLoss& call, const std::string& scale) {
  arguments.loss(call);
  arguments.random(call);
  take_policy(arguments, call, scale);
  call.precision_kind = arguments.take<int>("precision_ndim");
  call.target = arguments.rows("target");
  call.precision = arguments.input("precision");
  call.grad_target = arguments.address("grad_target");
  call.grad_precision = arguments.address("grad_precision");
}

inline void take(Arguments& arguments, GaussianSurrogateLoss& call, const std::string& scale) {
  arguments.loss(call);
  take_policy(arguments, call, scale);
  call.rewards = arguments.input("rewards");
  call.given = arguments.address("samples");
  call.grad_rewards = arguments.address("grad_rewards");
}

inline void take(Arguments& arguments, GaussianLogProb& call, const std::string& scale) {
  arguments.call(call);
  take_policy(arguments, call, scale);
  call.count = arguments.take<int64_t>("count");
  call.value = arguments.input("value");
  call.cotangent = arguments.input("cotangent");
  call.out = arguments.address("out");
  call.grad_value = arguments.address("grad_value");
}

inline void take(Arguments& arguments, GaussianSample& call, const std::string& scale) {
  arguments.call(call);
  arguments.random(call);
  take_policy(arguments, call, scale);
  call.samples = arguments.take<int64_t>("num_samples");
  call.cotangent = arguments.input("cotangent");
  call.out = arguments.address("out");
}

}  // namespace po_kernels
