// Lane values and what can be computed with them.
//
// The mathematics of a row is written once, as templates on a lane value V: float or double for one row (CUDA, a warp a
// row), a Pack of them for as many rows (SIMD, csrc/cpu/pack.hpp), or a Dual of either, which carries a derivative
// along: a kernel that computes a loss and its gradient then also computes, evaluated on duals, the directional
// derivative of the loss and the product of the Hessian with the direction.
#pragma once

#include "po_kernels/elementary.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// ---- Duals ----

template <class V>
struct Dual {
  V v;  // value
  V t;  // tangent
};

template <class V>
struct LaneTraits<Dual<V>> {
  using Element = typename LaneTraits<V>::Element;
  using Word = typename LaneTraits<V>::Word;
  static constexpr int width = LaneTraits<V>::width;
};

template <class V>
struct DualTraits {
  using Primal = V;
  static constexpr bool is_dual = false;
};
template <class V>
struct DualTraits<Dual<V>> {
  using Primal = V;
  static constexpr bool is_dual = true;
};
template <class V>
using Primal = typename DualTraits<V>::Primal;
template <class V>
constexpr bool is_dual = DualTraits<V>::is_dual;

// One number that all rows share, of the kind that V carries: T, or Dual<T>.
template <class V>
using Shared = std::conditional_t<is_dual<V>, Dual<Element<V>>, Element<V>>;

template <class V>
PK_FN Dual<V> operator+(Dual<V> a, Dual<V> b) {
  return {a.v + b.v, a.t + b.t};
}
template <class V>
PK_FN Dual<V> operator-(Dual<V> a, Dual<V> b) {
  return {a.v - b.v, a.t - b.t};
}
template <class V>
PK_FN Dual<V> operator-(Dual<V> a) {
  return {-a.v, -a.t};
}
template <class V>
PK_FN Dual<V> operator*(Dual<V> a, Dual<V> b) {
  return {a.v * b.v, a.v * b.t + a.t * b.v};
}
template <class V>
PK_FN Dual<V> operator/(Dual<V> a, Dual<V> b) {
  const V y = a.v / b.v;
  return {y, (a.t - y * b.t) / b.v};
}
// With the primal of V, and with an element.
template <class V>
PK_FN Dual<V> operator+(Dual<V> a, V b) {
  return {a.v + b, a.t};
}
template <class V>
PK_FN Dual<V> operator-(Dual<V> a, V b) {
  return {a.v - b, a.t};
}
template <class V>
PK_FN Dual<V> operator*(Dual<V> a, V b) {
  return {a.v * b, a.t * b};
}
template <class V, class T, std::enable_if_t<std::is_arithmetic<T>::value && !std::is_same<T, V>::value, int> = 0>
PK_FN Dual<V> operator+(Dual<V> a, T b) {
  return {a.v + b, a.t};
}
template <class V, class T, std::enable_if_t<std::is_arithmetic<T>::value && !std::is_same<T, V>::value, int> = 0>
PK_FN Dual<V> operator-(Dual<V> a, T b) {
  return {a.v - b, a.t};
}
template <class V, class T, std::enable_if_t<std::is_arithmetic<T>::value && !std::is_same<T, V>::value, int> = 0>
PK_FN Dual<V> operator*(Dual<V> a, T b) {
  return {a.v * b, a.t * b};
}
// A shared number against a pack of rows.
template <class V, std::enable_if_t<!std::is_same<V, Element<V>>::value, int> = 0>
PK_FN Dual<V> operator*(Dual<V> a, Dual<Element<V>> b) {
  return {a.v * b.v, a.v * b.t + a.t * b.v};
}

template <class V>
PK_FN Dual<V> exp(Dual<V> a) {
  const V y = exp(a.v);
  return {y, y * a.t};
}
template <class V>
PK_FN Dual<V> exp_in_range(Dual<V> a) {
  const V y = exp_in_range(a.v);
  return {y, y * a.t};
}
template <class V>
PK_FN Dual<V> tanh(Dual<V> a) {
  const V y = tanh(a.v);
  return {y, a.t - a.t * (y * y)};
}
template <class V>
PK_FN Dual<V> log(Dual<V> a) {
  return {log(a.v), a.t / a.v};
}
template <class V>
PK_FN Dual<V> square_root(Dual<V> a) {
  const V y = square_root(a.v);
  return {y, a.t * Element<V>(0.5) / y};
}
template <class M, class V>
PK_FN Dual<V> select(M mask, Dual<V> a, Dual<V> b) {
  return {select(mask, a.v, b.v), select(mask, a.t, b.t)};
}

// The value without its derivative.
template <class V>
PK_FN V stop(V a) {
  return a;
}
template <class V>
PK_FN V stop(Dual<V> a) {
  return a.v;
}

// The value as an R: with its derivative, or as the constant that it is.
template <class R, class V>
PK_FN R as(V a) {
  if constexpr (std::is_same<R, V>::value) {
    return a;
  } else {
    return stop(a);
  }
}

// A constant, as a V.
template <class V>
PK_FN V constant(Primal<V> a) {
  if constexpr (is_dual<V>) {
    return V{a, Primal<V>{}};
  } else {
    return a;
  }
}
template <class V>
PK_FN V constant(Element<V> a, std::enable_if_t<!std::is_same<Element<V>, Primal<V>>::value>* = nullptr) {
  return constant<V>(broadcast<Primal<V>>(a));
}

// What a kernel puts out: the value, or on duals the tangent.
template <class V>
PK_FN V output(V a) {
  return a;
}
template <class V>
PK_FN V output(Dual<V> a) {
  return a.t;
}

// a / b, of counts.
template <class T>
PK_FN T ratio(int64_t a, int64_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) {  // the same up to rounding, and without a division in double
    const float x = float(a), y = float(b);
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
    const float quotient = x * inverse;
    return ::fmaf(::fmaf(-quotient, y, x), inverse, quotient);
  }
#endif
  return T(double(a) / double(b));
}

template <class V>
PK_FN V square(V a) {
  return a * a;
}

// sum + a b, a chain of fused operations also on duals; and of its output alone.
template <class V, class R>
PK_FN V plus_product(V sum, V a, R b) {
  if constexpr (is_dual<V> && is_dual<R>) {
    return {sum.v + a.v * b.v, sum.t + a.v * b.t + a.t * b.v};
  } else if constexpr (is_dual<V>) {
    return {sum.v + a.v * b, sum.t + a.t * b};
  } else {
    return sum + a * b;
  }
}
template <class V, class R>
PK_FN Primal<V> plus_output(Primal<V> sum, V a, R b) {
  if constexpr (is_dual<V> && is_dual<R>) {
    return sum + a.v * b.t + a.t * b.v;
  } else {
    return sum + output(a * b);
  }
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
