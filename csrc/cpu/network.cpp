// Policies that are networks: their loss, its gradient in all parameters, and steps of an optimiser, without a return
// to the caller. On duals, which have tangents of the parameters and of the reward, the derivative of the gradient: a
// product with the Hessian.
//
// Rows are in lanes, so that a layer is a product of its weights with packs (cpu/matrix.hpp), and an activation a lane
// function; for the gradient of the weights the activations are also laid out row by row. A block of rows passes
// through forward, loss and backward while it is in the cache. The kernels of the losses see the last layer's outputs
// as they see any policy's.
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/matrix.hpp"
#include "cpu/optimizer.hpp"
#include "cpu/tiles.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

#define PK_DECLARE(name, type) Verdict name(const type&);
PK_FOR_EACH_KERNEL(PK_DECLARE)
#undef PK_DECLARE

namespace {

constexpr int64_t kBlockRows = 128;
// Of the gradients of all chunks of rows, which are added up at the end.
constexpr int64_t kMostGradientBytes = int64_t(1) << 26;

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

// Passes of a block of rows.
template <class V>
class Block {
  using P = Primal<V>;
  using T = Element<V>;
  static constexpr int width = LaneTraits<V>::width;
  static constexpr int64_t kPacks = packs_of<P>(kBlockRows);

 public:
  Block(const Plan<T>& plan, const Rows& rows, Arena<V> arena, Field<V> scale)
      : plan_(plan), call_(plan.call), rows_(rows) {
    nets_.resize(plan.nets.size());
    for (size_t n = 0; n < nets_.size(); ++n) {
      const std::vector<int64_t>& width = plan.nets[n].width;
      for (size_t l = 0; l < width.size(); ++l) {
        Layer layer;
        layer.out = Field<V>::in(arena, width[l] * kPacks);
        layer.slope = Field<V>::in(arena, width[l] * kPacks);
        if (l + 1 < width.size()) layer.rows = Field<V>::in(arena, kBlockRows * packs_of<P>(width[l]));
        nets_[n].push_back(layer);
      }
    }
    for (Field<V>& gradient : gradient_) gradient = Field<V>::in(arena, plan.widest() * kPacks);
    const int64_t mean = call_.dim * kPacks, scales = plan.scale_size * kPacks;
    mean_rows_ = Field<V>::in(arena, mean), mean_gradient_ = Field<V>::in(arena, mean);
    one_gradient_ = Field<V>::in(arena, mean), target_ = arena.template take<P>(mean);
    scale_gradient_ = Field<V>::in(arena, scales), scale_sum_ = Field<V>::in(arena, scales);
    scale_rows_ = plan.spread_by_row() || is_dual<V> ? Field<V>::in(arena, scales) : scale;
    if (!plan.spread_by_row()) share(scale);
    labels_ = arena.template take<int64_t>(kBlockRows);
    reward_ = arena.template take<P>(packs_of<P>(plan.reward_size) + 1);
  }

  static size_t bytes(const Plan<T>& plan) {
    int64_t packs = (2 * plan.widest() + 4 * plan.call.dim + 3 * plan.scale_size) * kPacks + plan.reward_size;
    int64_t arrays = 16;
    for (const Layers& net : plan.nets) {
      for (const int64_t width : net.width) packs += 2 * width * kPacks + kBlockRows * packs_of<P>(width), arrays += 3;
    }
    // The start of an array is rounded up, and on duals there are two of it.
    return size_t(packs) * sizeof(V) + size_t(arrays) * 2 * 64 + size_t(kBlockRows) * sizeof(int64_t);
  }

  Verdict run(int64_t begin, int64_t count, Sums<V> sums) {
    begin_ = begin, count_ = count, packs_ = packs_of<P>(count);
    for (size_t n = 0; n < nets_.size(); ++n) forward(n);
    const Verdict verdict = lose(sums);
    if (verdict.code != kAccepted) return verdict;
    for (size_t n = 0; n < nets_.size(); ++n) backward(n, sums);
    return {};
  }

 private:
  struct Layer {
    Field<V> out, slope, rows;  // what goes into a layer, with rows in lanes and row by row, and f' of it
  };

