// Diagonal Gaussian policies on the CPU.
#include "po_kernels/gaussian.hpp"

#include <cmath>

#include "cpu/tiles.hpp"
#include "po_kernels/philox.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

namespace {

// Copies U, symmetrised, and judges it: positive and, as a matrix, symmetric and positive definite by Cholesky in
// double.
template <class V>
Verdict load_precision(SharedInput input, int kind, int64_t dim, Shared<V>* u) {
  using T = Element<V>;
  constexpr double tolerance = 1e-4;  // MATRIX_TOLERANCE of contract.py
  const int64_t size = precision_size(kind, dim);
  load_shared<V>(input, size, u);
  const T* value = static_cast<const T*>(input.value);
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (!std::isfinite(value[i])) return {kPrecisionNotPositive, 0};
    if (kind != kFull && !(value[i] > T(0))) return {kPrecisionNotPositive, 0};
    largest = std::max(largest, std::fabs(double(value[i])));
  }
  if (kind != kFull) return {};
  std::unique_ptr<double[]> factor(new double[size_t(size)]);
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double a = value[i * dim + j], b = value[j * dim + i];
      if (std::fabs(a - b) > tolerance * largest) return {kPrecisionNotSymmetric, 0};
      factor[i * dim + j] = 0.5 * (a + b);
      u[i * dim + j] = u[j * dim + i] = (u[i * dim + j] + u[j * dim + i]) * T(0.5);
    }
  }
  for (int64_t j = 0; j < dim; ++j) {
    double pivot = factor[j * dim + j];
    for (int64_t k = 0; k < j; ++k) pivot -= factor[j * dim + k] * factor[j * dim + k];
    if (!(pivot > 0)) return {kPrecisionNotPositive, 0};
    factor[j * dim + j] = std::sqrt(pivot);
    for (int64_t i = j + 1; i < dim; ++i) {
      double sum = factor[i * dim + j];
      for (int64_t k = 0; k < j; ++k) sum -= factor[i * dim + k] * factor[j * dim + k];
      factor[i * dim + j] = sum / factor[j * dim + j];
    }
  }
  return {};
}

// Totals of precision_terms as the gradient in U: an off-diagonal term of x xᵀ stands at both of its places.
template <class T>
void store_precision(int kind, int64_t dim, const double* totals, T* to) {
  if (kind != kFull) {
    for (int64_t i = 0; i < precision_terms(kind, dim); ++i) to[i] = T(totals[i]);
    return;
  }
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j <= i; ++j) to[i * dim + j] = to[j * dim + i] = T(totals[i * (i + 1) / 2 + j]);
  }
}

template <class V>
Verdict policy_loss(const GaussianPolicyLoss& call) {
  using T = Element<V>;
  using P = Primal<V>;
  const int64_t dim = call.dim;
  const Surrogate s = surrogate(call);
  std::unique_ptr<Shared<V>[]> u(new Shared<V>[size_t(precision_size(call.precision_kind, dim))]);
  const Verdict verdict = load_precision<V>(call.precision, call.precision_kind, dim, u.get());
  if (verdict.code != kAccepted) return verdict;
  const Precision<V> precision{call.precision_kind, u.get()};

  const SharedSums sums{precision_terms(call.precision_kind, dim), call.grad_precision != nullptr, true};
  const size_t bytes =
      sizeof(V) * size_t(7 * dim + 4 * call.samples) + sizeof(P) * size_t(call.samples * dim + 3 * dim) + 1024;
  const auto totals = for_each_tile<V>(call, sums, bytes, [&](Tile tile, Arena<V> arena, P* shared, P& loss, P* stats) {
    V* mean = arena.take(dim);
    V* log_std = arena.take(dim);
    V* target = arena.take(dim);
    V* work = arena.take(4 * dim + 4 * call.samples);
    P* noise = arena.template take<P>(call.samples * dim);
    P* gradients = arena.template take<P>(3 * dim);
    load(tile, call.mean, dim, mean);
    load(tile, call.log_std, dim, log_std);
    load(tile, call.target, dim, target);
    const GaussianRow<V> row{dim, mean, log_std, target, precision};
    const GaussianGradients<V> out{
        load_weight<V>(call, tile), call.grad_mean ? gradients : nullptr, call.grad_log_std ? gradients + dim : nullptr,
        call.grad_target ? gradients + 2 * dim : nullptr, call.grad_precision ? shared : nullptr};
    Group<V> group{};
    if (s.estimator == kClosedForm) {
      loss = output(gaussian_closed_form(row, s.entropy_coef, out, work));
    } else {
      Word<V> low, high;
      row_numbers(call, tile, low, high);
      for (int64_t g = 0; g < call.samples; ++g) {
        standard_normals(call.seed, uint32_t(g), low, high, dim, noise + g * dim);
      }
      loss = output(gaussian_sampled(row, s, noise, out, work, group));
    }
    if constexpr (!is_dual<V>) {
      if (call.stats) {
        const RowStats<V> row_stats = gaussian_stats(row, s, group, work + 4 * call.samples);
        for (int i = 0; i < 5; ++i) stats[i] = row_stats.value[i];
      }
    }
    if (out.mean) store(tile, out.mean, dim, call.grad_mean);
    if (out.log_std) store(tile, out.log_std, dim, call.grad_log_std);
    if (out.target) store(tile, out.target, dim, call.grad_target);
  });
  if (call.grad_precision) {
    store_precision(call.precision_kind, dim, totals.get() + kSumsBeforeShared, static_cast<T*>(call.grad_precision));
  }
  return {};
}

}  // namespace

Verdict gaussian_policy_loss(const GaussianPolicyLoss& call) {
  if (call.is_double) {
    return call.dual ? policy_loss<Dual<Lanes<double>>>(call) : policy_loss<Lanes<double>>(call);
  }
  return call.dual ? policy_loss<Dual<Lanes<float>>>(call) : policy_loss<Lanes<float>>(call);
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
