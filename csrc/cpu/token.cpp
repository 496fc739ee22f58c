// Token statistics on the CPU: a row after another, columns in lanes, in blocks that the first cache holds, so that
// memory is read once for a value and once more, and written, for a gradient.
#include "po_kernels/token.hpp"

#include <algorithm>
#include <atomic>

#include "cpu/kernels.hpp"
#include "cpu/pack.hpp"
#include "cpu/tiles.hpp"
#include "po_kernels/half.hpp"
#include "po_kernels/several.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

constexpr int64_t kBlockColumns = 1024;
constexpr int64_t kIgnored = INT64_MIN;  // IGNORED of contract.py

template <class P>
constexpr int kPacks = sizeof(P) / sizeof(Element<P>) / LaneTraits<P>::width;

template <class P, class Stored>
PK_FN P load_columns(const Stored* from) {
  if constexpr (kPacks<P> > 1) {
    using One = decltype(P{}.v[0] + P{}.v[0]);
    return each_of<kPacks<P>>([&](auto i) PK_LAMBDA { return load_columns<One>(from + i * LaneTraits<P>::width); });
  } else if constexpr (is_half<Stored>) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LaneTraits<P>::width)));
#if defined(__AVX512F__)
    if constexpr (std::is_same<Stored, Float16>::value) {
      return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
#elif defined(__F16C__)
    if constexpr (std::is_same<Stored, Float16>::value) {
      return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
    }
#endif
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return widened<P>(Word<P>{__builtin_convertvector(halves, decltype(Word<P>::v))}, Stored{});
  } else {
    P x;
    memcpy(&x, from, sizeof x);
    return x;
  }
}

// The low halves of words whose high ones are 0: what the compiler makes of a conversion takes several times as long.
template <int N>
PK_FN void store_halves(void* to, Pack<uint32_t, N> words) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtepi32_epi16(__m512i(words.v));
#elif defined(__AVX2__)
  const __m256i all = __m256i(words.v);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * N)));
  const Halves halves = __builtin_convertvector(words.v, Halves);
#endif
  memcpy(to, &halves, sizeof halves);
}

template <class Stored, class P>
PK_FN void store_columns(Stored* to, P x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<Stored, Float16>::value) {
    const __m256i halves = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &halves, sizeof halves);
    return;
  }
#elif defined(__F16C__)
  if constexpr (std::is_same<Stored, Float16>::value) {
    const __m128i halves = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &halves, sizeof halves);
    return;
  }
#endif
  if constexpr (is_half<Stored>) {
    store_halves(to, narrowed(x, Stored{}));
  } else {
    memcpy(to, &x, sizeof x);
  }
}

template <class V, int M, class Stored>
PK_FN void store_columns(Stored* to, const Several<V, M>& x) {
  for (int i = 0; i < M; ++i) store_columns(to + i * LaneTraits<V>::width, x.v[i]);
}

template <class T>
struct Scalars {
  using type = double;
};
template <class V>
struct Scalars<Dual<V>> {
  using type = Dual<double>;
};

PK_FN double scalar(double, double value, double) {
  return value;
}
PK_FN Dual<double> scalar(Dual<double>, double value, double tangent) {
  return {value, tangent};
}

template <class V>
PK_FN auto sum_of(const V& x) {
  return folded(x, [](auto a, auto b) PK_LAMBDA { return a + b; });
}
template <class V>
PK_FN auto sum_of(const Dual<V>& x) {
  const auto v = sum_of(x.v);
  return Dual<std::decay_t<decltype(v)>>{v, sum_of(x.t)};
}

template <class P>
PK_FN P larger(P a, P b) {
  return select(a > b, a, b);
}

template <class T, int N>
PK_FN bool any(Pack<T, N> mask) {
  uint64_t words[sizeof mask / sizeof(uint64_t)], found = 0;
  memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) found |= word;
  return found != 0;
}

