// Categorical policies on the CPU.
#include "po_kernels/categorical.hpp"

#include "cpu/tiles.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

// Samples can be drawn only where the largest logit is finite; without, nan and inf pass on into the value.
template <class T>
Verdict check_logits(Tile tile, int64_t classes, RowInput logits, bool sampled) {
  const T infinity = T(__builtin_huge_val());
  for (int64_t row = tile.begin; row < tile.begin + tile.count; ++row) {
    const T* at = static_cast<const T*>(logits.value) + row * logits.stride;
    bool masked = true, finite = true;
    for (int64_t c = 0; c < classes; ++c) {
      masked = masked & (at[c] == -infinity);
      finite = finite & (at[c] < infinity);
    }
    if (masked) return {kAllMasked, row};
    if (sampled && !finite) return {kLogitsNotFinite, row};
  }
  return {};
}

// labels: (count, rows).
inline Verdict check_labels(Tile tile, int64_t count, int64_t rows, int64_t classes, const int64_t* labels) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = tile.begin; row < tile.begin + tile.count; ++row) {
      if (labels[i * rows + row] < 0 || labels[i * rows + row] >= classes) return {kLabelOutOfRange, row};
    }
  }
  return {};
}

// A label of probability zero has no score.
template <class T>
Verdict check_unmasked(Tile tile, int64_t count, int64_t rows, RowInput logits, const int64_t* labels) {
  const T infinity = T(__builtin_huge_val());
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t row = tile.begin; row < tile.begin + tile.count; ++row) {
      const T* at = static_cast<const T*>(logits.value) + row * logits.stride;
      if (at[labels[i * rows + row]] == -infinity) return {kLabelMasked, row};
    }
  }
  return {};
}

// The table of rewards column by column, as the rows look at it: value, and on duals tangent.
template <class V>
struct RewardColumns {
  using T = Element<V>;
  int64_t classes;
  std::unique_ptr<T[]> value, tangent;

  explicit RewardColumns(const CategoricalPolicyLoss& call)
      : classes(call.classes), value(transposed(call.reward_table.value, classes)) {
    if (is_dual<V> && call.reward_table.tangent) tangent = transposed(call.reward_table.tangent, classes);
  }

  static std::unique_ptr<T[]> transposed(const void* from, int64_t classes) {
    std::unique_ptr<T[]> to(new T[size_t(classes * classes)]);
    for (int64_t i = 0; i < classes; ++i) {
      for (int64_t j = 0; j < classes; ++j) to[j * classes + i] = static_cast<const T*>(from)[i * classes + j];
    }
    return to;
  }

  // Column y of the table for each row, y its label.
  void load(Tile tile, const int64_t* labels, V* to) const {
    constexpr int width = LaneTraits<V>::width;
    constexpr int64_t step = sizeof(V) / sizeof(T);
    T* elements = reinterpret_cast<T*>(to);
    const T* row[width];
    const auto addresses = [&](const T* table) {
      for (int l = 0; l < width; ++l) row[l] = table + labels[tile.begin + std::min(l, tile.count - 1)] * classes;
    };
    addresses(value.get());
    rows_to_lanes<T, width>(row, classes, elements, step);
    if constexpr (is_dual<V>) {
      if (tangent) {
        addresses(tangent.get());
        rows_to_lanes<T, width>(row, classes, elements + width, step);
      } else {
        for (int64_t c = 0; c < classes; ++c) to[c].t = Primal<V>{};
      }
    }
  }
};

// Labels of a tile's rows, by thresholds computed in double whatever V is.
template <class V>
void sample_labels(const RandomNumbers& call, RowInput input, int64_t samples, int64_t classes, Tile tile,
                   Arena<V> arena, Word<V>* labels) {
  using T = Element<V>;
  using D = Lanes<double>;
  constexpr int width = LaneTraits<V>::width;
  constexpr int part = LaneTraits<D>::width;
  Word<V>* thresholds = arena.template take<Word<V>>(classes);
  D* logits = arena.template take<D>(2 * classes);
  for (int first = 0; first < width; first += part) {
    double* elements = reinterpret_cast<double*>(logits);
    for (int l = 0; l < part; ++l) {
      const int64_t row = tile.begin + std::min(first + l, tile.count - 1);
      const T* from = static_cast<const T*>(input.value) + row * input.stride;
      for (int64_t c = 0; c < classes; ++c) elements[c * part + l] = double(from[c]);
    }
    categorical_thresholds(classes, logits, logits + classes, reinterpret_cast<uint32_t*>(thresholds) + first, width);
  }
  Word<V> low, high;
  row_numbers(call, tile, low, high);
  int64_t g = 0;
  for (; g + 2 <= samples; g += 2) {
    categorical_labels<2>(call.seed, uint32_t(g), low, high, classes, thresholds, labels + g);
  }
  if (g < samples) categorical_labels<1>(call.seed, uint32_t(g), low, high, classes, thresholds, labels + g);
}

