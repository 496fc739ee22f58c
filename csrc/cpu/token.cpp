// Token statistics on the CPU: a row after another, columns in lanes, in blocks that the first cache holds, so that
// memory is read once for a value and once more, and written, for a gradient.
#include "po_kernels/token.hpp"

#include <algorithm>
#include <atomic>

#include "cpu/kernels.hpp"
#include "cpu/pack.hpp"
#include "cpu/parallel.hpp"
#include "po_kernels/half.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

constexpr int64_t kBlockColumns = 1024;
constexpr int64_t kIgnored = INT64_MIN;  // IGNORED of contract.py

template <class P, class Stored>
PK_FN P load_columns(const Stored* from) {
  if constexpr (is_half<Stored>) {
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

// One row, on lanes V of what is stored.
template <class V, class Stored, bool capped>
struct TokenRow {
  using P = Primal<V>;
  using T = Element<V>;
  using S = typename Scalars<V>::type;
  static constexpr int width = LaneTraits<P>::width;

  const Stored* value;
  const Stored* tangent;
  int64_t classes;
  TokenScale<T> scale;

  // z of the columns from `column` on; beyond the last one -inf.
  PK_FN V columns(int64_t column) const {
    const int64_t left = classes - column;
    const P infinity = broadcast<P>(T(__builtin_huge_val()));
    if (left >= width) {
      const P x = load_columns<P>(value + column);
      if constexpr (is_dual<V>) {
        return scale.template logit<capped>(V{x, tangent ? load_columns<P>(tangent + column) : P{}});
      } else {
        return scale.template logit<capped>(x);
      }
    }
    Stored some[width] = {}, moved[width] = {};
    std::copy_n(value + column, left, some);
    if (is_dual<V> && tangent) std::copy_n(tangent + column, left, moved);
    P x = load_columns<P>(some), rest{};
    for (int64_t l = 0; l < width; ++l) rest.v[l] = T(l < left);
    if constexpr (is_dual<V>) {
      const V z = scale.template logit<capped>(V{x, load_columns<P>(moved)});
      return select(rest > T(0), z, constant<V>(-infinity));
    } else {
      return select(rest > T(0), scale.template logit<capped>(x), -infinity);
    }
  }

  S total(const V& x) const {
    double sum[2] = {};
    const T* elements = reinterpret_cast<const T*>(&x);
    for (int l = 0; l < width; ++l) sum[0] += double(elements[l]);
    if constexpr (is_dual<V>) {
      for (int l = 0; l < width; ++l) sum[1] += double(elements[width + l]);
    }
    return scalar(S{}, sum[0], sum[1]);
  }

  V all(S x) const {
    if constexpr (is_dual<V>) {
      return {broadcast<P>(T(x.v)), broadcast<P>(T(x.t))};
    } else {
      return broadcast<P>(T(x));
    }
  }

  TokenSums<S> sums() const {
    TokenSums<S> found;
    V z[kBlockColumns / width];
    for (int64_t first = 0; first < classes; first += kBlockColumns) {
      const int64_t packs = (std::min(kBlockColumns, classes - first) + width - 1) / width;
      const T infinity = T(__builtin_huge_val());
      P top = broadcast<P>(-infinity);
      for (int64_t i = 0; i < packs; ++i) {
        z[i] = columns(first + i * width);
        top = select(stop(z[i]) > top, stop(z[i]), top);
      }
      T largest = top.v[0];
      for (int l = 1; l < width; ++l) largest = std::max(largest, T(top.v[l]));
      if (largest == -infinity && !any_nan(z, packs)) continue;
      found.rise(double(largest));
      V mass[4] = {}, product[4] = {};
      const T centre = T(found.top);
      const auto add = [&](int64_t i, int to) PK_LAMBDA {
        const V d = centred(z[i], centre);
        const V e = exp_of_negative(d);
        mass[to] = mass[to] + e;
        product[to] = plus_product(product[to], e, d);
      };
      int64_t i = 0;
      for (; i + 4 <= packs; i += 4) unrolled<4>([&](auto k) PK_LAMBDA { add(i + k, k); });
      for (; i < packs; ++i) add(i, 0);
      found.mass = found.mass + total((mass[0] + mass[1]) + (mass[2] + mass[3]));
      found.product = found.product + total((product[0] + product[1]) + (product[2] + product[3]));
    }
    return found;
  }

  static bool any_nan(const V* z, int64_t packs) {
    bool found = false;
    for (int64_t i = 0; i < packs; ++i) {
      for (int l = 0; l < width; ++l) found |= stop(z[i]).v[l] != stop(z[i]).v[l];
    }
    return found;
  }

  S taken(int64_t token) const {
    const V z = columns(token / width * width);
    const int lane = int(token % width);
    if constexpr (is_dual<V>) {
      return {double(z.v.v[lane]), double(z.t.v[lane])};
    } else {
      return double(z.v[lane]);
    }
  }

  void gradient(const TokenSums<S>& sums, const TokenGradient<S>& weights, int64_t token, Stored* to) const {
    const V offset = all(weights.offset), factor = all(weights.factor);
    const T centre = T(sums.top);
    const auto of = [&](int64_t column, V more) PK_LAMBDA {
      const V z = columns(column);
      const V d = centred(z, centre);
      const V slope = scale.template slope<capped>(z);
      return output(slope * (exp_of_negative(d) * (offset - factor * d) + more));
    };
    int64_t column = 0;
    for (; column + width <= classes; column += width) store_columns(to + column, of(column, V{}));
    if (column < classes) {
      Stored some[width];
      store_columns(some, of(column, V{}));
      std::copy_n(some, classes - column, to + column);
    }
    // The taken one again, rounded once.
    const int64_t here = token / width * width;
    V more{};
    reinterpret_cast<T*>(&more)[token - here] = T(stop(weights.alpha));
    if constexpr (is_dual<V>) reinterpret_cast<T*>(&more)[width + token - here] = T(weights.alpha.t);
    Stored some[width];
    store_columns(some, of(here, more));
    to[token] = some[token - here];
  }
};

// (kTokenStats, rows), with their tangents on duals; ones if there are none.
template <class S, class T>
S cotangent(const TokenLogProb& call, int64_t stat, int64_t row) {
  const int64_t at = stat * call.rows + row;
  const auto read = [&](const void* from, double otherwise) {
    return from ? double(static_cast<const T*>(from)[at]) : otherwise;
  };
  return scalar(S{}, read(call.cotangent.value, 1), read(call.cotangent.tangent, 0));
}

template <class V, class Stored, bool capped>
Verdict run_row(const TokenLogProb& call, int64_t row) {
  using T = Element<V>;
  using Row = TokenRow<V, Stored, capped>;
  using S = typename Row::S;
  const int64_t token = call.token_ids[row];
  T* out = static_cast<T*>(call.out) + row;
  Stored* gradient = call.logits.gradient ? static_cast<Stored*>(call.logits.gradient) + row * call.classes : nullptr;
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
  const TokenSums<S> sums = self.sums();
  if (stop(sums.mass) == 0) return {kAllMasked, row};
  S stats[kTokenStats], cotangents[kTokenStats];
  token_stats(sums, self.taken(token), stats);
  for (int i = 0; i < kTokenStats; ++i) {
    out[i * call.rows] = T(output(stats[i]));
    cotangents[i] = cotangent<S, T>(call, i, row);
  }
  if (gradient) self.gradient(sums, TokenGradient<S>(sums, cotangents), token, gradient);
  return {};
}

template <class V, class Stored>
Verdict run_rows(const TokenLogProb& call) {
  const auto run = call.softcap.given ? run_row<V, Stored, true> : run_row<V, Stored, false>;
  constexpr int64_t kColumnsPerThread = 8192;  // whose work is worth waking a thread
  const int64_t size = std::max<int64_t>(1, kColumnsPerThread / std::max<int64_t>(call.classes, 1));
  const int64_t chunks = (call.rows + size - 1) / size;
  // The first refusal, in the order of rows.
  std::atomic<int64_t> first{INT64_MAX};
  parallel_for(chunks, int(std::min<int64_t>(call.threads, chunks)), [&](int64_t chunk) {
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
