// Policies that are networks: their loss, its gradient in all parameters, and steps of an optimiser, without a return
// to the caller. On duals, which have tangents of the parameters and of the reward, the derivative of the gradient: a
// product with the Hessian.
//
// Rows are in lanes, so that a layer is a product of its weights with packs (cpu/matrix.hpp), and an activation a lane
// function; for the gradient of the weights the activations are also laid out row by row. A block of rows passes
// through forward, loss and backward while it is in the cache. The kernels of the losses see the last layer's outputs
// as they see any policy's.
#include "cpu/network_block.hpp"
#include "cpu/optimizer.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

// Of the gradients of all chunks of rows, which are added up at the end.
constexpr int64_t kMostGradientBytes = int64_t(1) << 26;

// The scale that all rows share, and from its gradient that of what it is made of.
template <class V>
class SharedScale {
  using P = Primal<V>;
  using T = Element<V>;

 public:
  explicit SharedScale(const Plan<T>& plan) : plan_(plan) {
    const int64_t packs = plan.spread_by_row() ? 0 : packs_of<P>(plan.scale_size);
    P* const memory = static_cast<P*>(memory_.at_least(size_t(2 * packs) * sizeof(P) + 64));
    scale_ = {memory, memory + packs};
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

  const Plan<T>& plan_;
  Workspace memory_;
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
    const size_t needed = size_t(workers) * bytes_ + size_t(chunks.count * plan_.packs) * sizeof(P);
    char* const memory = static_cast<char*>(memory_.at_least(needed));
    P* const weights = reinterpret_cast<P*>(memory + size_t(workers) * bytes_);
    numbers_.assign(size_t(chunks.count * plan_.numbers), 0.0);
    const SharedScale<V> scale(plan_);
    Verdict verdicts[kMostChunks];
    parallel_for(workers, workers, [&](int64_t worker) {
      Block<V> block(plan_, rows, Arena<V>{memory + size_t(worker) * bytes_}, scale.field());
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
    if (plan_.wanted) scale.backward(numbers_.data());
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
  Workspace memory_;
  std::vector<double> numbers_;
};

}  // namespace

// A verdict's row is the step whose batch was refused, after those before it have been taken.
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
      if (verdict.code != kAccepted) return {verdict.code, step};
      if constexpr (!is_dual<V>) update<T>(call, plan.size, step);
    }
    return {};
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
