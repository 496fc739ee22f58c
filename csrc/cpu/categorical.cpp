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

// The column of the table of rewards that each row looks at. For at least as many rows as classes the table is
// transposed first, which is no more than the logits are, and then read in the order of memory; for fewer it is read as
// it lies, and nothing depends on the number of its entries.
template <class V>
struct RewardColumns {
  using T = Element<V>;
  Input table;
  int64_t classes;
  bool copied;
  std::unique_ptr<T[]> value, tangent;

  explicit RewardColumns(const CategoricalPolicyLoss& call)
      : table(call.reward_table), classes(call.classes), copied(call.rows >= call.classes) {
    if (!copied) return;
    value = transposed(table.value);
    if (is_dual<V> && table.tangent) tangent = transposed(table.tangent);
  }

  std::unique_ptr<T[]> transposed(const void* from) const {
    std::unique_ptr<T[]> to(new T[size_t(classes * classes)]);
    constexpr int64_t side = 16;  // of a square that the cache holds
    for (int64_t i = 0; i < classes; i += side) {
      for (int64_t j = 0; j < classes; ++j) {
        for (int64_t k = i; k < std::min(i + side, classes); ++k) {
          to[j * classes + k] = static_cast<const T*>(from)[k * classes + j];
        }
      }
    }
    return to;
  }

  // Column y of the table for each row, y its label.
  void load(Tile tile, const int64_t* labels, V* to) const {
    constexpr int width = LaneTraits<V>::width;
    T* elements = reinterpret_cast<T*>(to);
    load(tile, labels, value.get(), table.value, elements);
    if constexpr (is_dual<V>) {
      if (table.tangent) {
        load(tile, labels, tangent.get(), table.tangent, elements + width);
      } else {
        for (int64_t c = 0; c < classes; ++c) to[c].t = Primal<V>{};
      }
    }
  }

  void load(Tile tile, const int64_t* labels, const T* columns, const void* from, T* elements) const {
    constexpr int width = LaneTraits<V>::width;
    constexpr int64_t step = sizeof(V) / sizeof(T);
    int64_t label[width];
    for (int l = 0; l < width; ++l) label[l] = labels[tile.begin + std::min(l, tile.count - 1)];
    if (copied) {
      const T* row[width];
      for (int l = 0; l < width; ++l) row[l] = columns + label[l] * classes;
      rows_to_lanes<T, width>(row, classes, elements, step);
      return;
    }
    for (int64_t c = 0; c < classes; ++c) {
      for (int l = 0; l < width; ++l) elements[c * step + l] = static_cast<const T*>(from)[c * classes + label[l]];
    }
  }
};

// The table's gradient from those of the columns that the rows look at, (rows, classes).
template <class T>
void scatter_columns(const CategoricalPolicyLoss& call, const T* columns) {
  const int64_t rows = call.rows, classes = call.classes;
  std::unique_ptr<int64_t[]> order(new int64_t[size_t(rows)]);  // rows of one label are neighbours
  for (int64_t i = 0; i < rows; ++i) order[i] = i;
  std::stable_sort(order.get(), order.get() + rows,
                   [&](int64_t a, int64_t b) { return call.target[a] < call.target[b]; });
  constexpr int64_t part = 64;
  parallel_for((classes + part - 1) / part, worthwhile_threads(call, classes), [&](int64_t number) {
    for (int64_t c = number * part; c < std::min((number + 1) * part, classes); ++c) {
      T* to = static_cast<T*>(call.reward_table.gradient) + c * classes;
      std::fill(to, to + classes, T(0));
      for (int64_t i = 0; i < rows;) {
        const int64_t label = call.target[order[i]];
        double sum = 0;
        for (; i < rows && call.target[order[i]] == label; ++i) sum += double(columns[order[i] * classes + c]);
        to[label] = T(sum);
      }
    }
  });
}

// Rows of so many classes stand across the lanes: one alone does not pay for all lanes, and none is transposed. What is
// done for each of `count` labels is then done a row at a time, and must be little next to the classes.
constexpr int64_t kAcross = 1024, kAcrossPerLabel = 128;