  // A scale that all rows share has a stride of 0, but a tangent for each row.
  void share(Field<V> scale) {
    if constexpr (is_dual<V>) {
      scale_rows_.v = scale.v;
      T* to = reinterpret_cast<T*>(scale_rows_.t);
      for (int64_t i = 0; i < kBlockRows; ++i) {
        memcpy(to + i * plan_.scale_size, scale.t, size_t(plan_.scale_size) * sizeof(T));
      }
    }
  }

  Coefficients<T> weight(int64_t parameter, int64_t row, int64_t column) const {
    return {{plan_.value(parameter), row, column}, {plan_.tangent(parameter), row, column}};
  }

  // The rows of pack p, in memory of so many columns.
  void row_by_row(T* memory, int64_t p, int64_t columns, T* (&row)[width]) const {
    for (int l = 0; l < width; ++l) row[l] = memory + (p * width + l) * columns;
  }
  // The same of what is read: zeros, of which there are as many as columns, beyond the last row.
  void row_by_row(const T* memory, int64_t p, int64_t columns, const T* zeros, const T* (&row)[width]) const {
    for (int l = 0; l < width; ++l) {
      const int64_t at = p * width + l;
      row[l] = at < count_ ? memory + at * columns : zeros;
    }
  }

  void load_inputs(const Layer& layer, int64_t columns) {
    const T* inputs = static_cast<const T*>(call_.inputs);
    const int64_t row_packs = packs_of<P>(columns);
    if constexpr (is_dual<V>) {
      for (int64_t i = 0; i < columns * packs_; ++i) layer.out.t[i] = P{};
      for (int64_t i = 0; i < count_ * row_packs; ++i) layer.rows.t[i] = P{};
    }
    T* to = reinterpret_cast<T*>(layer.rows.v);
    for (int64_t i = 0; i < packs_ * width; ++i) {
      T* row = to + i * row_packs * width;
      if (i < count_) {
        memcpy(row, inputs + rows_(begin_ + i) * columns, size_t(columns) * sizeof(T));
      } else {
        memset(row, 0, size_t(columns) * sizeof(T));
      }
    }
    for (int64_t p = 0; p < packs_; ++p) {
      const T* row[width];
      for (int l = 0; l < width; ++l) row[l] = to + (p * width + l) * row_packs * width;
      rows_to_lanes<T, width>(row, columns, reinterpret_cast<T*>(layer.out.v + p), packs_ * width);
    }
  }

  void forward(size_t n) {
    const Layers& net = plan_.nets[n];
    load_inputs(nets_[n][0], net.width[0]);
    for (int64_t l = 0; l < net.depth(); ++l) {
      const Layer &from = nets_[n][l], &to = nets_[n][l + 1];
      const int64_t in = net.width[l], out = net.width[l + 1], parameter = net.first + 2 * l;
      const T *bias = plan_.value(parameter + 1), *bias_tangent = plan_.tangent(parameter + 1);
      for (int64_t o = 0; o < out; ++o) {
        V start{};
        if constexpr (is_dual<V>) {
          if (bias) start.v = broadcast<P>(bias[o]);
          if (bias && bias_tangent) start.t = broadcast<P>(bias_tangent[o]);
        } else {
          if (bias) start = broadcast<P>(bias[o]);
        }
        for (int64_t p = 0; p < packs_; ++p) to.out.set(o * packs_ + p, start);
      }
      add_product<V>(weight(parameter, in, 1), out, in, packs_, from.out, packs_, to.out, packs_);
      if (l + 1 == net.depth()) break;
      for (int64_t i = 0; i < out * packs_; ++i) {
        V slope;
        to.out.set(i, activate(call_.activation, to.out.get(i), slope));
        to.slope.set(i, slope);
      }
      const int64_t row_packs = packs_of<P>(out);
      for (int64_t p = 0; p < packs_; ++p) {
        T* row[width];
        row_by_row(reinterpret_cast<T*>(to.rows.v), p, row_packs * width, row);
        lanes_to_rows(to.out.v + p, out, row, packs_);
        if constexpr (is_dual<V>) {
          row_by_row(reinterpret_cast<T*>(to.rows.t), p, row_packs * width, row);
          lanes_to_rows(to.out.t + p, out, row, packs_);
        }
      }
    }
    if (n == 1 && call_.spread == kBounded) {
      const Layer& last = nets_[1].back();
      for (int64_t i = 0; i < call_.dim * packs_; ++i) {
        V slope;
        last.out.set(i, bounded(call_, last.out.get(i), slope));
        last.slope.set(i, slope);
      }
    }
  }

