// A block of rows that passes through a network: forward, loss and backward.
#pragma once

#include "cpu/network.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

#define PK_DECLARE(name, type) Verdict name(const type&);
PK_FOR_EACH_KERNEL(PK_DECLARE)
#undef PK_DECLARE

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
    if (verdict.code != kAccepted || !plan_.wanted) return verdict;
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
    if (columns == 0) return;
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

  void fill(Call& c, bool dual) const { c.is_double = sizeof(T) == 8, c.dual = dual, c.rows = count_, c.threads = 1; }

  template <class C>
  void fill(C& c, int64_t r, bool dual, const T* weight, void* loss) const {
    fill(c, dual);
    static_cast<Surrogate&>(c) = call_;
    c.reduction = kSumOverRows;
    c.cotangent.value = weight, c.out = loss;
    c.seed = rows_.seed, c.row_offset = uint64_t(r * rows_.count + begin_);
  }

  Verdict lose_one(int64_t r, const void* target, bool dual, P* mean, P* scale, bool reward_wanted, T* loss) const {
    const auto input = [dual](Field<V> field) { return Input{field.v, dual ? field.t : nullptr}; };
    const RowInput first{{input(mean_rows_), mean}, call_.dim};
    const RowInput second{{input(scale_rows_), scale}, plan_.spread_by_row() ? call_.dim : 0};
    const T weight = T(1.0 / (double(rows_.count) * double(call_.observations)));
    if (call_.reward.value == nullptr) return lose_likelihood(target, dual, first, second, weight, loss);
    Differentiable reward{{call_.reward.value, dual ? call_.reward.tangent : nullptr},
                          reward_wanted ? reward_ : nullptr};
    if (call_.head == kCategoricalHead) {
      CategoricalPolicyLoss c;
      fill(c, r, dual, &weight, loss);
      c.classes = call_.dim, c.logits = first, c.target = static_cast<const int64_t*>(target), c.reward_table = reward;
      return categorical_policy_loss(c);
    }
    GaussianPolicyLoss c;
    fill(c, r, dual, &weight, loss);
    c.dim = call_.dim, c.mean = first, c.scale = second, c.target = {{{target, nullptr}, nullptr}, call_.dim};
    c.precision_ndim = call_.precision_ndim, c.precision = reward;
    return call_.head == kMvnHead ? mvn_policy_loss(c) : gaussian_policy_loss(c);
  }

  // The negative log-likelihood of the targets.
  Verdict lose_likelihood(const void* target, bool dual, RowInput mean, RowInput scale, T weight, T* loss) const {
    T log_prob[kBlockRows], weights[kBlockRows];
    for (T& each : weights) each = -weight;
    const auto run = [&](auto call, auto kernel) {
      fill(call, dual);
      call.count = 1, call.cotangent.value = weights, call.out = log_prob;
      return kernel(call);
    };
    Verdict verdict;
    if (call_.head == kCategoricalHead) {
      CategoricalLogProb c;
      c.classes = call_.dim, c.logits = mean, c.value = static_cast<const int64_t*>(target);
      verdict = run(c, [](const auto& c) { return categorical_log_prob(c); });
    } else {
      GaussianLogProb c;
      c.dim = call_.dim, c.mean = mean, c.scale = scale, c.value = {{target, nullptr}, nullptr};
      verdict = run(
          c, [mvn = call_.head == kMvnHead](const auto& c) { return mvn ? mvn_log_prob(c) : gaussian_log_prob(c); });
    }
    double sum = 0;
    for (int64_t i = 0; i < count_; ++i) sum -= double(log_prob[i]);
    *loss = T(sum);
    return verdict;
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
  int64_t begin_ = 0, count_ = 0, packs_ = 0;
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