inline bool stand_across(int64_t classes, int64_t count) {
  return classes >= std::max(kAcross, kAcrossPerLabel * count);
}

// Runs kernel(lane value, whether across, call).
template <class Kernel, class C>
Verdict with_layout(const C& call, bool across, Kernel kernel) {
  return with_lanes(call, [&](auto lane, const C& call) {
    return across ? kernel(lane, std::true_type{}, call) : kernel(lane, std::false_type{}, call);
  });
}

template <bool across, class V>
void load_classes(Tile tile, RowInput logits, int64_t classes, V* to) {
  across ? load_across(tile, logits, classes, to) : load(tile, logits, classes, to);
}
template <bool across, class P, class V>
void store_classes(Tile tile, const P* from, int64_t classes, void* to, Arena<V> arena) {
  across ? store_across(tile, from, classes, to) : store(tile, from, classes, to, arena);
}

// Labels of a tile's rows, by distribution functions in double whatever V is.
template <class V>
void sample_labels(const RandomNumbers& call, RowInput input, int64_t samples, int64_t classes, Tile tile,
                   Arena<V> arena, Word<V>* labels) {
  using T = Element<V>;
  using D = Lanes<double>;
  constexpr int width = LaneTraits<V>::width;
  constexpr int part = LaneTraits<D>::width;
  D* distributions = arena.template take<D>(width / part * classes);
  for (int first = 0; first < width; first += part) {
    D* distribution = distributions + first / part * classes;
    double* elements = reinterpret_cast<double*>(distribution);
    for (int l = 0; l < part; ++l) {
      const int64_t row = tile.begin + std::min(first + l, tile.count - 1);
      const T* from = static_cast<const T*>(input.value) + row * input.stride;
      for (int64_t c = 0; c < classes; ++c) elements[c * part + l] = double(from[c]);
    }
    categorical_distribution(classes, distribution);
  }
  Word<V> low, high;
  row_numbers(call, tile, low, high);
  const auto draw = [&](int64_t g, auto number) PK_LAMBDA {
    constexpr int S = number;
    Several<Word<V>, S> x0, x1;
    categorical_words(call.seed, uint32_t(g), low, high, x0, x1);
    for (int first = 0; first < width; first += part) {
      D u[S];
      unrolled<S>([&](auto s) PK_LAMBDA {
        Word<D> of_part[2];
        memcpy(of_part, reinterpret_cast<const uint32_t*>(&x0.v[s]) + first, sizeof *of_part);
        memcpy(of_part + 1, reinterpret_cast<const uint32_t*>(&x1.v[s]) + first, sizeof *of_part);
        u[s] = uniform53<D>(of_part[0], of_part[1]);
      });
      categorical_labels(classes, distributions + first / part * classes, u, first, labels + g);
    }
  };
  int64_t g = 0;
  for (; g + 2 <= samples; g += 2) draw(g, Constant<2>{});
  if (g < samples) draw(g, Constant<1>{});
}

// The same of one row across the lanes, to the bit: out[g * stride].
template <class T>
void sample_across(const RandomNumbers& call, RowInput input, int64_t samples, int64_t classes, int64_t row,
                   Lanes<double>* packs, int64_t stride, int64_t* out) {
  using D = Lanes<double>;
  constexpr int width = LaneTraits<D>::width;
  double* distribution = reinterpret_cast<double*>(packs);
  const T* from = static_cast<const T*>(input.value) + row * input.stride;
  std::copy_n(from, classes, distribution);
  std::fill_n(distribution + classes, width, -__builtin_huge_val());
  const D top = CategoricalRow<D, true>{classes, packs, nullptr}.largest_logit();
  int64_t last = classes - 1;
  while (!(exp(broadcast<D>(distribution[last]) - top).v[0] > 0)) --last;
  double sum = 0;
  for (int64_t c = 0; c < classes; c += width) {
    const D mass = exp(packs[c / width] - top);
    for (int l = 0; l < width; ++l) distribution[c + l] = sum += mass.v[l];
  }
  const double inverse = 1 / sum;
  for (int64_t c = 0; c < last; ++c) distribution[c] *= inverse;
  const uint64_t number = call.row_offset + uint64_t(row);
  for (int64_t g = 0; g < samples; ++g) {
    Several<uint32_t, 1> x0, x1;
    categorical_words(call.seed, uint32_t(g), uint32_t(number), uint32_t(number >> 32), x0, x1);
    const double u = uniform53<double>(x0.v[0], x1.v[0]);
    out[g * stride] = std::upper_bound(distribution, distribution + last, u) - distribution;
  }
}

