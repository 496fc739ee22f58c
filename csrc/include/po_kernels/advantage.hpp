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
PK_CALL V group_mean_from_first(Index count, const V* x, Team team = {}) {
  const V sum = team.template sum<V>(count - 1, [&](Index g) PK_LAMBDA { return x[g + 1] - x[0]; });
  return sum * ratio<Element<V>>(1, count);
}

// The standard deviation of a group, with the count in the denominator: zero, with no derivative, for equal members.
// All is relative to a power of two near the largest member, so that squares neither overflow nor vanish and nothing is
// divided by a subnormal number; a derivative by a member that is itself subnormal is as finite as it should be.
template <class V>
struct Spread {
  using T = Element<V>;
  using P = Primal<V>;

  const V* x;
  P unit, inverse;       // a power of two near the largest |x|, and 1 over it
  P first, mean;         // of x / unit; the mean is relative to the first
  P relative;            // std / unit
  P inverse_relative{};  // 0 for equal members
  V std{};
  V mean_from_first{};  // of x; on duals only, and only its tangent is used

  template <class Team>
  PK_CALL Spread(Index count, const V* x, Team team) : x(x) {
    const T per_member = ratio<T>(1, count);
    const auto size = [&](Index g) PK_LAMBDA {
      const P value = stop(x[g]);
      return select(value < T(0), -value, value);
    };
    const auto larger = [](P a, P b) PK_LAMBDA { return select(a >= b, a, b); };
    unit = power_of_two(team.template fold<P>(count, P{}, size, larger));
    inverse = broadcast<P>(T(1)) / unit;
    first = stop(x[0]) * inverse;
    mean = P{};
    mean = team.template sum<P>(count - 1, [&](Index g) PK_LAMBDA { return deviation(g + 1); }) * per_member;
    const P squares = team.template sum<P>(count, [&](Index g) PK_LAMBDA { return square(deviation(g)); });
    relative = square_root(squares * per_member);
    const auto varies = squares != T(0);  // also nan
    inverse_relative = select(varies, broadcast<P>(T(1)) / select(varies, relative, broadcast<P>(T(1))), P{});
    if constexpr (is_dual<V>) {
      mean_from_first = group_mean_from_first(count, x, team);
      const P slope = team.template sum<P>(count, [&](Index g) PK_LAMBDA { return direction(g) * tangent(g); });
      std = V{relative * unit, slope * per_member};
    } else {
      std = relative * unit;
    }
  }

  // Of (x_g - mean x) / unit, of that over std / unit, and the tangent of x_g - mean x.
  PK_CALL P deviation(Index g) const { return stop(x[g]) * inverse - first - mean; }
  PK_CALL P direction(Index g) const { return deviation(g) * inverse_relative; }
  PK_CALL P tangent(Index g) const { return x[g].t - x[0].t - mean_from_first.t; }
};

template <class V, class Team = Alone>
PK_CALL V group_std(Index count, const V* x, Team team = {}) {
  return Spread<V>(count, x, team).std;
}

// Standardized advantages A = (x - mean x) / (std x + 1e-6), and their transposed Jacobian.
template <class V>
struct Standardized : Spread<V> {
  using typename Spread<V>::T, typename Spread<V>::P;
  using Spread<V>::deviation, Spread<V>::direction, Spread<V>::tangent, Spread<V>::std, Spread<V>::relative;

  P factor, inverse_std;  // unit and 1, over std + 1e-6; 0 for equal members

  template <class Team>
  PK_CALL Standardized(Index count, const V* x, Team team) : Spread<V>(count, x, team) {
    const P one = broadcast<P>(T(1));
    factor = select(this->inverse_relative != T(0), one / (relative + this->inverse * T(kStandardizedEpsilon)), P{});
    inverse_std = factor * this->inverse;
  }

  PK_CALL V advantage(Index g) const {
    const P value = deviation(g) * factor;
    if constexpr (is_dual<V>) {
      return {value, (tangent(g) - value * std.t) * inverse_std};
    } else {
      return value;
    }
  }

  // u <- Jᵀ u: with n = (x - mean x) / std, (u - mean u) / (std + 1e-6) - (x - mean x) mean(u n) / (std + 1e-6)².
  template <class Team>
  PK_CALL void transpose(Index count, V* u, Team team) const {
    const T per_member = ratio<T>(1, count);
    const V mean = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return u[g]; }) * per_member;
    const V along = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return u[g] * direction(g); }) * per_member;
    if constexpr (is_dual<V>) {
      // The tangent of n is (ẋ - mean ẋ - n ṡtd) / std, of which that divisor meets the std in x - mean x = n std.
      const P turned = team.template sum<P>(count, [&](Index g) PK_LAMBDA { return u[g].v * tangent(g); }) * per_member;
      const P rest = (turned - along.v * std.t) * inverse_std + along.t * (relative * factor);
      team.each(count, [&](Index g) PK_LAMBDA {
        const P value = u[g].v - mean.v - deviation(g) * factor * along.v;
        const P falling = deviation(g) * factor * along.v * std.t - tangent(g) * along.v;
        u[g] = {value * inverse_std,
                (u[g].t - mean.t - value * std.t * inverse_std + falling * inverse_std - direction(g) * rest) *
                    inverse_std};
      });
    } else {
      team.each(count, [&](Index g) PK_LAMBDA { u[g] = (u[g] - mean - deviation(g) * factor * along) * inverse_std; });
    }
  }
};

// A over the G rewards of a row.
template <class V, class Team = Alone>
PK_CALL void advantages(int kind, Index count, const V* reward, V* advantage, Team team = {}) {
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
  if (kind == kStandardized) {
    const Standardized<V> standardized(count, reward, team);
    team.each(count, [&](Index g) PK_LAMBDA { advantage[g] = standardized.advantage(g); });
    return;
  }
  const V mean = group_mean_from_first(count, reward, team);
  const T scale = kind == kLoo ? ratio<T>(count, count - 1) : T(1);
  team.each(count, [&](Index g) PK_LAMBDA { advantage[g] = (reward[g] - first - mean) * scale; });
}

// u <- Jᵀ u with J the Jacobian of the advantages in the rewards.
template <class V, class Team = Alone>
PK_CALL void advantages_transposed(int kind, Index count, const V* reward, V* u, Team team = {}) {
  using T = Element<V>;
  if (kind == kNone || kind == kMin) return;
  if (kind == kStandardized) {
    Standardized<V>(count, reward, team).transpose(count, u, team);
    return;
  }
  const V mean = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return u[g]; }) * ratio<T>(1, count);
  const T scale = kind == kLoo ? ratio<T>(count, count - 1) : T(1);
  team.each(count, [&](Index g) PK_LAMBDA { u[g] = (u[g] - mean) * scale; });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
