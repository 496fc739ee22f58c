// Group advantages on the CPU.
#include "cpu/tiles.hpp"
#include "po_kernels/group.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

Verdict group_advantage(const GroupAdvantage& call) {
  return with_lanes(call, [](auto lane, const GroupAdvantage& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t count = call.num_samples;
    Surrogate s{};
    s.rbf_gamma = call.rbf_gamma;
    return for_each_tile<V>(
        call, 8 * count, sizeof(V) * size_t(3 * count) + 1024, [&](Tile tile, Arena<V> arena) -> Verdict {
          V* reward = arena.take(count);
          V* advantage = arena.take(count);
          V* pull = arena.take(count);
          for (int64_t g = 0; g < count; ++g) {
            load(tile, slice<T>(call.rewards, g, call.rows, 1), 1, reward + g);
            reward[g] = transformed_reward(s, reward[g]);
          }
          advantages(call.advantage, count, reward, advantage);
          for (int64_t g = 0; g < count; ++g) {
            const P result = output(advantage[g]);
            store(tile, result, slice<T>(call.out, g, call.rows, 1));
          }
          if (call.rewards.gradient == nullptr) return {};
          for (int64_t g = 0; g < count; ++g) load(tile, slice<T>(call.cotangent, g, call.rows, 1), 1, pull + g);
          advantages_transposed(call.advantage, count, reward, pull);
          for (int64_t g = 0; g < count; ++g) {
            const P result = output(s.rbf_gamma.given ? pull[g] * reward[g] * T(s.rbf_gamma.value) : pull[g]);
            store(tile, result, slice<T>(call.rewards.gradient, g, call.rows, 1));
          }
          return {};
        });
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