template <class V>
size_t sample_bytes(int64_t classes) {
  return sizeof(Lanes<double>) * size_t(LaneTraits<V>::width / LaneTraits<Lanes<double>>::width * classes) + 256;
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
    // The table's gradient is scattered by label, so that its sums are elements, not lane values. For few rows it is
    // made of theirs at the end.
    const bool shares = columns.copied;
    const SharedSums sums{shares ? classes * classes : 0, shares && call.reward_table.gradient != nullptr, false};
    std::unique_ptr<T[]> of_rows(shares || !call.reward_table.gradient ? nullptr : new T[size_t(call.rows * classes)]);
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
                           if (!shares) {
                             store(tile, out.column, classes, of_rows.get(), arena);
                           } else if (out.column) {  // summed column by column too
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
    if (!shares) {
      scatter_columns(call, static_cast<const T*>(of_rows.get()));
      return {};
    }
    for (int64_t i = 0; i < classes; ++i) {
      for (int64_t j = 0; j < classes; ++j) {
        static_cast<T*>(call.reward_table.gradient)[i * classes + j] = T(totals.shared()[j * classes + i]);
      }
    }
    return {};
  });
}

Verdict categorical_surrogate_loss(const CategoricalSurrogateLoss& call) {
  const bool across = stand_across(call.classes, call.num_samples);
  return with_layout(call, across, [](auto lane, auto layout, const auto& call) -> Verdict {
    using V = decltype(lane);
    constexpr bool across = layout;
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t classes = call.classes, samples = call.num_samples;
    const Surrogate s = call;
    using Row = CategoricalRow<V, across>;
    const int64_t packs = Row{classes, nullptr, nullptr}.packs();
    const size_t bytes = sizeof(V) * size_t(5 * packs + 6 * samples) + sizeof(P) * size_t(2 * packs + samples) +
                         sizeof(Word<V>) * size_t(samples) + 1024;
    const int64_t operations = 32 * classes + 8 * samples;
    const Totals totals = for_each_tile<V, across>(
        call, operations, SharedSums{}, bytes,
        [&](Tile tile, Arena<V> arena, P*, P& loss, RowStats<P>& stats) -> Verdict {
          Verdict verdict = check_labels(tile, samples, call.rows, classes, call.samples);
          if (verdict.code == kAccepted) verdict = check_logits<T>(tile, classes, call.logits, false);
          if (verdict.code == kAccepted)
            verdict = check_unmasked<T>(tile, samples, call.rows, call.logits, call.samples);
          if (verdict.code != kAccepted) return verdict;
          V* logits = arena.take(packs);
          V* rewards = arena.take(samples);
          V* work = arena.take(4 * packs + 5 * samples);
          P* rewards_out = arena.template take_for<P>(call.rewards.gradient, samples);
          Word<V>* labels = arena.template take<Word<V>>(samples);
          load_classes<across>(tile, call.logits, classes, logits);
          for (int64_t g = 0; g < samples; ++g) {
            load(tile, slice<T>(call.rewards, g, call.rows, 1), 1, rewards + g);
            labels[g] = load_labels<Word<V>>(tile, call.samples + g * call.rows);
          }
          const Row row{classes, logits, nullptr};
          const CategoricalGradients<V> out{load_weight<V, across>(call, tile),
                                            arena.template take_for<P>(call.logits.gradient, packs), nullptr};
          Group<V> group{};
          loss = output(categorical_given(row, s, rewards, labels, out, rewards_out, work, group));
          if constexpr (!is_dual<V>) {
            if (call.stats) stats = categorical_given_stats(row, s, labels, group, work + 4 * samples);
          }
          store_classes<across>(tile, out.logits, classes, call.logits.gradient, arena);
          for (int64_t g = 0; rewards_out && g < samples; ++g) {
            store(tile, rewards_out[g], slice<T>(call.rewards.gradient, g, call.rows, 1));
          }
          return {};
        });
    return totals.verdict;
  });
}