// One row, on lanes V of what is stored.
template <class V, class Stored, bool capped>
struct TokenRow {
  using P = Primal<V>;
  using T = Element<V>;
  using S = typename Scalars<V>::type;
  static constexpr int width = LaneTraits<P>::width;
  using Doubles = Pack<double, width>;
  using Wide = std::conditional_t<is_dual<V>, Dual<Doubles>, Doubles>;
  static constexpr T infinity = T(__builtin_huge_val());
  // Packs at once, as many as registers allow: their chains of steps overlap.
  static constexpr int kSeveral = (kFloatLanes == 16 ? 4 : 2) / (is_dual<V> ? 2 : 1);
  using All = SeveralOf<V, kSeveral>;
  static constexpr int64_t step = kSeveral * width;

  const Stored* value;
  const Stored* tangent;
  int64_t classes;
  TokenScale<T> scale;

  // Capped logits of the columns from `column` on, as many as a W has; in the last pack of a row -inf beyond its end.
  template <class W>
  PK_FN W columns(int64_t column) const {
    return capped_of<W>(value + column, tangent ? tangent + column : nullptr);
  }
  V last_columns(int64_t column) const {
    const int64_t left = classes - column;
    Stored some[width] = {}, moved[width] = {};
    std::copy_n(value + column, left, some);
    if (is_dual<V> && tangent) std::copy_n(tangent + column, left, moved);
    P rest{};
    for (int64_t l = 0; l < width; ++l) rest.v[l] = T(l < left);
    return select(rest > T(0), capped_of<V>(some, moved), constant<V>(broadcast<P>(-infinity)));
  }
  V pack_with(int64_t column) const { return column + width <= classes ? columns<V>(column) : last_columns(column); }
  template <class W>
  PK_FN W capped_of(const Stored* from, const Stored* moved) const {
    const Primal<W> x = load_columns<Primal<W>>(from);
    if constexpr (is_dual<V>) {
      return scale.template cap<capped>(W{x, moved ? load_columns<Primal<W>>(moved) : Primal<W>{}});
    } else {
      return scale.template cap<capped>(x);
    }
  }

  // e = exp d and d = (y - top) / temperature. Where e would be subnormal it is 0, and d has no derivative.
  template <class W>
  PK_FN W exp_of(W y, T top, W& d) const {
    // Of halves, whose difference is in range wherever y and top are.
    const W whole = (y * T(0.5) + (T(-0.5) * top)) * (T(2) * scale.inverse_temperature);
    const auto masked = stop(whole) < kLowest<T>;
    d = select(masked, constant<W>(broadcast<Primal<W>>(kLowest<T>)), whole);
    return select(masked, W{}, exp_in_range(d));
  }

  static Wide widened(const V& x) {
    const auto wide = [](const P& p) { return Doubles{__builtin_convertvector(p.v, typename Doubles::Vector)}; };
    if constexpr (is_dual<V>) {
      return {wide(x.v), wide(x.t)};
    } else {
      return wide(x);
    }
  }
  static S total(const Wide& x) {
    if constexpr (is_dual<V>) {
      return {lane_sum(x.v, width), lane_sum(x.t, width)};
    } else {
      return lane_sum(x, width);
    }
  }

  template <class W>
  PK_FN static W all(S x) {
    if constexpr (is_dual<V>) {
      return {broadcast<Primal<W>>(T(x.v)), broadcast<Primal<W>>(T(x.t))};
    } else {
      return broadcast<W>(T(x));
    }
  }

  TokenSums<S> sums(double inverse_temperature) const {
    TokenSums<Wide> found{inverse_temperature};
    for (int64_t first = 0; first < classes; first += kBlockColumns) {
      const int64_t end = std::min(first + kBlockColumns, classes);
      const bool started = found.top > -infinity;
      // Mostly no logit of a block is above all before it.
      Block block = started ? sums_of<true>(first, end, T(found.top)) : sums_of<false>(first, end, T(0));
      if (any(block.top > T(found.top))) {
        const T largest = largest_lane(block.top).v[0];
        found.rise(double(largest));
        block = sums_of<true>(first, end, largest);
      } else if (!started) {
        if (!any_nan(first, end)) continue;
        block.mass = constant<V>(broadcast<P>(T(__builtin_nan(""))));
      }
      found.mass = found.mass + widened(block.mass);
      found.product = found.product + widened(block.product);
    }
    return {inverse_temperature, found.top, total(found.mass), total(found.product)};
  }

