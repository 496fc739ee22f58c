// Categorical policies on the CPU.
#include "po_kernels/categorical.hpp"

#include "cpu/tiles.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

template <class T>
Verdict check_rows(const CategoricalPolicyLoss& call) {
  const T infinity = T(__builtin_huge_val());
  const T* logits = static_cast<const T*>(call.logits.value);
  for (int64_t row = 0; row < call.rows; ++row) {
    if (call.target[row] < 0 || call.target[row] >= call.classes) return {kLabelOutOfRange, row};
    const T* at = logits + row * call.logits.stride;
    bool masked = true;
    for (int64_t c = 0; masked && c < call.classes; ++c) masked = at[c] == -infinity;
    if (masked) return {kAllMasked, row};
  }
  return {};
}

// Column y of the table for each row, y its label.
template <class V>
void load_reward_columns(const CategoricalPolicyLoss& call, Tile tile, V* column) {
  using T = Element<V>;
  constexpr int width = LaneTraits<V>::width;
  constexpr int64_t step = sizeof(V) / sizeof(T);
  T* elements = reinterpret_cast<T*>(column);
  for (int l = 0; l < width; ++l) {
    const int64_t label = call.target[tile.begin + std::min(l, tile.count - 1)];
    for (int64_t c = 0; c < call.classes; ++c) {
      const int64_t at = c * call.classes + label;
      elements[c * step + l] = static_cast<const T*>(call.table.value)[at];
      if constexpr (is_dual<V>) {
        elements[c * step + width + l] = call.table.tangent ? static_cast<const T*>(call.table.tangent)[at] : T(0);
      }
    }
  }
}

// G labels for each row in the lanes, by thresholds computed in double whatever V is.
template <class V>
void sample_labels(const CategoricalPolicyLoss& call, Tile tile, Arena<V> arena, Word<V>* labels) {
  using T = Element<V>;
  using D = Lanes<double>;
  constexpr int width = LaneTraits<V>::width;
  constexpr int part = LaneTraits<D>::width;
  Word<V>* thresholds = arena.template take<Word<V>>(call.classes);
  D* logits = arena.template take<D>(2 * call.classes);
  for (int first = 0; first < width; first += part) {
    double* elements = reinterpret_cast<double*>(logits);
    for (int l = 0; l < part; ++l) {
      const int64_t row = tile.begin + std::min(first + l, tile.count - 1);
      const T* from = static_cast<const T*>(call.logits.value) + row * call.logits.stride;
      for (int64_t c = 0; c < call.classes; ++c) elements[c * part + l] = double(from[c]);
    }
    categorical_thresholds(call.classes, logits, logits + call.classes, reinterpret_cast<uint32_t*>(thresholds) + first,
                           width);
  }
  Word<V> low, high;
  row_numbers(call, tile, low, high);
  for (int64_t g = 0; g < call.samples; ++g) {
    labels[g] = categorical_label(call.seed, uint32_t(g), low, high, call.classes, thresholds);
  }
}

template <class V>
Verdict policy_loss(const CategoricalPolicyLoss& call) {
  using T = Element<V>;
  using P = Primal<V>;
  const Verdict verdict = check_rows<T>(call);
  if (verdict.code != kAccepted) return verdict;
  const int64_t classes = call.classes;
  const Surrogate s = surrogate(call);
  // The table's gradient is scattered by label, so that its sums are elements, not lane values.
  const SharedSums sums{classes * classes, call.grad_table != nullptr, false};
  const size_t bytes = sizeof(V) * size_t(5 * classes + 4 * call.samples) + sizeof(P) * size_t(2 * classes) +
                       sizeof(Word<V>) * size_t(call.samples + classes) + 64 * size_t(2 * classes) + 1024;
  const auto totals = for_each_tile<V>(call, sums, bytes, [&](Tile tile, Arena<V> arena, P* shared, P& loss, P* stats) {
    V* logits = arena.take(classes);
    V* column = arena.take(classes);
    V* work = arena.take(3 * classes + 4 * call.samples);
    P* gradients = arena.template take<P>(2 * classes);
    Word<V>* labels = arena.template take<Word<V>>(call.samples);
    load(tile, call.logits, classes, logits);
    load_reward_columns(call, tile, column);
    const CategoricalRow<V> row{classes, logits, column};
    const CategoricalGradients<V> out{load_weight<V>(call, tile), call.grad_logits ? gradients : nullptr,
                                      call.grad_table ? gradients + classes : nullptr};
    Group<V> group{};
    if (s.estimator == kClosedForm) {
      loss = output(categorical_closed_form(row, s, out, work));
    } else {
      sample_labels(call, tile, arena, labels);
      loss = output(categorical_sampled(row, s, labels, out, work, group));
    }
    if constexpr (!is_dual<V>) {
      if (call.stats) {
        Word<V> target{};
        for (int l = 0; l < tile.count; ++l) target.v[l] = uint32_t(call.target[tile.begin + l]);
        const RowStats<V> row_stats = categorical_stats(row, s, target, group, work + 4 * call.samples);
        for (int i = 0; i < 5; ++i) stats[i] = row_stats.value[i];
      }
    }
    if (out.logits) store(tile, out.logits, classes, call.grad_logits);
    if (out.column) {
      T* table = reinterpret_cast<T*>(shared);
      for (int l = 0; l < tile.count; ++l) {
        const int64_t label = call.target[tile.begin + l];
        for (int64_t c = 0; c < classes; ++c) table[c * classes + label] += out.column[c].v[l];
      }
    }
  });
  for (int64_t i = 0; call.grad_table && i < sums.terms; ++i) {
    static_cast<T*>(call.grad_table)[i] = T(totals[kSumsBeforeShared + i]);
  }
  return {};
}

}  // namespace

Verdict categorical_policy_loss(const CategoricalPolicyLoss& call) {
  if (call.is_double) {
    return call.dual ? policy_loss<Dual<Lanes<double>>>(call) : policy_loss<Lanes<double>>(call);
  }
  return call.dual ? policy_loss<Dual<Lanes<float>>>(call) : policy_loss<Lanes<float>>(call);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
