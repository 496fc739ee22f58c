// One row of a categorical policy under the column of a reward table that its label selects.
#pragma once

#include "po_kernels/group.hpp"
#include "po_kernels/philox.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Up to so many classes it is faster to compare a label with each than to go to memory where it points.
constexpr int64_t kFewClasses = 32;

// Where the gradients of a row go, each null if not wanted.
template <class V>
struct CategoricalGradients {
  V weight;
  Primal<V>* logits;
  Primal<V>* column;
};

// The numbers of a class stand in one lane value, for as many rows as it has lanes, or, `across` the lanes, those of as
// many classes of one row, whose other numbers then are the same in all of them. Beyond the last class logits are -inf.
template <class V, bool across = false>
struct CategoricalRow {
  static constexpr int width = across ? LaneTraits<V>::width : 1;

  int64_t classes;
  const V* logits;
  const V* column;  // R[., y]; unused by a surrogate

  PK_CALL int64_t packs() const { return (classes + width - 1) / width; }

  template <class R, class Term>
  PK_CALL R sum(Term term) const {
    const R total = long_sum<R>(packs(), term);
    if constexpr (across) return over_lanes(total);
    return total;
  }

  PK_CALL Primal<V> largest_logit() const {
    Primal<V> top = stop(logits[0]);
    for (int64_t c = 1; c < packs(); ++c) top = select(stop(logits[c]) > top, stop(logits[c]), top);
    if constexpr (across) return largest_lane(top);
    return top;
  }

  // table[label], lane by lane.
  PK_CALL V pick(const V* table, Word<V> label) const {
    if constexpr (across) {
      return from_lane(table[label.v[0] / width], label.v[0] % width);
    } else {
      if (classes > kFewClasses) return gather(table, label);
      V found = table[0];
      for (int64_t c = 1; c < classes; ++c) {
        found = select(element_mask<Primal<V>>(label == uint32_t(c)), table[c], found);
      }
      return found;
    }
  }

  // sums[label] += x, keeping in `rest` what is rounded off (sums.hpp).
  template <class R>
  PK_CALL void add_at(R* sums, R* rest, Word<V> label, R x) const {
    if constexpr (across) {
      const int64_t at = label.v[0] / width;
      Total<R> total{sums[at], rest[at]};
      total.add(in_lane(x, label.v[0] % width));
      sums[at] = total.sum;
      rest[at] = total.rest;
    } else {
      Total<R> total{gather(sums, label), gather(rest, label)};
      total.add(x);
      scatter(sums, label, total.sum);
      scatter(rest, label, total.rest);
    }
  }
};

// e = exp(x - top), whose sum makes p of them.
template <class V>
struct Exponentials {
  Primal<V> top;
  V sum, log_sum;

  // -inf where masked.
  PK_CALL V log_prob(V logit) const {
    return select(stop(logit) > -Element<V>(__builtin_huge_val()), logit - top - log_sum, constant<V>(stop(logit)));
  }
};
template <class V, bool across>
PK_CALL Exponentials<V> exponentiate(CategoricalRow<V, across> row, V* e) {
  const Primal<V> top = row.largest_logit();
  const V sum = row.template sum<V>([&](int64_t c) PK_LAMBDA { return e[c] = exp(row.logits[c] - top); });
  return {top, sum, log(sum)};
}

// p and log p (0 where masked, so that p log p and its derivatives vanish there); returns the entropy.
template <class V, bool across>
PK_CALL V softmax(CategoricalRow<V, across> row, V* p, V* log_p) {
  using T = Element<V>;
  const T infinity = T(__builtin_huge_val());
  const Exponentials<V> e = exponentiate(row, p);
  const V inverse = constant<V>(T(1)) / e.sum;
  return -row.template sum<V>([&](int64_t c) PK_LAMBDA {
    p[c] = p[c] * inverse;
    log_p[c] = select(stop(row.logits[c]) > -infinity, row.logits[c] - e.top - e.log_sum, V{});
    return p[c] * log_p[c];
  });
}