  // The largest of the columns [first, end), and sums relative to `centre`.
  struct Block {
    P top;
    V mass, product;
  };
  template <bool summed>
  Block sums_of(int64_t first, int64_t end, T centre) const {
    Primal<All> tops = broadcast<Primal<All>>(-infinity);
    All masses{}, products{};
    int64_t column = first;
    for (; column + step <= end; column += step) {
      add<summed>(columns<All>(column), centre, tops, masses, products);
    }
    Block found{folded(tops, [](P a, P b) PK_LAMBDA { return larger(a, b); }), sum_of(masses), sum_of(products)};
    const auto one = [&](V y) PK_LAMBDA { add<summed>(y, centre, found.top, found.mass, found.product); };
    for (; column + width <= end; column += width) one(columns<V>(column));
    if (column < end) one(last_columns(column));
    return found;
  }

  template <bool summed, class W>
  PK_FN void add(W y, T centre, Primal<W>& top, W& mass, W& product) const {
    top = larger(stop(y), top);
    if constexpr (!summed) return;
    W d;
    const W e = exp_of(y, centre, d);
    mass = mass + e;
    product = plus_product(product, e, d);
  }

  bool any_nan(int64_t first, int64_t end) const {
    bool found = false;
    for (int64_t column = first; column < end; column += width) {
      const P y = stop(pack_with(column));
      for (int l = 0; l < width; ++l) found |= y.v[l] != y.v[l];
    }
    return found;
  }

  S taken(int64_t token) const {
    const V y = pack_with(token / width * width);
    const int lane = int(token % width);
    if constexpr (is_dual<V>) {
      return {double(y.v.v[lane]), double(y.t.v[lane])};
    } else {
      return double(y.v[lane]);
    }
  }

  void gradient(const TokenSums<S>& sums, const TokenGradient<S>& weights, int64_t token, Stored* to) const {
    const T centre = T(sums.top);
    const auto of = [&](auto y) PK_LAMBDA {
      using W = decltype(y);
      W d;
      const W e = exp_of(y, centre, d);
      return e * (all<W>(weights.offset) - all<W>(weights.factor) * d);
    };
    const auto finished = [&](auto y, auto g) PK_LAMBDA {
      if constexpr (capped) g = g * scale.slope(y);
      return output(g);
    };
    // The taken one's sum is rounded once. It is made first, since the gradient may take the place of the logits.
    const int64_t here = token / width * width;
    V more{};
    reinterpret_cast<T*>(&more)[token - here] = T(stop(weights.alpha));
    if constexpr (is_dual<V>) reinterpret_cast<T*>(&more)[width + token - here] = T(weights.alpha.t);
    const V y = pack_with(here);
    Stored taken[width], last[width];
    store_columns(taken, finished(y, of(y) + more));

    const auto store = [&](auto y, Stored* to) PK_LAMBDA { store_columns(to, finished(y, of(y))); };
    int64_t column = 0;
    for (; column + step <= classes; column += step) store(columns<All>(column), to + column);
    for (; column + width <= classes; column += width) store(columns<V>(column), to + column);
    if (column < classes) {
      store(last_columns(column), last);
      std::copy_n(last, classes - column, to + column);
    }
    to[token] = taken[token - here];
  }
};

// One of (kTokenStats, rows).
template <class T>
double statistic(const TokenLogProb& call, const void* from, int64_t stat, int64_t row, double otherwise) {
  return from ? double(static_cast<const T*>(from)[stat * call.rows + row]) : otherwise;
}

// The sums of a row that the forward pass has found.
template <class S, class T>
TokenSums<S> known_sums(const TokenLogProb& call, int64_t row) {
  const auto read = [&](int64_t stat) { return statistic<T>(call, call.known, stat, row, 0); };
  return {1 / call.temperature, read(3), S{read(4)}, S{read(5) * read(4)}};
}

