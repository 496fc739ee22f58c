// One row of a categorical policy under the column of a reward table that its label selects.
#pragma once

#include "po_kernels/group.hpp"
#include "po_kernels/philox.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Where the gradients of a row go, each null if not wanted.
template <class V>
struct CategoricalGradients {
  V weight;
  Primal<V>* logits;
  Primal<V>* column;
};

template <class V>
struct CategoricalRow {
  int64_t classes;
  const V* logits;
  const V* column;  // R[., y]; unused by a surrogate
};

// p and log p (0 where masked, so that p log p and its derivatives vanish there); returns the entropy.
template <class V>
PK_FN V softmax(int64_t classes, const V* logits, V* p, V* log_p) {
  using T = Element<V>;
  const T infinity = T(__builtin_huge_val());
  Primal<V> top = stop(logits[0]);
  for (int64_t c = 1; c < classes; ++c) top = select(stop(logits[c]) > top, stop(logits[c]), top);
  V sum{};
  for (int64_t c = 0; c < classes; ++c) {
    p[c] = exp(logits[c] - top);
    sum = sum + p[c];
  }
  const V inverse = constant<V>(T(1)) / sum;
  const V log_sum = log(sum);
  V entropy{};
  for (int64_t c = 0; c < classes; ++c) {
    p[c] = p[c] * inverse;
    log_p[c] = select(stop(logits[c]) > -infinity, logits[c] - top - log_sum, V{});
    entropy = entropy - p[c] * log_p[c];
  }
  return entropy;
}

template <class V>
PK_FN V entropy_slope(V p, V log_p, V entropy) {
  return -(p * (log_p + entropy));
}

// L = -Σ_c p_c r_c - λ H by enumeration. Scratch: 2 classes.
template <class V>
PK_FN V categorical_closed_form(CategoricalRow<V> row, const Surrogate& s, CategoricalGradients<V> out, V* scratch) {
  using T = Element<V>;
  const int64_t classes = row.classes;
  V* p = scratch;
  V* log_p = scratch + classes;
  const V entropy = softmax(classes, row.logits, p, log_p);
  V mean{};
  for (int64_t c = 0; c < classes; ++c) mean = mean + p[c] * transformed_reward(s, row.column[c]);
  for (int64_t c = 0; c < classes; ++c) {
    const V reward = transformed_reward(s, row.column[c]);
    if (out.logits) {
      const V slope = p[c] * (reward - mean) + entropy_slope(p[c], log_p[c], entropy) * T(s.entropy_coef);
      out.logits[c] = output(-(out.weight * slope));
    }
    if (out.column)
      out.column[c] = output(-(out.weight * (s.rbf_gamma.given ? p[c] * reward * T(s.rbf_gamma.value) : p[c])));
  }
  return -mean - entropy * T(s.entropy_coef);
}

// Inversion thresholds in 24-bit integers; D holds float64 lanes. Lane l of threshold c is at out[c * stride + l].
template <class D>
PK_FN void categorical_thresholds(int64_t classes, const D* logits, D* scratch, uint32_t* out, int64_t stride) {
  D top = logits[0];
  for (int64_t c = 1; c < classes; ++c) top = select(logits[c] > top, logits[c], top);
  D sum{};
  for (int64_t c = 0; c < classes; ++c) {
    scratch[c] = exp(logits[c] - top);
    sum = sum + scratch[c];
  }
  const D inverse = broadcast<D>(16777216.0) / sum;
  D cumulative{};
  constexpr int width = LaneTraits<D>::width;
  for (int64_t c = 0; c < classes; ++c) {
    cumulative = cumulative + scratch[c];
    const D threshold = cumulative * inverse - 0.5;
    for (int l = 0; l < width; ++l) {
      const double t = reinterpret_cast<const double*>(&threshold)[l];
      uint32_t ceiling = static_cast<uint32_t>(static_cast<int32_t>(t));
      if (double(ceiling) < t) ++ceiling;
      out[c * stride + l] = ceiling;
    }
  }
  // No word may pass the last class that has mass.
  for (int l = 0; l < width; ++l) {
    for (int64_t c = classes - 1; c >= 0; --c) {
      out[c * stride + l] = 16777216u;
      if (reinterpret_cast<const double*>(scratch + c)[l] > 0.0) break;
    }
  }
}

