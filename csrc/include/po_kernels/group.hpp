// A group of samples of one row: their rewards, and the surrogate they make. A team shares the samples of the group.
#pragma once

#include "po_kernels/advantage.hpp"

namespace po_kernels {

enum Estimator : int { kClosedForm = 0, kReparam = 1, kDice = 2, kReinforce = 3 };
constexpr std::pair<const char*, int> kEstimators[] = {{"analytic", kClosedForm},
                                                       {"exact", kClosedForm},
                                                       {"reparam", kReparam},
                                                       {"dice", kDice},
                                                       {"reinforce", kReinforce}};

struct MaybeNumber {
  bool given = false;
  double value = 0.0;
};

struct Surrogate {
  int estimator = kClosedForm;
  int advantage = kNone;
  int64_t num_samples = 0;    // G
  double entropy_coef = 0.0;  // lambda
  MaybeNumber rbf_gamma;
};

inline namespace PK_LEVEL {

// A group in the making: rewards and, for score-function estimators, w - 1, whose value is zero and whose tangent is
// that of log p. `finish` turns them into what the gradients need.
template <class V>
struct Group {
  V* reward;     // (G) after the rbf transformation
  V* excess;     // (G) w - 1; on duals only
  V* advantage;  // (G)
  V* pull;       // (G) derivative of Σ_g [r_g + (w_g - 1) A_g] in the untransformed r_g
};

// A group in scratch: 4 count lane values.
template <class V>
PK_CALL Group<V> group_in(V* scratch, Index count) {
  return {scratch, scratch + count, scratch + 2 * count, scratch + 3 * count};
}

template <class V>
PK_CALL V transformed_reward(const Surrogate& s, V reward) {
  return s.rbf_gamma.given ? exp(reward * Element<V>(s.rbf_gamma.value)) : reward;
}

// Returns (1/G) Σ_g [r_g + (w_g - 1) A_g]. Without `pulls`, leaves out `pull` where it is one for all.
template <class V, class Team = Alone>
PK_CALL V finish(const Surrogate& s, Group<V> group, Team team = {}, bool pulls = true) {
  using T = Element<V>;
  const Index count = s.num_samples;
  const bool score = s.estimator != kReparam;
  V sum = team.template sum<V>(count, [&](Index g) PK_LAMBDA { return group.reward[g]; });
  if (score) advantages(s.advantage, count, group.reward, group.advantage, team);
  if constexpr (is_dual<V>) {
    if (score) {
      sum = sum + team.template sum<V>(count, [&](Index g) PK_LAMBDA { return group.excess[g] * group.advantage[g]; });
      team.each(count, [&](Index g) PK_LAMBDA { group.pull[g] = group.excess[g]; });
      advantages_transposed(s.advantage, count, group.reward, group.pull, team);
    } else {
      team.each(count, [&](Index g) PK_LAMBDA { group.pull[g] = V{}; });
    }
    team.each(count, [&](Index g) PK_LAMBDA { group.pull[g] = group.pull[g] + T(1); });
  } else if (pulls || s.rbf_gamma.given) {
    team.each(count, [&](Index g) PK_LAMBDA { group.pull[g] = constant<V>(T(1)); });
  }
  if (s.rbf_gamma.given) {
    team.each(count,
              [&](Index g) PK_LAMBDA { group.pull[g] = group.pull[g] * group.reward[g] * T(s.rbf_gamma.value); });
  }
  return sum * ratio<T>(1, count);
}

// Statistics of a row, in the order of LossStats.
template <class V>
struct RowStats {
  V reward_mean, reward_std, entropy, log_prob, advantage_std;
};

// The rewards' and the advantages' part, of a finished group.
template <class V, class Team = Alone>
PK_CALL RowStats<V> group_stats(const Surrogate& s, Group<V> group, Team team = {}) {
  RowStats<V> stats{};
  stats.reward_mean = group_mean_from_first(s.num_samples, group.reward, team) + group.reward[0];
  stats.reward_std = group_std(s.num_samples, group.reward, team);
  if (s.estimator == kReparam) advantages(s.advantage, s.num_samples, group.reward, group.advantage, team);
  stats.advantage_std = group_std(s.num_samples, group.advantage, team);
  return stats;
}

// w_g A_g, the factor of the score ∇ log p.
template <class V>
PK_CALL V score_factor(Group<V> group, Index g) {
  if constexpr (is_dual<V>) {
    return group.advantage[g] + group.excess[g] * group.advantage[g];
  } else {
    return group.advantage[g];
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
