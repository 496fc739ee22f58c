// What the passes of a network are made of: packs with their tangents, activations, and a plan of its parameters.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/matrix.hpp"
#include "cpu/tiles.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

constexpr int64_t kBlockRows = 128;

template <class P>
constexpr int64_t packs_of(int64_t count) {
  constexpr int64_t width = LaneTraits<P>::width;
  return (count + width - 1) / width;
}

// Packs, and on duals their tangents.
template <class V>
struct Field {
  using P = Primal<V>;
  P* v = nullptr;
  P* t = nullptr;

  static Field in(Arena<V>& arena, int64_t count) {
    Field field;
    field.v = arena.template take<P>(count);
    if constexpr (is_dual<V>) field.t = arena.template take<P>(count);
    return field;
  }
  Field from(int64_t i) const { return {v + i, is_dual<V> ? t + i : nullptr}; }
  PK_FN V get(int64_t i) const {
    if constexpr (is_dual<V>) {
      return {v[i], t[i]};
    } else {
      return v[i];
    }
  }
  PK_FN void set(int64_t i, V x) const {
    if constexpr (is_dual<V>) {
      v[i] = x.v;
      t[i] = x.t;
    } else {
      v[i] = x;
    }
  }
  // What a kernel puts out of it.
  P* output() const { return is_dual<V> ? t : v; }
};

// Parameters or results in rows, with their tangents, null for zero.
template <class T>
struct Coefficients {
  Strided<T> v, t;
};

// to += a b; or of the result only what is put out.
template <class V, bool whole = true>
void add_product(Coefficients<Element<V>> a, int64_t rows, int64_t inner, int64_t packs, Field<V> b, int64_t b_row,
                 Field<V> to, int64_t to_row) {
  using P = Primal<V>;
  if constexpr (whole || !is_dual<V>) add_product<P>(a.v, rows, inner, packs, b.v, b_row, to.v, to_row);
  if constexpr (is_dual<V>) {
    add_product<P>(a.v, rows, inner, packs, b.t, b_row, to.t, to_row);
    if (a.t.value) add_product<P>(a.t, rows, inner, packs, b.v, b_row, to.t, to_row);
  }
}

template <class P>
PK_FN P error_function(P x) {
  P y;
  for (int l = 0; l < LaneTraits<P>::width; ++l) y.v[l] = std::erf(x.v[l]);
  return y;
}
template <class P>
PK_FN Dual<P> error_function(Dual<P> x) {
  return {error_function(x.v), x.t * (exp(-(x.v * x.v)) * Element<P>(1.1283791670955126))};
}

// f(z) and f'(z).
template <class V>
PK_FN V activate(int activation, V z, V& slope) {
  using T = Element<V>;
  const V one = constant<V>(T(1));
  if (activation == kTanh) {
    const V a = tanh(z);
    slope = one - a * a;
    return a;
  }
  if (activation == kRelu) {
    slope = select(stop(z) > T(0), one, V{});
    return select(stop(z) < T(0), V{}, z);
  }
  if (activation == kGelu) {
    const V below = (error_function(z * T(0.7071067811865476)) + T(1)) * T(0.5);
    slope = below + z * exp(z * z * T(-0.5)) * T(0.3989422804014327);
    return z * below;
  }
  const V inside = z * (z * z * T(0.044715) + T(1)) * T(0.7978845608028654);
  const V t = tanh(inside);
  slope = (t + T(1)) * T(0.5) + z * (one - t * t) * (z * z * T(0.134145) + T(1)) * T(0.3989422804014327);
  return z * (t + T(1)) * T(0.5);
}

// low + (high - low) sigmoid(s), and its derivative.
template <class V>
PK_FN V bounded(const Network& network, V s, V& slope) {
  using T = Element<V>;
  const T range = T(network.highest - network.lowest);
  const V one = constant<V>(T(1)), e = exp(select(stop(s) < T(0), s, -s));
  const V part = one / (e + T(1));
  slope = e * part * part * range;
  return select(stop(s) < T(0), e * part, part) * range + T(network.lowest);
}

struct Layers {
  std::vector<int64_t> width;
  int64_t first = 0;  // parameter

  int64_t depth() const { return int64_t(width.size()) - 1; }
};

// What is known before the first step.
template <class T>
struct Plan {
  explicit Plan(const NetworkLoss& call) : call(call) {
    const bool per_row = call.spread_depth > 0;
    nets.resize(per_row ? 2 : 1);
    nets[0].width.assign(call.widths, call.widths + call.depth + 1);
    if (per_row) nets[1].width.assign(call.spread_widths, call.spread_widths + call.spread_depth + 1);
    for (Layers& net : nets) {
      net.first = int64_t(size.size());
      for (int64_t l = 0; l < net.depth(); ++l) {
        size.push_back(net.width[l] * net.width[l + 1]);
        size.push_back(net.width[l + 1]);
      }
    }
    spread_first = int64_t(size.size());
    scale_size = call.head == kCategoricalHead ? 0 : call.spread == kTriangular ? call.dim * call.dim : call.dim;
    if (!per_row && scale_size > 0) {
      size.push_back(call.dim);
      if (call.spread == kTriangular) size.push_back(call.dim * call.dim);
    }
    // A weight's gradient is added up with whole packs in a row, all others one number after the other in double.
    for (size_t i = 0; i < size.size(); ++i) {
      const bool weight = int64_t(i) < spread_first && i % 2 == 0;
      offset.push_back(weight ? packs : numbers);
      if (weight) {
        const int64_t rows = size[i + 1], columns = size[i] / std::max<int64_t>(rows, 1);
        packs += rows * packs_of<Lanes<T>>(columns);
        weights += size[i];
      } else {
        numbers += size[i];
      }
    }
    scale_at = numbers;  // of the scale and its tangent, before they are those of its parameters
    reward_at = scale_at + 2 * scale_size;
    const bool square = call.head == kCategoricalHead || call.precision_ndim == 2;
    reward_size = square ? call.dim * call.dim : call.precision_ndim == 1 ? call.dim : 1;
    loss_at = reward_at + reward_size;
    numbers = loss_at + 1;
    for (size_t i = 0; i < size.size(); ++i) wanted = wanted || call.gradients[i] != 0;
  }

  const T* value(int64_t i) const { return reinterpret_cast<const T*>(call.values[i]); }
  const T* tangent(int64_t i) const {
    return call.tangents == nullptr ? nullptr : reinterpret_cast<const T*>(call.tangents[i]);
  }
  T* gradient(int64_t i) const { return reinterpret_cast<T*>(call.gradients[i]); }
  bool spread_by_row() const { return nets.size() == 2; }
  int64_t widest() const {
    int64_t most = 1;
    for (const Layers& net : nets) {
      for (const int64_t width : net.width) most = std::max(most, width);
    }
    return most;
  }

  const NetworkLoss& call;
  bool wanted = false;  // a gradient of a parameter
  std::vector<Layers> nets;
  std::vector<int64_t> size, offset;
  int64_t spread_first = 0, scale_size = 0, packs = 0, numbers = 0, weights = 0;
  int64_t scale_at = 0, reward_size = 0, reward_at = 0, loss_at = 0;
};

// Rows of one step.
struct Rows {
  int64_t count;
  const int64_t* index;  // or null for all
  int64_t seed;
  int64_t operator()(int64_t i) const { return index ? index[i] : i; }
};

// A chunk's sums.
template <class V>
struct Sums {
  Primal<V>* weights;
  double* numbers;
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