// The labels of S samples from `sample` on, of the rows in the lanes.
template <int S, class W>
PK_FN void categorical_labels(uint64_t seed, uint32_t sample, W row_low, W row_high, int64_t classes,
                              const W* thresholds, W* labels) {
  Several<W, S> c0, c1, c2, c3, label;
  unrolled<S>([&](auto s) PK_LAMBDA {
    constexpr int at = s;
    c0.v[at] = label.v[at] = W{};
    c1.v[at] = W{} + (sample + uint32_t(at));
    c2.v[at] = row_low;
    c3.v[at] = row_high;
  });
  philox4x32(c0, c1, c2, c3, seed);
  const auto bits = c0 >> 8;
  for (int64_t c = 0; c < classes; ++c) {
    const W threshold = thresholds[c];
    unrolled<S>([&](auto s) PK_LAMBDA {
      W& to = label.v[s];
      to = to + select(bits.v[s] >= threshold, W{} + 1u, W{});
    });
  }
  unrolled<S>([&](auto s) PK_LAMBDA { labels[s] = label.v[s]; });
}

// Up to so many classes it is faster to compare a label with each than to go to memory where it points.
constexpr int64_t kFewClasses = 32;

// table[label], lane by lane.
template <class V>
PK_FN V pick(int64_t classes, const V* table, Word<V> label) {
  if (classes > kFewClasses) return gather(table, label);
  V found = table[0];
  for (int64_t c = 1; c < classes; ++c) {
    found = select(element_mask<Primal<V>>(label == uint32_t(c)), table[c], found);
  }
  return found;
}

// sums[c] = Σ_g [labels[g] = c] x[g].
template <class V>
PK_FN void sum_by_label(int64_t classes, int64_t count, const Word<V>* labels, const V* x, V* sums) {
  int64_t c = 0;
  const auto of_classes = [&](auto several) PK_LAMBDA {
    constexpr int N = several;
    V sum[N];
    unrolled<N>([&](auto n) PK_LAMBDA { sum[n] = V{}; });
    for (int64_t g = 0; g < count; ++g) {
      const Word<V> label = labels[g];
      const V term = x[g];
      unrolled<N>([&](auto n) PK_LAMBDA {
        const auto here = element_mask<Primal<V>>(label == uint32_t(c + n));
        V& to = sum[n];
        to = select(here, to + term, to);
      });
    }
    unrolled<N>([&](auto n) PK_LAMBDA { sums[c + n] = sum[n]; });
    c += N;
  };
  if (classes <= kFewClasses) {
    while (c + 4 <= classes) of_classes(Constant<4>{});
    while (c < classes) of_classes(Constant<1>{});
    return;
  }
  for (; c < classes; ++c) sums[c] = V{};
  for (int64_t g = 0; g < count; ++g) scatter_add(sums, labels[g], x[g]);
}

// The score-function surrogate of a group of labels whose rewards are in group.reward (transformed).
// Fills pull, and the gradient in the logits. Scratch: 3 classes + G.
template <class V>
PK_FN V categorical_group(CategoricalRow<V> row, const Surrogate& s, const Word<V>* labels, CategoricalGradients<V> out,
                          V* scratch, Group<V> group) {
  using T = Element<V>;
  using P = Primal<V>;
  const int64_t classes = row.classes;
  V* p = scratch;
  V* log_p = scratch + classes;
  V* score = scratch + 2 * classes;
  const V entropy = softmax(classes, row.logits, p, log_p);
  if constexpr (is_dual<V>) {
    P mean{};
    for (int64_t c = 0; c < classes; ++c) mean = mean + p[c].v * row.logits[c].t;
    for (int64_t g = 0; g < s.num_samples; ++g) {
      group.excess[g] = V{P{}, pick(classes, row.logits, labels[g]).t - mean};
    }
  }
  const V objective = finish(s, group);
  if (out.logits) {
    V* factor = scratch + 3 * classes;
    V total{};
    for (int64_t g = 0; g < s.num_samples; ++g) {
      factor[g] = score_factor(group, g) * T(1.0 / double(s.num_samples));
      total = total + factor[g];
    }
    sum_by_label(classes, s.num_samples, labels, factor, score);
    for (int64_t c = 0; c < classes; ++c) {
      const V slope = score[c] - p[c] * total + entropy_slope(p[c], log_p[c], entropy) * T(s.entropy_coef);
      out.logits[c] = output(-(out.weight * slope));
    }
  }
  return -objective - entropy * T(s.entropy_coef);
}