  // Outputs of a network as rows (count, columns), and back.
  void store_rows(Field<V> from, int64_t columns, Field<V> to) const {
    for (int64_t p = 0; p < packs_; ++p) {
      T* row[width];
      row_by_row(reinterpret_cast<T*>(to.v), p, columns, row);
      lanes_to_rows(from.v + p, columns, row, packs_);
      if constexpr (is_dual<V>) {
        row_by_row(reinterpret_cast<T*>(to.t), p, columns, row);
        lanes_to_rows(from.t + p, columns, row, packs_);
      }
    }
  }
  void load_rows(Field<V> from, int64_t columns, Field<V> to) const {
    const std::vector<T> zeros(size_t(columns), T(0));
    const auto one = [&](const P* from, P* to) {
      for (int64_t p = 0; p < packs_; ++p) {
        const T* row[width];
        row_by_row(reinterpret_cast<const T*>(from), p, columns, zeros.data(), row);
        rows_to_lanes<T, width>(row, columns, reinterpret_cast<T*>(to + p), packs_ * width);
      }
    };
    one(from.v, to.v);
    if constexpr (is_dual<V>) one(from.t, to.t);
  }

  // The targets of observation r.
  const void* targets(int64_t r) {
    const int64_t first = r * call_.rows;
    if (call_.head == kCategoricalHead) {
      const int64_t* labels = static_cast<const int64_t*>(call_.target) + first;
      if (!rows_.index) return labels + begin_;
      for (int64_t i = 0; i < count_; ++i) labels_[i] = labels[rows_(begin_ + i)];
      return labels_;
    }
    const T* values = static_cast<const T*>(call_.target) + first * call_.dim;
    if (!rows_.index) return values + begin_ * call_.dim;
    T* to = reinterpret_cast<T*>(target_);
    for (int64_t i = 0; i < count_; ++i) {
      memcpy(to + i * call_.dim, values + rows_(begin_ + i) * call_.dim, size_t(call_.dim) * sizeof(T));
    }
    return to;
  }

  // Adds to the chunk's loss and the reward's gradient; leaves the gradients of mean and scale in `mean_gradient_` and
  // `scale_sum_`, (count, ...).
  Verdict lose(Sums<V> sums) {
    store_rows(nets_[0].back().out, call_.dim, mean_rows_);
    if (plan_.spread_by_row()) store_rows(nets_[1].back().out, call_.dim, scale_rows_);
    for (int64_t r = 0; r < call_.observations; ++r) {
      const Field<V> mean = r == 0 ? mean_gradient_ : one_gradient_, scale = r == 0 ? scale_sum_ : scale_gradient_;
      const void* target = targets(r);
      const bool reward_wanted = call_.reward.gradient != nullptr;
      T loss = 0;
      Verdict verdict = lose_one(r, target, false, mean.v, scale.v, !is_dual<V> && reward_wanted, &loss);
      if constexpr (is_dual<V>) {
        T unused;
        if (verdict.code == kAccepted) verdict = lose_one(r, target, true, mean.t, scale.t, reward_wanted, &unused);
      }
      if (verdict.code != kAccepted) return verdict;
      sums.numbers[plan_.loss_at] += double(loss);
      for (int64_t i = 0; reward_wanted && i < plan_.reward_size; ++i) {
        sums.numbers[plan_.reward_at + i] += double(reinterpret_cast<const T*>(reward_)[i]);
      }
      if (r == 0) continue;
      add(mean_gradient_, one_gradient_, count_ * call_.dim);
      add(scale_sum_, scale_gradient_, count_ * plan_.scale_size);
    }
    return {};
  }

  void add(Field<V> to, Field<V> from, int64_t count) const {
    for (int64_t i = 0; i < packs_of<P>(count); ++i) to.set(i, to.get(i) + from.get(i));
  }

  template <class C>
  void fill(C& c, int64_t r, bool dual, void* loss) {
    c.is_double = sizeof(T) == 8, c.dual = dual, c.rows = count_, c.threads = 1;
    static_cast<Surrogate&>(c) = call_;
    c.reduction = kSumOverRows;
    weight_ = T(1.0 / (double(rows_.count) * double(call_.observations)));
    c.cotangent.value = &weight_, c.out = loss;
    c.seed = rows_.seed, c.row_offset = uint64_t(r * rows_.count + begin_);
  }

