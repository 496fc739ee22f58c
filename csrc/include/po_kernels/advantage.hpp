// Advantages of a group of samples of one row: all that has to be known of one is in this file. A team shares the
// samples of the group.
#pragma once

#include <utility>

#include "po_kernels/team.hpp"

namespace po_kernels {

enum Advantage : int { kNone = 0, kMin = 1, kMean = 2, kLoo = 3, kStandardized = 4 };
constexpr std::pair<const char*, int> kAdvantages[] = {
    {"none", kNone}, {"min", kMin}, {"mean", kMean}, {"loo", kLoo}, {"standardized", kStandardized}};

inline namespace PK_LEVEL {

constexpr double kStandardizedEpsilon = 1e-6;

// Mean over the group, relative to its first member, so that equal members have no rounding between them.
template <class V, class Team = Alone>
PK_FN V group_mean_from_first(Index count, const V* x, Team team = {}) {
  const V sum = team.template sum<V>(count - 1, [&](Index g) PK_LAMBDA { return x[g + 1] - x[0]; });
  return sum * ratio<Element<V>>(1, count);
}

// Standard deviation with the count in the denominator; zero, with no derivative, for equal members. Deviations are
// squared relative to the largest, so that they neither overflow nor vanish.
template <class V, class Team = Alone>
PK_FN V group_std(Index count, const V* x, Team team = {}) {
  using T = Element<V>;
  using P = Primal<V>;
  const V mean = group_mean_from_first(count, x, team);
  const auto size = [&](Index g) PK_LAMBDA {
    const P deviation = stop(x[g] - x[0] - mean);
    return select(deviation < T(0), -deviation, deviation);
  };
  const auto larger = [](P a, P b) PK_LAMBDA { return select(a >= b, a, b); };  // a nan is taken
  const P largest = team.template fold<P>(count, P{}, size, larger);
  const auto varies = largest != T(0);
  const P unit = select(varies, largest, broadcast<P>(T(1)));
  const P inverse = broadcast<P>(T(1)) / unit;
  const V sum = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return square((x[g] - x[0] - mean) * inverse); });
  const V variance = select(varies, sum * ratio<T>(1, count), constant<V>(T(1)));
  return select(varies, square_root(variance) * unit, V{});
}

// A over the G rewards of a row, which may be written in their place.
template <class V, class Team = Alone>
PK_FN void advantages(int kind, Index count, const V* reward, V* advantage, Team team = {}) {
  using T = Element<V>;
  using P = Primal<V>;
  const V first = reward[0];
  if (kind == kNone) {
    team.each(count, [&](Index g) PK_LAMBDA { advantage[g] = reward[g]; });
    return;
  }
  if (kind == kMin) {
    const P least = team.template fold<P>(
        count, stop(first), [&](Index g) PK_LAMBDA { return stop(reward[g]); },
        [](P a, P b) PK_LAMBDA { return select(b < a, b, a); });
    team.each(count, [&](Index g) PK_LAMBDA { advantage[g] = reward[g] - least; });
    return;
  }
  const V mean = group_mean_from_first(count, reward, team);
  if (kind == kStandardized) {
    const V std = group_std(count, reward, team);
    const auto varies = stop(std) != T(0);
    const V inverse = constant<V>(T(1)) / (std + T(kStandardizedEpsilon));
    team.each(count,
              [&](Index g) PK_LAMBDA { advantage[g] = select(varies, (reward[g] - first - mean) * inverse, V{}); });
    return;
  }
  const T scale = kind == kLoo ? ratio<T>(count, count - 1) : T(1);
  team.each(count, [&](Index g) PK_LAMBDA { advantage[g] = (reward[g] - first - mean) * scale; });
}

// u <- Jᵀ u with J the Jacobian of the advantages in the rewards.
template <class V, class Team = Alone>
PK_FN void advantages_transposed(int kind, Index count, const V* reward, V* u, Team team = {}) {
  using T = Element<V>;
  if (kind == kNone || kind == kMin) return;
  const T inverse_count = ratio<T>(1, count);
  const V mean = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return u[g]; }) * inverse_count;
  if (kind != kStandardized) {
    const T scale = kind == kLoo ? ratio<T>(count, count - 1) : T(1);
    team.each(count, [&](Index g) PK_LAMBDA { u[g] = (u[g] - mean) * scale; });
    return;
  }
  const V reward_mean = group_mean_from_first(count, reward, team);
  const V std = group_std(count, reward, team);
  const auto varies = stop(std) != T(0);
  const V safe = select(varies, std, constant<V>(T(1)));
  const V inverse = constant<V>(T(1)) / (safe + T(kStandardizedEpsilon));
  const auto centred = [&](Index g) PK_LAMBDA { return reward[g] - reward[0] - reward_mean; };
  const V dot = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return u[g] * centred(g); });
  const V slope = dot * inverse * inverse / safe * inverse_count;
  team.each(count,
            [&](Index g) PK_LAMBDA { u[g] = select(varies, (u[g] - mean) * inverse - centred(g) * slope, V{}); });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