// The sampled loss from (G) labels. Scratch: 5 G + 4 classes.
template <class V>
PK_FN V categorical_sampled(CategoricalRow<V> row, const Surrogate& s, const Word<V>* labels,
                            CategoricalGradients<V> out, V* scratch, Group<V>& group) {
  using T = Element<V>;
  using P = Primal<V>;
  const int64_t count = s.num_samples;
  group = group_in(scratch, count);
  for (int64_t g = 0; g < count; ++g) group.reward[g] = transformed_reward(s, pick(row.classes, row.column, labels[g]));
  const V loss = categorical_group(row, s, labels, out, scratch + 4 * count, group);
  if (out.column) {
    P* terms = reinterpret_cast<P*>(scratch + 4 * count);
    const V unit = out.weight * T(-1.0 / double(count));
    for (int64_t g = 0; g < count; ++g) terms[g] = output(unit * group.pull[g]);
    sum_by_label(row.classes, count, labels, terms, out.column);
  }
  return loss;
}

// The loss of given labels (G), which are constants, and their rewards (G). Scratch: 5 G + 3 classes.
template <class V>
PK_FN V categorical_given(CategoricalRow<V> row, const Surrogate& s, const V* rewards, const Word<V>* labels,
                          CategoricalGradients<V> out, Primal<V>* rewards_out, V* scratch, Group<V>& group) {
  group = group_in(scratch, s.num_samples);
  for (int64_t g = 0; g < s.num_samples; ++g) group.reward[g] = transformed_reward(s, rewards[g]);
  const V loss = categorical_group(row, s, labels, out, scratch + 4 * s.num_samples, group);
  const V unit = out.weight * Element<V>(-1.0 / double(s.num_samples));
  for (int64_t g = 0; rewards_out && g < s.num_samples; ++g) rewards_out[g] = output(unit * group.pull[g]);
  return loss;
}

// log p of a label from the row's p and log p, -inf where masked.
template <class V>
PK_FN V label_log_prob(CategoricalRow<V> row, const V* log_p, Word<V> label) {
  const V logit = pick(row.classes, row.logits, label);
  const V found = pick(row.classes, log_p, label);
  return select(stop(logit) > -Element<V>(__builtin_huge_val()), found, constant<V>(stop(logit)));
}

// Statistics of a row whose `group` is finished, or of a closed form. Scratch: 2 classes.
template <class V>
PK_FN RowStats<V> categorical_policy_stats(CategoricalRow<V> row, const Surrogate& s, Word<V> target,
                                           const Group<V>& group, V* scratch) {
  V* p = scratch;
  V* log_p = scratch + row.classes;
  const V entropy = softmax(row.classes, row.logits, p, log_p);
  RowStats<V> stats{};
  if (s.estimator != kClosedForm) {
    stats = group_stats(s, group);
  } else {
    V mean{}, variance{};
    for (int64_t c = 0; c < row.classes; ++c) mean = mean + p[c] * transformed_reward(s, row.column[c]);
    for (int64_t c = 0; c < row.classes; ++c) {
      variance = variance + p[c] * square(transformed_reward(s, row.column[c]) - mean);
    }
    stats.reward_mean = mean;
    stats.reward_std = stats.advantage_std = square_root(variance);
  }
  stats.entropy = entropy;
  stats.log_prob = label_log_prob(row, log_p, target);
  return stats;
}

// Statistics of a surrogate, whose log-probability is the mean over the labels. Scratch: 2 classes.
template <class V>
PK_FN RowStats<V> categorical_given_stats(CategoricalRow<V> row, const Surrogate& s, const Word<V>* labels,
                                          const Group<V>& group, V* scratch) {
  V* log_p = scratch + row.classes;
  RowStats<V> stats = group_stats(s, group);
  stats.entropy = softmax(row.classes, row.logits, scratch, log_p);
  for (int64_t g = 0; g < s.num_samples; ++g) stats.log_prob = stats.log_prob + label_log_prob(row, log_p, labels[g]);
  stats.log_prob = stats.log_prob * Element<V>(1.0 / double(s.num_samples));
  return stats;
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