  Verdict lose_one(int64_t r, const void* target, bool dual, P* mean, P* scale, bool reward_wanted, T* loss) {
    const auto input = [dual](Field<V> field) { return Input{field.v, dual ? field.t : nullptr}; };
    void* const reward = reward_wanted ? reward_ : nullptr;
    Differentiable given{{call_.reward.value, dual ? call_.reward.tangent : nullptr}, reward};
    if (call_.head == kCategoricalHead) {
      CategoricalPolicyLoss c;
      fill(c, r, dual, loss);
      c.classes = call_.dim, c.target = static_cast<const int64_t*>(target), c.reward_table = given;
      c.logits = {{input(mean_rows_), mean}, call_.dim};
      return categorical_policy_loss(c);
    }
    GaussianPolicyLoss c;
    fill(c, r, dual, loss);
    c.dim = call_.dim, c.precision_ndim = call_.precision_ndim, c.precision = given;
    c.mean = {{input(mean_rows_), mean}, call_.dim};
    c.scale = {{input(scale_rows_), scale}, plan_.spread_by_row() ? call_.dim : 0};
    c.target = {{{target, nullptr}, nullptr}, call_.dim};
    return call_.head == kMvnHead ? mvn_policy_loss(c) : gaussian_policy_loss(c);
  }

  void backward(size_t n, Sums<V> sums) {
    const Layers& net = plan_.nets[n];
    const int64_t depth = net.depth();
    Field<V> gradient = gradient_[0], next = gradient_[1];
    load_rows(n == 0 ? mean_gradient_ : scale_sum_, net.width[depth], gradient);
    if (n == 0 && !plan_.spread_by_row()) add_scales(sums);
    if (n == 1 && call_.spread == kBounded) times_slope(gradient, nets_[1].back().slope, call_.dim);
    for (int64_t l = depth; l-- > 0;) {
      const int64_t in = net.width[l], out = net.width[l + 1], parameter = net.first + 2 * l;
      const int64_t row_packs = packs_of<P>(in);
      if (plan_.gradient(parameter)) {
        const int64_t row = packs_ * width;
        const Coefficients<T> by{{reinterpret_cast<const T*>(gradient.v), row, 1},
                                 {reinterpret_cast<const T*>(gradient.t), row, 1}};
        P* to = sums.weights + plan_.offset[parameter];
        add_product<V, false>(by, out, count_, row_packs, nets_[n][l].rows, row_packs, {to, to}, row_packs);
      }
      double* bias = sums.numbers + plan_.offset[parameter + 1];
      for (int64_t o = 0; plan_.gradient(parameter + 1) && o < out; ++o) {
        const P* row = gradient.output() + o * packs_;
        P sum = row[0];
        for (int64_t p = 1; p < packs_; ++p) sum = sum + row[p];
        bias[o] += lane_sum(sum);
      }
      if (l == 0) break;
      for (int64_t i = 0; i < in * packs_; ++i) next.set(i, V{});
      add_product<V>(weight(parameter, 1, in), in, out, packs_, gradient, packs_, next, packs_);
      times_slope(next, nets_[n][l].slope, in);
      std::swap(gradient, next);
    }
  }

  void times_slope(Field<V> gradient, Field<V> slope, int64_t columns) const {
    for (int64_t i = 0; i < columns * packs_; ++i) gradient.set(i, gradient.get(i) * slope.get(i));
  }

  // Of a scale that all rows share.
  void add_scales(Sums<V> sums) const {
    const auto one = [&](const P* from, double* to) {
      const T* rows = reinterpret_cast<const T*>(from);
      for (int64_t i = 0; i < count_; ++i) {
        for (int64_t j = 0; j < plan_.scale_size; ++j) to[j] += double(rows[i * plan_.scale_size + j]);
      }
    };
    one(scale_sum_.v, sums.numbers + plan_.scale_at);
    if constexpr (is_dual<V>) one(scale_sum_.t, sums.numbers + plan_.scale_at + plan_.scale_size);
  }

