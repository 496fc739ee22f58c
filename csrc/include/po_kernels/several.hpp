// Several lane values side by side, as one lane value.
//
// A long computation on one value waits for each of its steps. On several, the same code makes as many independent
// chains of steps, close enough together for the processor to run them at once.
#pragma once

#include "po_kernels/blocks.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V, int M>
struct Several {
  V v[M];
};

template <class V, int M>
struct LaneTraits<Several<V, M>> {
  using Element = typename LaneTraits<V>::Element;
  using Word = Several<typename LaneTraits<V>::Word, M>;
  using Bits = Several<typename LaneTraits<V>::Bits, M>;
  static constexpr int width = LaneTraits<V>::width;
};

// M of V as one lane value, which is V itself if there is one.
template <class V, int M>
struct SeveralOrOne {
  using type = std::conditional_t<M == 1, V, Several<V, M>>;
};
template <class V, int M>
struct SeveralOrOne<Dual<V>, M> {
  using type = Dual<typename SeveralOrOne<V, M>::type>;
};
template <class V, int M>
using SeveralOf = typename SeveralOrOne<V, M>::type;

// f(i) for each of the values.
template <int M, class F>
PK_FN auto each_of(F f) {
  Several<decltype(f(Constant<0>{})), M> y;
  unrolled<M>([&](auto i) PK_LAMBDA { y.v[i] = f(i); });
  return y;
}

#define PK_SEVERAL_OPERATOR(op)                                                               \
  template <class V, int M>                                                                   \
  PK_FN Several<V, M> operator op(const Several<V, M>& a, const Several<V, M>& b) {           \
    return each_of<M>([&](auto i) PK_LAMBDA { return V(a.v[i] op b.v[i]); });                 \
  }                                                                                           \
  template <class V, class T, int M, std::enable_if_t<std::is_arithmetic<T>::value, int> = 0> \
  PK_FN Several<V, M> operator op(const Several<V, M>& a, T b) {                              \
    return each_of<M>([&](auto i) PK_LAMBDA { return V(a.v[i] op b); });                      \
  }
PK_SEVERAL_OPERATOR(+)
PK_SEVERAL_OPERATOR(-)
PK_SEVERAL_OPERATOR(*)
PK_SEVERAL_OPERATOR(/)
PK_SEVERAL_OPERATOR(&)
PK_SEVERAL_OPERATOR(|)
PK_SEVERAL_OPERATOR(^)
PK_SEVERAL_OPERATOR(<<)
PK_SEVERAL_OPERATOR(>>)
#undef PK_SEVERAL_OPERATOR

#define PK_SEVERAL_COMPARISON(op)                                                             \
  template <class V, class T, int M, std::enable_if_t<std::is_arithmetic<T>::value, int> = 0> \
  PK_FN auto operator op(const Several<V, M>& a, T b) {                                       \
    return each_of<M>([&](auto i) PK_LAMBDA { return a.v[i] op b; });                         \
  }
template <class V, int M>
PK_FN auto operator>(const Several<V, M>& a, const Several<V, M>& b) {
  return each_of<M>([&](auto i) PK_LAMBDA { return a.v[i] > b.v[i]; });
}
PK_SEVERAL_COMPARISON(<)
PK_SEVERAL_COMPARISON(>)
PK_SEVERAL_COMPARISON(!=)
#undef PK_SEVERAL_COMPARISON

template <class V, int M>
PK_FN Several<V, M> operator-(const Several<V, M>& a) {
  return each_of<M>([&](auto i) PK_LAMBDA { return -a.v[i]; });
}

#define PK_SEVERAL_FUNCTION(name)                                      \
  template <class A, int M>                                            \
  PK_FN auto name(const Several<A, M>& a) {                            \
    return each_of<M>([&](auto i) PK_LAMBDA { return name(a.v[i]); }); \
  }
PK_SEVERAL_FUNCTION(square_root)
PK_SEVERAL_FUNCTION(square_root_of_normal)
PK_SEVERAL_FUNCTION(nearest_integer)
PK_SEVERAL_FUNCTION(from_bits)
PK_SEVERAL_FUNCTION(to_bits)
PK_SEVERAL_FUNCTION(widen)
PK_SEVERAL_FUNCTION(narrow)
#undef PK_SEVERAL_FUNCTION

// Conversions to V, a Several.
#define PK_SEVERAL_CONVERSION(name)                                        \
  template <class V, class A, int M>                                       \
  PK_FN auto name(const Several<A, M>& a) {                                \
    using To = std::remove_reference_t<decltype(V{}.v[0])>;                \
    return each_of<M>([&](auto i) PK_LAMBDA { return name<To>(a.v[i]); }); \
  }
PK_SEVERAL_CONVERSION(from_word)
PK_SEVERAL_CONVERSION(from_integer)
PK_SEVERAL_CONVERSION(element_mask)
#undef PK_SEVERAL_CONVERSION

template <class Mask, class V, int M>
PK_FN Several<V, M> select(const Several<Mask, M>& mask, const Several<V, M>& a, const Several<V, M>& b) {
  return each_of<M>([&](auto i) PK_LAMBDA { return select(mask.v[i], a.v[i], b.v[i]); });
}

// f(f(first, second), third) and so on.
template <class V, class F>
PK_FN V folded(const V& x, const F&) {
  return x;
}
template <class V, int M, class F>
PK_FN V folded(const Several<V, M>& x, const F& f) {
  V y = x.v[0];
  unrolled<M - 1>([&](auto i) PK_LAMBDA { y = f(y, x.v[i + 1]); });
  return y;
}

template <class W, int M>
PK_FN void multiply_wide(const Several<W, M>& a, uint32_t b, Several<W, M>& high, Several<W, M>& low) {
  unrolled<M>([&](auto i) PK_LAMBDA { multiply_wide(a.v[i], b, high.v[i], low.v[i]); });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