template <class V>
PK_CALL V entropy_slope(V p, V log_p, V entropy) {
  return -(p * (log_p + entropy));
}

// L = -Σ_c p_c r_c - λ H by enumeration. Scratch: 2 classes.
template <class V>
PK_CALL V categorical_closed_form(CategoricalRow<V> row, const Surrogate& s, CategoricalGradients<V> out, V* scratch) {
  using T = Element<V>;
  const int64_t classes = row.classes;
  V* p = scratch;
  V* log_p = scratch + classes;
  const V entropy = softmax(row, p, log_p);
  const V mean = long_sum<V>(classes, [&](int64_t c) PK_LAMBDA { return p[c] * transformed_reward(s, row.column[c]); });
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

// Distribution functions F_c = p_0 + ... + p_c in place of the logits; D holds float64 lanes. From the last class that
// has mass on, F_c is beyond all random numbers.
template <class D>
PK_CALL void categorical_distribution(int64_t classes, D* logits) {
  D top = logits[0];
  for (int64_t c = 1; c < classes; ++c) top = select(logits[c] > top, logits[c], top);
  D last{}, sum{}, cumulative{};
  for (int64_t c = 0; c < classes; ++c) {
    logits[c] = exp(logits[c] - top);
    sum = sum + logits[c];
    last = select(logits[c] > 0.0, broadcast<D>(double(c)), last);
  }
  const D inverse = broadcast<D>(1.0) / sum;
  for (int64_t c = 0; c < classes; ++c) {
    cumulative = cumulative + logits[c];
    logits[c] = select(last > double(c), cumulative * inverse, broadcast<D>(2.0));
  }
}

// Up to so many classes it is faster to compare a random number with each than to search.
constexpr int64_t kCompared = 64;

// Labels of S uniforms u of a row, the classes c that F_c is not above u, from `lane` on of the lanes of labels[0], ...
template <int S, class D, class W>
PK_CALL void categorical_labels(int64_t classes, const D* distribution, const D (&u)[S], int lane, W* labels) {
  constexpr int width = LaneTraits<D>::width;
  if (classes <= kCompared) {
    D label[S];
    unrolled<S>([&](auto s) PK_LAMBDA { label[s] = D{}; });
    for (int64_t c = 0; c < classes; ++c) {
      const D threshold = distribution[c];
      unrolled<S>([&](auto s) PK_LAMBDA { label[s] = select(u[s] >= threshold, label[s] + 1.0, label[s]); });
    }
    unrolled<S>([&](auto s) PK_LAMBDA {
      const auto words = to_words(label[s]);
      memcpy(reinterpret_cast<uint32_t*>(labels + s) + lane, &words, sizeof words);
    });
    return;
  }
  const double* elements = reinterpret_cast<const double*>(distribution);
  for (int i = 0; i < S * width; ++i) {
    const double x = reinterpret_cast<const double*>(u)[i];
    int64_t first = 0;
    for (int64_t left = classes; left > 0;) {
      const int64_t half = left / 2;
      const bool beyond = x >= elements[(first + half) * width + i % width];
      first = beyond ? first + half + 1 : first;
      left = beyond ? left - half - 1 : half;
    }
    reinterpret_cast<uint32_t*>(labels + i / width)[lane + i % width] = uint32_t(first);
  }
}

// The first two words of block 0 of S samples from `sample` on.
template <int S, class W>
PK_CALL void categorical_words(uint64_t seed, uint32_t sample, W row_low, W row_high, Several<W, S>& x0,
                               Several<W, S>& x1) {
  Several<W, S> c2, c3;
  unrolled<S>([&](auto s) PK_LAMBDA {
    constexpr int at = s;
    x0.v[at] = W{};
    x1.v[at] = W{} + (sample + uint32_t(at));
    c2.v[at] = row_low;
    c3.v[at] = row_high;
  });
  philox4x32(x0, x1, c2, c3, seed);
}

// 53 bits of two words, in [0, 1) and exact.
template <class D>
PK_CALL D uniform53(Word<D> x0, Word<D> x1) {
  return from_word<D>(x0 >> 5) * 0x1p-27 + from_word<D>(x1 >> 6) * 0x1p-53;
}

// sums[c] = Σ_g [labels[g] = c] x[g]. Scratch: classes.
template <class V, class Row>
PK_CALL void sum_by_label(const Row& row, int64_t count, const Word<V>* labels, const V* x, V* sums, V* scratch) {
  const int64_t classes = row.classes;
  int64_t c = 0;
  const auto of_classes = [&](auto several) PK_LAMBDA {
    constexpr int N = several;
    V sum[N];
    long_sums(count, sum, [&](int64_t first, int64_t last, V(&run)[N]) PK_LAMBDA {
      for (int64_t g = first; g < last; ++g) {
        const Word<V> label = labels[g];
        const V term = x[g];
        unrolled<N>([&](auto n) PK_LAMBDA {
          const auto here = element_mask<Primal<V>>(label == uint32_t(c + n));
          V& to = run[n];
          to = select(here, to + term, to);
        });
      }
    });
    unrolled<N>([&](auto n) PK_LAMBDA { sums[c + n] = sum[n]; });
    c += N;
  };
  if (classes <= kFewClasses) {
    while (c + 4 <= classes) of_classes(Constant<4>{});
    while (c < classes) of_classes(Constant<1>{});
    return;
  }
  for (; c < row.packs(); ++c) sums[c] = scratch[c] = V{};
  for (int64_t g = 0; g < count; ++g) row.add_at(sums, scratch, labels[g], x[g]);
  for (c = 0; c < row.packs(); ++c) sums[c] = Total<V>{sums[c], scratch[c]}.value();
}

// The score-function surrogate of a group of labels whose rewards are in group.reward (transformed).
// Fills pull, and the gradient in the logits. Scratch: 4 classes + G.
template <class V, bool across>
PK_CALL V categorical_group(CategoricalRow<V, across> row, const Surrogate& s, const Word<V>* labels,
                            CategoricalGradients<V> out, V* scratch, Group<V> group) {
  using T = Element<V>;
  using P = Primal<V>;
  const int64_t packs = row.packs();
  V* p = scratch;
  V* log_p = scratch + packs;
  V* score = scratch + 2 * packs;
  const V entropy = softmax(row, p, log_p);
  if constexpr (is_dual<V>) {
    const P mean = row.template sum<P>([&](int64_t c) PK_LAMBDA { return p[c].v * row.logits[c].t; });
    for (int64_t g = 0; g < s.num_samples; ++g) {
      group.excess[g] = V{P{}, row.pick(row.logits, labels[g]).t - mean};
    }
  }
  const V objective = finish(s, group);
  if (out.logits) {
    V* factor = scratch + 3 * packs;
    const V total = long_sum<V>(s.num_samples, [&](int64_t g) PK_LAMBDA {
      return factor[g] = score_factor(group, g) * T(1.0 / double(s.num_samples));
    });
    sum_by_label(row, s.num_samples, labels, factor, score, factor + s.num_samples);
    for (int64_t c = 0; c < packs; ++c) {
      const V slope = score[c] - p[c] * total + entropy_slope(p[c], log_p[c], entropy) * T(s.entropy_coef);
      out.logits[c] = output(-(out.weight * slope));
    }
  }
  return -objective - entropy * T(s.entropy_coef);
}

// The sampled loss from (G) labels. Scratch: 5 G + 4 classes.
template <class V>
PK_CALL V categorical_sampled(CategoricalRow<V> row, const Surrogate& s, const Word<V>* labels,
                              CategoricalGradients<V> out, V* scratch, Group<V>& group) {
  using T = Element<V>;
  using P = Primal<V>;
  const int64_t count = s.num_samples;
  group = group_in(scratch, count);
  for (int64_t g = 0; g < count; ++g) group.reward[g] = transformed_reward(s, row.pick(row.column, labels[g]));
  const V loss = categorical_group(row, s, labels, out, scratch + 4 * count, group);
  if (out.column) {
    P* terms = reinterpret_cast<P*>(scratch + 4 * count);
    const V unit = out.weight * T(-1.0 / double(count));
    for (int64_t g = 0; g < count; ++g) terms[g] = output(unit * group.pull[g]);
    sum_by_label(row, count, labels, terms, out.column, terms + count);
  }
  return loss;
}

// The loss of given labels (G), which are constants, and their rewards (G). Scratch: 5 G + 4 classes.
template <class V, bool across>
PK_CALL V categorical_given(CategoricalRow<V, across> row, const Surrogate& s, const V* rewards, const Word<V>* labels,
                            CategoricalGradients<V> out, Primal<V>* rewards_out, V* scratch, Group<V>& group) {
  group = group_in(scratch, s.num_samples);
  for (int64_t g = 0; g < s.num_samples; ++g) group.reward[g] = transformed_reward(s, rewards[g]);
  const V loss = categorical_group(row, s, labels, out, scratch + 4 * s.num_samples, group);
  const V unit = out.weight * Element<V>(-1.0 / double(s.num_samples));
  for (int64_t g = 0; rewards_out && g < s.num_samples; ++g) rewards_out[g] = output(unit * group.pull[g]);
  return loss;
}

// log p of a label from the row's p and log p, -inf where masked.
template <class V, bool across>
PK_CALL V label_log_prob(CategoricalRow<V, across> row, const V* log_p, Word<V> label) {
  const V logit = row.pick(row.logits, label);
  const V found = row.pick(log_p, label);
  return select(stop(logit) > -Element<V>(__builtin_huge_val()), found, constant<V>(stop(logit)));
}

// Statistics of a row whose `group` is finished, or of a closed form. Scratch: 2 classes.
template <class V>
PK_CALL RowStats<V> categorical_policy_stats(CategoricalRow<V> row, const Surrogate& s, Word<V> target,
                                             const Group<V>& group, V* scratch) {
  V* p = scratch;
  V* log_p = scratch + row.classes;
  const V entropy = softmax(row, p, log_p);
  RowStats<V> stats{};
  if (s.estimator != kClosedForm) {
    stats = group_stats(s, group);
  } else {
    // Relative to a power of two near the largest reward, so that squares neither overflow nor vanish.
    V unit{};
    for (int64_t c = 0; c < row.classes; ++c) {
      const V reward = transformed_reward(s, row.column[c]);
      const V size = select(reward < V{}, -reward, reward);
      unit = select(size > unit, size, unit);
    }
    unit = power_of_two(unit);
    const V inverse = constant<V>(Element<V>(1)) / unit;
    const auto reward = [&](int64_t c) PK_LAMBDA { return transformed_reward(s, row.column[c]) * inverse; };
    const V mean = long_sum<V>(row.classes, [&](int64_t c) PK_LAMBDA { return p[c] * reward(c); });
    const V variance = long_sum<V>(row.classes, [&](int64_t c) PK_LAMBDA { return p[c] * square(reward(c) - mean); });
    stats.reward_mean = mean * unit;
    stats.reward_std = stats.advantage_std = square_root(variance) * unit;
  }
  stats.entropy = entropy;
  stats.log_prob = label_log_prob(row, log_p, target);
  return stats;
}

// Statistics of a surrogate, whose log-probability is the mean over the labels. Scratch: 2 classes.
template <class V, bool across>
PK_CALL RowStats<V> categorical_given_stats(CategoricalRow<V, across> row, const Surrogate& s, const Word<V>* labels,
                                            const Group<V>& group, V* scratch) {
  V* log_p = scratch + row.packs();
  RowStats<V> stats = group_stats(s, group);
  stats.entropy = softmax(row, scratch, log_p);
  const V log_prob =
      long_sum<V>(s.num_samples, [&](int64_t g) PK_LAMBDA { return label_log_prob(row, log_p, labels[g]); });
  stats.log_prob = log_prob * Element<V>(1.0 / double(s.num_samples));
  return stats;
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
