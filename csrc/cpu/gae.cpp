// Generalised advantage estimation on the CPU: a scan over steps from the last to the first, and its adjoint from the
// first to the last, one column a lane.
#include "cpu/tiles.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

// In which columns a step went on within its episode, and in which the state after it has a value: it is not terminal.
template <class V>
struct Step {
  using Mask = Pack<MaskElement<Element<V>>, LaneTraits<V>::width>;
  Mask goes_on, has_value;

  Step(Tile tile, const uint8_t* ended) {
    constexpr int width = LaneTraits<V>::width;
    typedef uint8_t Bytes __attribute__((vector_size(width)));
    Bytes code{};
    memcpy(&code, ended + tile.begin, size_t(tile.count));
    const Mask wide{__builtin_convertvector(code, typename Mask::Vector)};
    goes_on = wide == MaskElement<Element<V>>(kGoesOn);
    has_value = wide != MaskElement<Element<V>>(kTerminated);
  }
};

}  // namespace

Verdict gae(const Gae& call) {
  return with_lanes(call, [](auto lane, const Gae& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t rows = call.rows, steps = call.steps;
    const T gamma = T(*call.gamma), decay = T(*call.gamma * *call.lam);
    const auto at = [&](Tile tile, Input input, int64_t t) {
      V x;
      load(tile, slice<T>(input, t, rows, 1), 1, &x);
      return x;
    };
    return for_each_tile<V>(call, 8 * steps, 64, [&](Tile tile, Arena<V>) -> Verdict {
      V advantage{}, next = at(tile, call.values, steps);
      for (int64_t t = steps - 1; t >= 0; --t) {
        const Step<V> step(tile, call.dones + t * rows);
        const V value = at(tile, call.values, t);
        const V error = at(tile, call.rewards, t) - value + select(step.has_value, next * gamma, V{});
        advantage = error + select(step.goes_on, advantage * decay, V{});
        store(tile, P(output(advantage)), slice<T>(call.out, t, rows, 1));
        next = value;
      }
      if (call.rewards.gradient == nullptr && call.values.gradient == nullptr) return {};
      const auto put = [&](const V& x, void* gradient, int64_t t) {
        if (gradient != nullptr) store(tile, P(output(x)), slice<T>(gradient, t, rows, 1));
      };
      V pull{}, to_value{};
      for (int64_t t = 0; t < steps; ++t) {
        pull = pull + at(tile, call.cotangent, t);
        put(pull, call.rewards.gradient, t);
        put(to_value - pull, call.values.gradient, t);
        const Step<V> step(tile, call.dones + t * rows);
        to_value = select(step.has_value, pull * gamma, V{});
        pull = select(step.goes_on, pull * decay, V{});
      }
      put(to_value, call.values.gradient, steps);
      return {};
    });
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