  const Plan<T>& plan_;
  const NetworkLoss& call_;
  const Rows& rows_;
  std::vector<std::vector<Layer>> nets_;
  Field<V> gradient_[2], mean_rows_, mean_gradient_, one_gradient_, scale_rows_, scale_gradient_, scale_sum_;
  P *target_ = nullptr, *reward_ = nullptr;
  int64_t* labels_ = nullptr;
  T weight_ = 0;
  int64_t begin_ = 0, count_ = 0, packs_ = 0;
};

// The scale that all rows share, and from its gradient that of what it is made of.
template <class V>
class SharedScale {
  using P = Primal<V>;
  using T = Element<V>;

 public:
  explicit SharedScale(const Plan<T>& plan) : plan_(plan) {
    const int64_t packs = plan.spread_by_row() ? 0 : packs_of<P>(plan.scale_size);
    memory_.reset(new (std::align_val_t(64)) P[size_t(2 * packs) + 1]());
    scale_ = {memory_.get(), memory_.get() + packs};
    if (packs == 0) return;
    for (int64_t i = 0; i < plan.scale_size; ++i) {
      V slope;
      const V x = element(i, slope);
      const auto put = [i](P* to, const P& from) { reinterpret_cast<T*>(to)[i] = from.v[0]; };
      if constexpr (is_dual<V>) {
        put(scale_.v, x.v);
        put(scale_.t, x.t);
      } else {
        put(scale_.v, x);
      }
    }
  }

  Field<V> field() const { return scale_; }

  // Adds the gradients of the spread's parameters to the numbers.
  void backward(double* numbers) const {
    if (plan_.spread_by_row()) return;
    const int64_t dim = plan_.call.dim, first = plan_.spread_first;
    for (int64_t i = 0; i < plan_.scale_size; ++i) {
      V slope;
      element(i, slope);
      const double value = numbers[plan_.scale_at + i], tangent = numbers[plan_.scale_at + plan_.scale_size + i];
      double result;
      if constexpr (is_dual<V>) {
        result = value * double(slope.t.v[0]) + tangent * double(slope.v.v[0]);
      } else {
        result = value * double(slope.v[0]);
      }
      if (plan_.call.spread != kTriangular) {
        numbers[plan_.offset[first] + i] = result;
      } else if (i / dim == i % dim) {
        numbers[plan_.offset[first] + i / dim] = result;
      } else {
        numbers[plan_.offset[first + 1] + i] = result;
      }
    }
  }

 private:
  // Number i of the scale, and its derivative in the parameter that it is made of.
  V element(int64_t i, V& slope) const {
    const int64_t dim = plan_.call.dim, first = plan_.spread_first;
    slope = constant<V>(T(1));
    if (plan_.call.spread != kTriangular) {
      const V s = parameter(first, i);
      return plan_.call.spread == kBounded ? bounded(plan_.call, s, slope) : s;
    }
    if (i / dim == i % dim) return slope = exp(parameter(first, i / dim));
    if (i / dim > i % dim) return parameter(first + 1, i);
    return slope = V{};
  }
  V parameter(int64_t p, int64_t i) const {
    if constexpr (is_dual<V>) {
      const T* tangent = plan_.tangent(p);
      return {broadcast<P>(plan_.value(p)[i]), broadcast<P>(tangent ? tangent[i] : T(0))};
    } else {
      return broadcast<P>(plan_.value(p)[i]);
    }
  }

  struct Free {
    void operator()(P* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  const Plan<T>& plan_;
  std::unique_ptr<P, Free> memory_;
  Field<V> scale_;
};

// The sums of all chunks of rows of a step.
template <class V>
class Evaluation {
  using P = Primal<V>;
  using T = Element<V>;

 public:
  explicit Evaluation(const Plan<T>& plan) : plan_(plan), bytes_((Block<V>::bytes(plan) + 63) / 64 * 64) {}