Verdict categorical_log_prob(const CategoricalLogProb& call) {
  const bool across = stand_across(call.classes, call.count);
  return with_layout(call, across, [](auto lane, auto layout, const auto& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    constexpr bool across = layout;
    using Row = CategoricalRow<V, across>;
    const int64_t classes = call.classes, packs = Row{classes, nullptr, nullptr}.packs();
    const size_t bytes = sizeof(V) * size_t(3 * packs) + sizeof(P) * size_t(packs) + 1024;
    return for_each_tile<V, across>(call, 32 * classes + 4 * call.count, bytes, [&](Tile tile, Arena<V> arena) {
      Verdict verdict = check_labels(tile, call.count, call.rows, classes, call.value);
      if (verdict.code == kAccepted) verdict = check_logits<T>(tile, classes, call.logits, false);
      if (verdict.code != kAccepted) return verdict;
      V* logits = arena.take(packs);
      V* e = arena.take(packs);
      load_classes<across>(tile, call.logits, classes, logits);
      const Row row{classes, logits, nullptr};
      const Exponentials<V> found = exponentiate(row, e);
      for (int64_t i = 0; i < call.count; ++i) {
        const Word<V> label = load_labels<Word<V>>(tile, call.value + i * call.rows);
        store(tile, output(found.log_prob(row.pick(logits, label))), slice<T>(call.out, i, call.rows, 1));
      }
      if (call.logits.gradient == nullptr) return Verdict{};
      V* score = arena.take(packs);
      V* rest = logits;  // which have been read
      for (int64_t c = 0; c < packs; ++c) score[c] = rest[c] = V{};
      Total<V> total;
      for (int64_t i = 0; i < call.count; ++i) {
        V weight;
        load(tile, slice<T>(call.cotangent, i, call.rows, 1), 1, &weight);
        row.add_at(score, rest, load_labels<Word<V>>(tile, call.value + i * call.rows), weight);
        total.add(weight);
      }
      P* gradient = reinterpret_cast<P*>(score);  // of which no more is written than was read
      const V weights = total.value(), inverse = constant<V>(T(1)) / found.sum;
      for (int64_t c = 0; c < packs; ++c) {
        gradient[c] = output(Total<V>{score[c], rest[c]}.value() - e[c] * inverse * weights);
      }
      store_classes<across>(tile, gradient, classes, call.logits.gradient, arena);
      return Verdict{};
    });
  });
}

Verdict categorical_sample(const CategoricalSample& call) {
  // As both ways draw the same, rows that fill the lanes may stand in them.
  const bool across = call.rows < kFloatLanes && stand_across(call.classes, 0);
  return with_layout(call, across, [](auto lane, auto layout, const auto& call) -> Verdict {
    using V = Primal<decltype(lane)>;
    constexpr bool across = layout;
    using T = Element<V>;
    const int64_t classes = call.classes;
    const int64_t packs = classes / LaneTraits<Lanes<double>>::width + 2;  // with one beyond the last class
    const size_t bytes = across ? sizeof(Lanes<double>) * size_t(packs)
                                : sizeof(Word<V>) * size_t(call.num_samples) + sample_bytes<V>(classes) + 1024;
    const int64_t operations = 32 * classes + call.num_samples * (16 + classes);
    return for_each_tile<V, across>(call, operations, bytes, [&](Tile tile, Arena<V> arena) -> Verdict {
      const Verdict verdict = check_logits<T>(tile, classes, call.logits, true);
      if (verdict.code != kAccepted) return verdict;
      if constexpr (across) {
        auto* distribution = arena.template take<Lanes<double>>(packs);
        sample_across<T>(call, call.logits, call.num_samples, classes, tile.begin, distribution, call.rows,
                         call.out + tile.begin);
        return {};
      }
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