template <class V, class Stored, bool capped>
Verdict run_row(const TokenLogProb& call, int64_t row) {
  using T = Element<V>;
  using Row = TokenRow<V, Stored, capped>;
  using S = typename Row::S;
  const int64_t token = call.token_ids[row];
  T* out = static_cast<T*>(call.out) + row;
  // One that takes the place of the logits lies as they do.
  const int64_t stride = call.logits.gradient == call.logits.value ? call.logits.stride : call.classes;
  Stored* gradient = call.logits.gradient ? static_cast<Stored*>(call.logits.gradient) + row * stride : nullptr;
  if (token == kIgnored) {
    for (int i = 0; i < kTokenStats; ++i) out[i * call.rows] = T(0);
    if (gradient) std::fill_n(gradient, call.classes, Stored{});
    return {};
  }
  if (token < 0 || token >= call.classes) return {kLabelOutOfRange, row};
  const Row self{static_cast<const Stored*>(call.logits.value) + row * call.logits.stride,
                 call.logits.tangent ? static_cast<const Stored*>(call.logits.tangent) + row * call.classes : nullptr,
                 call.classes,
                 {T(1 / call.temperature), T(call.softcap.given ? call.softcap.value : 0)}};
  const bool known = call.known && !is_dual<V>;
  const TokenSums<S> sums = known ? known_sums<S, T>(call, row) : self.sums(1 / call.temperature);
  if (stop(sums.mass) == 0) return {kAllMasked, row};
  S stats[kTokenStats], cotangents[kTokenStats];
  if (!known) token_stats(sums, self.taken(token), stats);
  for (int i = 0; i < kTokenStats; ++i) {
    out[i * call.rows] = known ? T(statistic<T>(call, call.known, i, row, 0)) : T(output(stats[i]));
    cotangents[i] = scalar(S{}, statistic<T>(call, call.cotangent.value, i, row, 1),
                           statistic<T>(call, call.cotangent.tangent, i, row, 0));
  }
  if (gradient) self.gradient(sums, TokenGradient<S>(sums, cotangents), token, gradient);
  return {};
}

template <class V, class Stored>
Verdict run_rows(const TokenLogProb& call) {
  const auto run = call.softcap.given ? run_row<V, Stored, true> : run_row<V, Stored, false>;
  constexpr int64_t kColumnsAtOnce = 8192;  // which a thread takes from the others
  const int64_t size = std::max<int64_t>(1, kColumnsAtOnce / std::max<int64_t>(call.classes, 1));
  const int64_t chunks = (call.rows + size - 1) / size;
  // The first refusal, in the order of rows.
  std::atomic<int64_t> first{INT64_MAX};
  parallel_for(chunks, worthwhile_threads(call, 8 * call.classes), [&](int64_t chunk) {
    for (int64_t row = chunk * size; row < std::min(call.rows, (chunk + 1) * size); ++row) {
      const Verdict verdict = run(call, row);
      if (verdict.code == kAccepted) continue;
      const int64_t found = row * 16 + verdict.code;
      int64_t known = first.load();
      while (found < known && !first.compare_exchange_weak(known, found)) {
      }
      return;
    }
  });
  const int64_t found = first.load();
  return found == INT64_MAX ? Verdict{} : Verdict{int(found % 16), found / 16};
}

template <class V>
Verdict run_stored(const TokenLogProb& call) {
  if constexpr (std::is_same<Element<V>, float>::value) {
    if (call.half == 1) return run_rows<V, BFloat16>(call);
    if (call.half == 2) return run_rows<V, Float16>(call);
  }
  return run_rows<V, Element<V>>(call);
}

}  // namespace

Verdict token_log_prob(const TokenLogProb& call) {
  if (call.is_double) return call.dual ? run_stored<Dual<Lanes<double>>>(call) : run_stored<Lanes<double>>(call);
  return call.dual ? run_stored<Dual<Lanes<float>>>(call) : run_stored<Lanes<float>>(call);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