  // Writes the gradients and adds the loss to *loss.
  Verdict run(const Rows& rows, double* loss) {
    const NetworkLoss& call = plan_.call;
    const int64_t gradient_bytes = std::max<int64_t>(1, plan_.packs * int64_t(sizeof(P)));
    const int64_t most = std::clamp<int64_t>(kMostGradientBytes / gradient_bytes, 2, kMostChunks);
    const Chunks chunks(rows.count, most, kBlockRows, kBlockRows);
    Call work = call;
    work.rows = rows.count;
    const int workers = int(std::min<int64_t>(chunks.count, worthwhile_threads(work, plan_.weights / 2 + 1)));
    const size_t needed = size_t(workers) * bytes_ + size_t(chunks.count * plan_.packs) * sizeof(P) + 64;
    if (memory_.size() < needed) memory_.resize(needed);
    char* const aligned = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64;
    P* const weights = reinterpret_cast<P*>(aligned + size_t(workers) * bytes_);
    numbers_.assign(size_t(chunks.count * plan_.numbers), 0.0);
    const SharedScale<V> scale(plan_);
    Verdict verdicts[kMostChunks];
    parallel_for(workers, workers, [&](int64_t worker) {
      Block<V> block(plan_, rows, Arena<V>{aligned + size_t(worker) * bytes_}, scale.field());
      for (int64_t chunk = worker; chunk < chunks.count; chunk += workers) {
        const Sums<V> sums{weights + chunk * plan_.packs, numbers_.data() + chunk * plan_.numbers};
        for (int64_t i = 0; i < plan_.packs; ++i) sums.weights[i] = P{};
        const int64_t end = std::min(rows.count, (chunk + 1) * chunks.size);
        for (int64_t at = chunk * chunks.size; at < end && verdicts[chunk].code == kAccepted; at += kBlockRows) {
          verdicts[chunk] = block.run(at, std::min(kBlockRows, end - at), sums);
        }
      }
    });
    const Verdict verdict = first_refusal(chunks, verdicts);
    if (verdict.code != kAccepted) return verdict;
    for (int64_t chunk = 1; chunk < chunks.count; ++chunk) {
      for (int64_t i = 0; i < plan_.packs; ++i) weights[i] = weights[i] + weights[chunk * plan_.packs + i];
      for (int64_t i = 0; i < plan_.numbers; ++i) numbers_[i] += numbers_[chunk * plan_.numbers + i];
    }
    scale.backward(numbers_.data());
    store(weights);
    *loss = numbers_[plan_.loss_at] / (double(rows.count) * double(call.observations)) + penalty();
    if (T* to = static_cast<T*>(call.reward.gradient)) {
      for (int64_t i = 0; i < plan_.reward_size; ++i) to[i] = T(numbers_[plan_.reward_at + i]);
    }
    return {};
  }

 private:
  void store(const P* weights) const {
    for (size_t i = 0; i < plan_.size.size(); ++i) {
      T* to = plan_.gradient(i);
      if (to == nullptr) continue;
      const int64_t size = plan_.size[i];
      if (int64_t(i) < plan_.spread_first && i % 2 == 0) {
        const int64_t rows = plan_.size[i + 1], columns = rows == 0 ? 0 : size / rows;
        const P* from = weights + plan_.offset[i];
        for (int64_t r = 0; r < rows; ++r, from += packs_of<P>(columns)) {
          memcpy(to + r * columns, from, size_t(columns) * sizeof(T));
        }
      } else {
        for (int64_t k = 0; k < size; ++k) to[k] = T(numbers_[plan_.offset[i] + k]);
      }
      const T* parameter = is_dual<V> ? plan_.tangent(i) : plan_.value(i);
      for (int64_t k = 0; plan_.call.l2 != 0 && parameter != nullptr && k < size; ++k) {
        to[k] += T(plan_.call.l2) * parameter[k];
      }
    }
  }

  double penalty() const {
    if (plan_.call.l2 == 0) return 0;
    double squared = 0;
    for (size_t i = 0; i < plan_.size.size(); ++i) {
      const T* value = plan_.value(i);
      for (int64_t k = 0; value != nullptr && k < plan_.size[i]; ++k) squared += double(value[k]) * double(value[k]);
    }
    return 0.5 * plan_.call.l2 * squared;
  }

  const Plan<T>& plan_;
  const size_t bytes_;
  std::vector<char> memory_;
  std::vector<double> numbers_;
};

}  // namespace

Verdict network_loss(const NetworkLoss& call) {
  return with_lanes(call, [](auto lane, const NetworkLoss& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    const Plan<T> plan(call);
    Evaluation<V> evaluation(plan);
    const int64_t* index = call.index;
    for (int64_t step = 0; step < call.steps; ++step) {
      const Rows rows{call.batch_rows[step], index, call.seeds[step]};
      if (index) index += rows.count;
      const Verdict verdict = evaluation.run(rows, call.losses + step);
      if (verdict.code != kAccepted) return verdict;
      if constexpr (!is_dual<V>) update<T>(call, plan.size, step);
    }
    return {};
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
