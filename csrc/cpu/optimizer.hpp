// Steps of torch.optim's Adam, AdamW and SGD.
#pragma once

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/tiles.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// body(pack, ...) over packs of as many elements of each of the arrays, which it may change.
template <class T, class Body, class... Arrays>
void over_packs(int64_t count, Body body, Arrays*... arrays) {
  constexpr int64_t width = LaneTraits<Lanes<T>>::width;
  // As many bytes as a constant, or a number, says: a constant number needs no call to be copied.
  const auto some = [&](int64_t from, auto bytes) {
    const auto one = [&](auto&... packs) {
      (memcpy(&packs, arrays + from, bytes), ...);
      body(packs...);
      (memcpy(arrays + from, &packs, bytes), ...);
    };
    std::tuple<std::conditional_t<true, Lanes<T>, Arrays>...> packs{};
    std::apply(one, packs);
  };
  int64_t i = 0;
  for (; i + width <= count; i += width) some(i, std::integral_constant<size_t, sizeof(Lanes<T>)>());
  if (i < count) some(i, size_t(count - i) * sizeof(T));
}

// Scales the gradients to the norm that is allowed, and moves the parameters.
template <class T>
void update(const NetworkLoss& call, const std::vector<int64_t>& sizes, int64_t step) {
  using P = Lanes<T>;
  const auto at = [](const int64_t* addresses, size_t i) { return reinterpret_cast<T*>(addresses[i]); };
  if (call.norms != nullptr) {
    double squared = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const T* gradient = at(call.gradients, i);
      for (int64_t k = 0; gradient && k < sizes[i]; ++k) squared += double(gradient[k]) * double(gradient[k]);
    }
    call.norms[step] = std::sqrt(squared);
  }
  const bool clips = call.max_norm > 0;
  const T shrink = clips ? T(std::min(1.0, call.max_norm / (call.norms[step] + 1e-6))) : T(1);
  if (call.rule == kNoStep) return;
  const double rate = call.rates[step], number = double(call.steps_before + step + 1);
  const T decay = T(call.weight_decay);
  const bool adam = call.rule != kSgd;
  const double bias1 = 1 - std::pow(call.beta1, number), bias2 = 1 - std::pow(call.beta2, number);
  const T step_size = T(adam ? rate / bias1 : rate), root = T(std::sqrt(bias2)), kept = T(1 - rate * call.weight_decay);
  const T beta2 = T(call.beta2), new1 = T(1 - call.beta1), new2 = T(1 - call.beta2), epsilon = T(call.epsilon);
  for (size_t i = 0; i < sizes.size(); ++i) {
    T *value = at(call.values, i), *gradient = at(call.gradients, i);
    if (gradient == nullptr) continue;
    if (clips) {
      over_packs<T>(sizes[i], [shrink](P& g) { g = g * shrink; }, gradient);
    }
    if (adam) {
      const bool decoupled = call.rule == kAdamW;
      over_packs<T>(
          sizes[i],
          [&](P& x, P& g, P& m, P& v) {
            P slope = g;
            if (decoupled) {
              x = x * kept;
            } else {
              slope = slope + x * decay;
            }
            m = m + (slope - m) * new1;
            v = v * beta2 + slope * slope * new2;
            x = x - m / (square_root(v) / broadcast<P>(root) + epsilon) * step_size;
          },
          value, gradient, at(call.first, i), at(call.second, i));
    } else if (call.momentum != 0) {
      over_packs<T>(
          sizes[i],
          [&](P& x, P& g, P& m) {
            const P slope = g + x * decay;
            m = m * T(call.momentum) + slope * T(1 - call.dampening);
            x = x - (call.nesterov ? slope + m * T(call.momentum) : m) * step_size;
          },
          value, gradient, at(call.first, i));
    } else {
      over_packs<T>(sizes[i], [&](P& x, P& g) { x = x - (g + x * decay) * step_size; }, value, gradient);
    }
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