template <class V>
size_t sample_bytes(int64_t classes) {
  return sizeof(Word<V>) * size_t(classes) + sizeof(Lanes<double>) * size_t(2 * classes) + 256;
}

}  // namespace

Verdict categorical_policy_loss(const CategoricalPolicyLoss& call) {
  return with_lanes(call, [](auto lane, const CategoricalPolicyLoss& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t classes = call.classes, samples = call.num_samples;
    constexpr int width = LaneTraits<V>::width;
    const Surrogate s = call;
    const RewardColumns<V> columns(call);
    // The table's gradient is scattered by label, so that its sums are elements, not lane values.
    const SharedSums sums{classes * classes, call.reward_table.gradient != nullptr, false};
    const size_t bytes = sizeof(V) * size_t(6 * classes + 5 * samples) + sizeof(P) * size_t(4 * classes) +
                         sizeof(Word<V>) * size_t(samples) + sample_bytes<V>(classes) + 1024;
    const Totals totals =
        for_each_tile<V>(call, 8 * classes + samples * (16 + classes), sums, bytes,
                         [&](Tile tile, Arena<V> arena, P* shared, P& loss, RowStats<P>& stats) -> Verdict {
                           Verdict verdict = check_labels(tile, 1, call.rows, classes, call.target);
                           if (verdict.code == kAccepted)
                             verdict = check_logits<T>(tile, classes, call.logits, samples > 0);
                           if (verdict.code != kAccepted) return verdict;
                           V* logits = arena.take(classes);
                           V* column = arena.take(classes);
                           V* work = arena.take(4 * classes + 5 * samples);
                           Word<V>* labels = arena.template take<Word<V>>(samples);
                           load(tile, call.logits, classes, logits);
                           columns.load(tile, call.target, column);
                           const CategoricalRow<V> row{classes, logits, column};
                           const CategoricalGradients<V> out{
                               load_weight<V>(call, tile), arena.template take_for<P>(call.logits.gradient, classes),
                               arena.template take_for<P>(call.reward_table.gradient, classes)};
                           Group<V> group{};
                           if (s.estimator == kClosedForm) {
                             loss = output(categorical_closed_form(row, s, out, work));
                           } else {
                             sample_labels(call, call.logits, samples, classes, tile, arena, labels);
                             loss = output(categorical_sampled(row, s, labels, out, work, group));
                           }
                           if constexpr (!is_dual<V>) {
                             if (call.stats) {
                               const Word<V> target = load_labels<Word<V>>(tile, call.target);
                               stats = categorical_policy_stats(row, s, target, group, work + 4 * samples);
                             }
                           }
                           store(tile, out.logits, classes, call.logits.gradient, arena);
                           if (out.column) {  // summed column by column too
                             T* rows = reinterpret_cast<T*>(arena.template take<P>(classes));
                             T* row[width];
                             for (int l = 0; l < width; ++l) row[l] = rows + l * classes;
                             lanes_to_rows<T, width>(out.column, classes, row);
                             for (int l = 0; l < tile.count; ++l) {
                               T* sum = reinterpret_cast<T*>(shared) + call.target[tile.begin + l] * classes;
                               for (int64_t c = 0; c < classes; ++c) sum[c] += row[l][c];
                             }
                           }
                           return {};
                         });
    if (totals.verdict.code != kAccepted || call.reward_table.gradient == nullptr) return totals.verdict;
    for (int64_t i = 0; i < classes; ++i) {
      for (int64_t j = 0; j < classes; ++j) {
        static_cast<T*>(call.reward_table.gradient)[i * classes + j] = T(totals.shared()[j * classes + i]);
      }
    }
    return {};
  });
}

Verdict categorical_surrogate_loss(const CategoricalSurrogateLoss& call) {
  return with_lanes(call, [](auto lane, const CategoricalSurrogateLoss& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t classes = call.classes, samples = call.num_samples;
    const Surrogate s = call;
    const size_t bytes = sizeof(V) * size_t(5 * classes + 6 * samples) + sizeof(P) * size_t(2 * classes + samples) +
                         sizeof(Word<V>) * size_t(samples) + 1024;
    const int64_t operations = 8 * classes + 8 * samples;
    const Totals totals = for_each_tile<V>(
        call, operations, SharedSums{}, bytes,
        [&](Tile tile, Arena<V> arena, P*, P& loss, RowStats<P>& stats) -> Verdict {
          Verdict verdict = check_labels(tile, samples, call.rows, classes, call.samples);
          if (verdict.code == kAccepted) verdict = check_logits<T>(tile, classes, call.logits, false);
          if (verdict.code == kAccepted)
            verdict = check_unmasked<T>(tile, samples, call.rows, call.logits, call.samples);
          if (verdict.code != kAccepted) return verdict;
          V* logits = arena.take(classes);
          V* rewards = arena.take(samples);
          V* work = arena.take(4 * classes + 5 * samples);
          P* rewards_out = arena.template take_for<P>(call.rewards.gradient, samples);
          Word<V>* labels = arena.template take<Word<V>>(samples);
          load(tile, call.logits, classes, logits);
          for (int64_t g = 0; g < samples; ++g) {
            load(tile, slice<T>(call.rewards, g, call.rows, 1), 1, rewards + g);
            labels[g] = load_labels<Word<V>>(tile, call.samples + g * call.rows);
          }
          const CategoricalRow<V> row{classes, logits, nullptr};
          const CategoricalGradients<V> out{load_weight<V>(call, tile),
                                            arena.template take_for<P>(call.logits.gradient, classes), nullptr};
          Group<V> group{};
          loss = output(categorical_given(row, s, rewards, labels, out, rewards_out, work, group));
          if constexpr (!is_dual<V>) {
            if (call.stats) stats = categorical_given_stats(row, s, labels, group, work + 4 * samples);
          }
          store(tile, out.logits, classes, call.logits.gradient, arena);
          for (int64_t g = 0; rewards_out && g < samples; ++g) {
            store(tile, rewards_out[g], slice<T>(call.rewards.gradient, g, call.rows, 1));
          }
          return {};
        });
    return totals.verdict;
  });
}

Verdict categorical_log_prob(const CategoricalLogProb& call) {
  return with_lanes(call, [](auto lane, const CategoricalLogProb& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t classes = call.classes;
    const size_t bytes = sizeof(V) * size_t(4 * classes) + sizeof(P) * size_t(2 * classes) + 1024;
    return for_each_tile<V>(call, 8 * classes + 4 * call.count, bytes, [&](Tile tile, Arena<V> arena) -> Verdict {
      Verdict verdict = check_labels(tile, call.count, call.rows, classes, call.value);
      if (verdict.code == kAccepted) verdict = check_logits<T>(tile, classes, call.logits, false);
      if (verdict.code != kAccepted) return verdict;
      V* logits = arena.take(classes);
      V* p = arena.take(classes);
      V* log_p = arena.take(classes);
      V* score = arena.take(classes);
      P* gradient = arena.template take<P>(classes);
      load(tile, call.logits, classes, logits);
      const CategoricalRow<V> row{classes, logits, nullptr};
      softmax(classes, logits, p, log_p);
      for (int64_t c = 0; c < classes; ++c) score[c] = V{};
      V total{};
      for (int64_t i = 0; i < call.count; ++i) {
        const Word<V> label = load_labels<Word<V>>(tile, call.value + i * call.rows);
        const P result = output(label_log_prob(row, log_p, label));
        store(tile, result, slice<T>(call.out, i, call.rows, 1));
        if (call.logits.gradient) {
          V weight;
          load(tile, slice<T>(call.cotangent, i, call.rows, 1), 1, &weight);
          scatter_add(score, label, weight);
          total = total + weight;
        }
      }
      if (call.logits.gradient == nullptr) return {};
      for (int64_t c = 0; c < classes; ++c) gradient[c] = output(score[c] - p[c] * total);
      store(tile, gradient, classes, call.logits.gradient, arena);
      return {};
    });
  });
}

Verdict categorical_sample(const CategoricalSample& call) {
  return with_lanes(call, [](auto lane, const CategoricalSample& call) -> Verdict {
    using V = Primal<decltype(lane)>;
    using T = Element<V>;
    const int64_t classes = call.classes;
    const size_t bytes = sizeof(Word<V>) * size_t(call.num_samples) + sample_bytes<V>(classes) + 1024;
    const int64_t operations = 8 * classes + call.num_samples * (16 + classes);
    return for_each_tile<V>(call, operations, bytes, [&](Tile tile, Arena<V> arena) -> Verdict {
      const Verdict verdict = check_logits<T>(tile, classes, call.logits, true);
      if (verdict.code != kAccepted) return verdict;
      Word<V>* labels = arena.template take<Word<V>>(call.num_samples);
      sample_labels(call, call.logits, call.num_samples, classes, tile, arena, labels);
      for (int64_t g = 0; g < call.num_samples; ++g) {
        for (int l = 0; l < tile.count; ++l) call.out[g * call.rows + tile.begin + l] = labels[g].v[l];
      }
      return {};
    });
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
