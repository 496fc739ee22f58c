// The CPU kernels of both Gaussians: Scale is DiagonalScale or TriangularScale.
#pragma once

#include <cmath>

#include "cpu/tiles.hpp"
#include "po_kernels/gaussian_family.hpp"
#include "po_kernels/philox.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

// Judges U: positive and, as a matrix, symmetric and positive definite by a Cholesky factorisation in double. Apart
// from the kernels, within which no register is left for its loops.
template <class T>
[[gnu::noinline]] Verdict judge_precision(const T* value, int kind, int64_t dim) {
  const int64_t size = precision_size(kind, dim);
  T largest = 0;
  bool finite = true, positive = true;
  for (int64_t i = 0; i < size; ++i) {
    finite &= std::isfinite(value[i]);
    positive &= value[i] > T(0);
    largest = std::max(largest, std::fabs(value[i]));
  }
  if (!finite || (kind != kFull && !positive)) return {kPrecisionNotPositive, 0};
  if (kind != kFull) return {};
  std::unique_ptr<double[]> factor(new double[size_t(size + dim)]);
  double* column = factor.get() + size;
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const double a = value[i * dim + j], b = value[j * dim + i];
      if (std::fabs(a - b) > kMatrixTolerance * double(largest)) return {kPrecisionNotSymmetric, 0};
      factor[i * dim + j] = 0.5 * (a + b);
    }
  }
  for (int64_t j = 0; j < dim; ++j) {
    const double pivot = factor[j * dim + j];
    if (!(pivot > 0)) return {kPrecisionNotPositive, 0};
    const double inverse = 1.0 / std::sqrt(pivot);
    for (int64_t i = j + 1; i < dim; ++i) column[i] = factor[i * dim + j] * inverse;
    for (int64_t i = j + 1; i < dim; ++i) {
      double* row = factor.get() + i * dim;
      const double at = column[i];
      for (int64_t k = j + 1; k <= i; ++k) row[k] -= at * column[k];
    }
  }
  return {};
}

// Judges U and copies it, symmetrised.
template <class V>
Verdict load_precision(Input input, int kind, int64_t dim, Shared<V>* u) {
  using T = Element<V>;
  const Verdict verdict = judge_precision(static_cast<const T*>(input.value), kind, dim);
  if (verdict.code != kAccepted) return verdict;
  load_shared<V>(input, precision_size(kind, dim), u);
  for (int64_t i = 0; kind == kFull && i < dim; ++i) {
    for (int64_t j = 0; j < i; ++j) u[i * dim + j] = u[j * dim + i] = (u[i * dim + j] + u[j * dim + i]) * T(0.5);
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

// Refuses a matrix that is no triangular scale.
template <class T>
Verdict check_triangular(const T* matrix, int64_t dim, int64_t row) {
  for (int64_t i = 0; i < dim * dim; ++i) {
    if (!std::isfinite(matrix[i])) return {kScaleNotFinite, row};
  }
  for (int64_t i = 0; i < dim; ++i) {
    if (!(matrix[i * dim + i] > T(0))) return {kSingular, row};
  }
  for (int64_t i = 0; i < dim; ++i) {
    for (int64_t j = i + 1; j < dim; ++j) {
      const double scale = std::sqrt(double(matrix[i * dim + i]) * double(matrix[j * dim + j]));
      if (!(std::fabs(double(matrix[i * dim + j])) <= kMatrixTolerance * scale)) return {kNotTriangular, row};
    }
  }
  return {};
}

// Refuses a triangular scale that is none, or singular. A diagonal one is always right.
template <template <class> class Scale, class V>
Verdict check_scale(Tile tile, const Scale<V>& loaded, RowInput scale) {
  if constexpr (Scale<V>::triangular) {
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t dim = loaded.dim;
    P wrong{};  // lane by lane, not zero where the matrix has to be looked at
    for (int64_t i = 0; i < dim; ++i) {
      const V* row = loaded.row(i);
      for (int64_t j = 0; j <= i; ++j) wrong = wrong + stop(row[j]) * T(0);
      wrong = select(stop(row[i]) > T(0), wrong, broadcast<P>(T(1)));
      for (int64_t j = i + 1; j < dim; ++j) wrong = select(stop(row[j]) != T(0), broadcast<P>(T(1)), wrong);
    }
    for (int l = 0; l < tile.count; ++l) {
      if (wrong.v[l] == T(0)) continue;
      const Verdict verdict =
          check_triangular(static_cast<const T*>(scale.value) + (tile.begin + l) * scale.stride, dim, tile.begin + l);
      if (verdict.code != kAccepted) return verdict;
    }
  }
  return {};
}

// Mean and scale of a tile's rows.
template <class V, template <class> class Scale>
Scale<V> load_policy(Tile tile, int64_t dim, RowInput mean, RowInput scale, Arena<V>& arena, V*& mean_lanes,
                     bool whitens = true) {
  mean_lanes = arena.take(dim);
  V* parameter = arena.take(Scale<V>::size(dim));
  load(tile, mean, dim, mean_lanes);
  load(tile, scale, Scale<V>::size(dim), parameter);
  Scale<V> loaded(dim, parameter);
  loaded.prepare(arena.take(Scale<V>::work(dim)), whitens);
  return loaded;
}

template <class V, template <class> class Scale>
size_t policy_bytes(int64_t dim) {
  return sizeof(V) * size_t(dim + Scale<V>::size(dim) + Scale<V>::work(dim)) +
         sizeof(Primal<V>) * size_t(3 * dim + 2 * Scale<V>::size(dim)) + 1024;
}

// Elementary operations a sample, roughly.
template <class S>
int64_t gaussian_operations(int64_t dim) {
  return dim * (8 + dim + (S::triangular ? 2 * dim : 0));
}

// Standard normals of a tile's rows for samples [first, first + samples): (samples, dim) lane values.
template <class P>
void load_noise(const RandomNumbers& call, Tile tile, int64_t first, int64_t samples, int64_t dim, P* noise) {
  Word<P> low, high;
  row_numbers(call, tile, low, high);
  int64_t g = 0;
  for (; g + 2 <= samples; g += 2) standard_normals<2>(call.seed, uint32_t(first + g), low, high, dim, noise + g * dim);
  if (g < samples) standard_normals<1>(call.seed, uint32_t(first + g), low, high, dim, noise + g * dim);
}

template <template <class> class Scale>
Verdict gaussian_kernel(const GaussianPolicyLoss& call) {
  return with_lanes(call, [](auto lane, const GaussianPolicyLoss& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t dim = call.dim, samples = call.num_samples;
    const Surrogate s = call;
    std::unique_ptr<Shared<V>[]> u(new Shared<V>[size_t(precision_size(call.precision_ndim, dim))]);
    const Verdict verdict = load_precision<V>(call.precision, call.precision_ndim, dim, u.get());
    if (verdict.code != kAccepted) return verdict;
    const Precision<V> precision{call.precision_ndim, u.get()};
    // With derivatives in the policy alone, as in an inner loop's Hessian products, the rewards are plain numbers.
    const bool plain_rewards = is_dual<V> && s.estimator != kReparam && !call.target.tangent && !call.precision.tangent;
    std::unique_ptr<T[]> plain(new T[size_t(precision_size(call.precision_ndim, dim))]);
    for (int64_t i = 0; i < precision_size(call.precision_ndim, dim); ++i) plain[i] = as<T>(u[i]);
    const Precision<P> plain_precision{call.precision_ndim, plain.get()};

    const SharedSums sums{precision_terms(call.precision_ndim, dim), call.precision.gradient != nullptr, true};
    const int64_t work_size = 4 * samples + gaussian_work(samples, dim, Scale<V>::size(dim), sums.terms);
    const size_t bytes =
        policy_bytes<V, Scale>(dim) + sizeof(V) * size_t(dim + work_size) + sizeof(P) * size_t(samples * dim);
    const Totals totals = for_each_tile<V>(
        call, (samples + 1) * gaussian_operations<Scale<V>>(dim), sums, bytes,
        [&](Tile tile, Arena<V> arena, P* shared, P& loss, RowStats<P>& stats) -> Verdict {
          V* mean;
          const bool whitens = s.estimator != kClosedForm || call.stats != nullptr;
          const Scale<V> scale = load_policy<V, Scale>(tile, dim, call.mean, call.scale, arena, mean, whitens);
          const Verdict judged = check_scale(tile, scale, call.scale);
          if (judged.code != kAccepted) return judged;
          V* target = arena.take(dim);
          V* work = arena.take(work_size);
          P* noise = arena.template take<P>(samples * dim);
          load(tile, call.target, dim, target);
          const GaussianGradients<V> out{load_weight<V>(call, tile),
                                         arena.template take_for<P>(call.mean.gradient, dim),
                                         arena.template take_for<P>(call.scale.gradient, scale.size()),
                                         arena.template take_for<P>(call.target.gradient, dim),
                                         call.precision.gradient ? shared : nullptr,
                                         nullptr};
          Group<V> group{};
          if (s.estimator == kClosedForm) {
            loss = output(gaussian_closed_form(scale, mean, target, precision, s.entropy_coef, out, work));
          } else {
            load_noise(call, tile, 0, samples, dim, noise);
            if (plain_rewards) {
              loss = output(
                  gaussian_sampled<P>(scale, mean, target, precision, plain_precision, s, noise, out, work, group));
            } else {
              loss = output(gaussian_sampled<V>(scale, mean, target, precision, precision, s, noise, out, work, group));
            }
          }
          if constexpr (!is_dual<V>) {
            if (call.stats) {
              stats = gaussian_policy_stats(scale, mean, target, precision, s, group, work + 4 * samples);
            }
          }
          store(tile, out.mean, dim, call.mean.gradient, arena);
          store(tile, out.scale, scale.size(), call.scale.gradient, arena);
          store(tile, out.target, dim, call.target.gradient, arena);
          return {};
        });
    if (totals.verdict.code == kAccepted && call.precision.gradient) {
      store_precision(call.precision_ndim, dim, totals.shared(), static_cast<T*>(call.precision.gradient));
    }
    return totals.verdict;
  });
}

template <template <class> class Scale>
Verdict gaussian_kernel(const GaussianSurrogateLoss& call) {
  return with_lanes(call, [](auto lane, const GaussianSurrogateLoss& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t dim = call.dim, samples = call.num_samples;
    const Surrogate s = call;
    const int64_t work_size = 4 * samples + gaussian_work(samples, dim, Scale<V>::size(dim));
    const size_t bytes =
        policy_bytes<V, Scale>(dim) + sizeof(V) * size_t(samples + work_size) + sizeof(P) * size_t(samples * (dim + 1));
    const int64_t operations = (samples + 1) * gaussian_operations<Scale<V>>(dim);
    const Totals totals = for_each_tile<V>(
        call, operations, SharedSums{}, bytes,
        [&](Tile tile, Arena<V> arena, P*, P& loss, RowStats<P>& stats) -> Verdict {
          V* mean;
          const Scale<V> scale = load_policy<V, Scale>(tile, dim, call.mean, call.scale, arena, mean);
          const Verdict judged = check_scale(tile, scale, call.scale);
          if (judged.code != kAccepted) return judged;
          V* rewards = arena.take(samples);
          V* work = arena.take(work_size);
          P* given = arena.template take<P>(samples * dim);
          for (int64_t g = 0; g < samples; ++g) {
            load(tile, slice<T>(call.rewards, g, call.rows, 1), 1, rewards + g);
            load(tile, slice<T>(Input{call.samples, nullptr}, g, call.rows, dim), dim, given + g * dim);
          }
          const GaussianGradients<V> out{load_weight<V>(call, tile),
                                         arena.template take_for<P>(call.mean.gradient, dim),
                                         arena.template take_for<P>(call.scale.gradient, scale.size()),
                                         nullptr,
                                         nullptr,
                                         arena.template take_for<P>(call.rewards.gradient, samples)};
          Group<V> group{};
          loss = output(gaussian_given(scale, mean, rewards, given, s, out, work, group));
          if constexpr (!is_dual<V>) {
            if (call.stats) stats = gaussian_given_stats(scale, mean, given, s, group, work + 4 * samples);
          }
          store(tile, out.mean, dim, call.mean.gradient, arena);
          store(tile, out.scale, scale.size(), call.scale.gradient, arena);
          for (int64_t g = 0; out.rewards && g < samples; ++g) {
            store(tile, out.rewards[g], slice<T>(call.rewards.gradient, g, call.rows, 1));
          }
          return {};
        });
    return totals.verdict;
  });
}

template <template <class> class Scale>
Verdict gaussian_kernel(const GaussianLogProb& call) {
  return with_lanes(call, [](auto lane, const GaussianLogProb& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t dim = call.dim;
    const int64_t runs_size = run_work(call.count, dim + Scale<V>::size(dim));
    const size_t bytes = policy_bytes<V, Scale>(dim) + sizeof(V) * size_t(3 * dim) + sizeof(P) * size_t(runs_size);
    const int64_t operations = (call.count + 1) * gaussian_operations<Scale<V>>(dim);
    return for_each_tile<V>(call, operations, bytes, [&](Tile tile, Arena<V> arena) -> Verdict {
      V* mean;
      const Scale<V> scale = load_policy<V, Scale>(tile, dim, call.mean, call.scale, arena, mean);
      const Verdict judged = check_scale(tile, scale, call.scale);
      if (judged.code != kAccepted) return judged;
      V* value = arena.take(dim);
      V* work = arena.take(2 * dim);
      P* grad_mean = arena.template take_for<P>(call.mean.gradient, dim);
      P* grad_scale = arena.template take_for<P>(call.scale.gradient, scale.size());
      P* grad_value = arena.template take_for<P>(call.value.gradient, dim);
      P* runs = arena.template take<P>(runs_size);
      clear(dim, grad_mean);
      clear(scale.size(), grad_scale);
      const Summed<P> sums[] = {summed(grad_mean, dim), summed(grad_scale, scale.size())};
      in_sample_runs(call.count, sums, runs, [&](int64_t first, int64_t last, P* const(&to)[2]) {
        for (int64_t i = first; i < last; ++i) {
          V weight{};
          load(tile, slice<T>(call.value, i, call.rows, dim), dim, value);
          if (call.cotangent.value) load(tile, slice<T>(call.cotangent, i, call.rows, 1), 1, &weight);
          const P result = output(gaussian_log_prob(scale, mean, value, weight, to[0], to[1], grad_value, work));
          store(tile, result, slice<T>(call.out, i, call.rows, 1));
          if (grad_value) store(tile, grad_value, dim, slice<T>(call.value.gradient, i, call.rows, dim), arena);
        }
      });
      store(tile, grad_mean, dim, call.mean.gradient, arena);
      store(tile, grad_scale, scale.size(), call.scale.gradient, arena);
      return {};
    });
  });
}

template <template <class> class Scale>
Verdict gaussian_kernel(const GaussianSample& call) {
  return with_lanes(call, [](auto lane, const GaussianSample& call) -> Verdict {
    using V = decltype(lane);
    using T = Element<V>;
    using P = Primal<V>;
    const int64_t dim = call.dim;
    const int64_t runs_size = run_work(call.num_samples, dim + Scale<V>::size(dim));
    const size_t bytes =
        policy_bytes<V, Scale>(dim) + sizeof(V) * size_t(2 * dim) + sizeof(P) * size_t((kBlock + 1) * dim + runs_size);
    const int64_t operations = (call.num_samples + 1) * gaussian_operations<Scale<V>>(dim);
    return for_each_tile<V>(call, operations, bytes, [&](Tile tile, Arena<V> arena) -> Verdict {
      V* mean;
      const Scale<V> scale = load_policy<V, Scale>(tile, dim, call.mean, call.scale, arena, mean);
      const Verdict judged = check_scale(tile, scale, call.scale);
      if (judged.code != kAccepted) return judged;
      V* sample = arena.take(dim);
      V* slope = arena.take(dim);
      P* noise = arena.template take<P>(kBlock * dim);
      P* result = arena.template take<P>(dim);
      P* grad_mean = arena.template take_for<P>(call.mean.gradient, dim);
      P* grad_scale = arena.template take_for<P>(call.scale.gradient, scale.size());
      P* runs = arena.template take<P>(runs_size);
      clear(dim, grad_mean);
      clear(scale.size(), grad_scale);
      const Summed<P> sums[] = {summed(grad_mean, dim), summed(grad_scale, scale.size())};
      in_sample_runs(call.num_samples, sums, runs, [&](int64_t first, int64_t last, P* const(&to)[2]) {
        for (int64_t g = first; g < last; ++g) {
          const P* eps = noise + g % kBlock * dim;
          if (g % kBlock == 0) {
            const int64_t left = call.num_samples - g;
            load_noise(call, tile, g, std::min<int64_t>(kBlock, left), dim, noise);
          }
          if (call.out) {
            scale.template stretch<1>(mean, eps, sample);
            for (int64_t j = 0; j < dim; ++j) result[j] = output(sample[j]);
            store(tile, result, dim, slice<T>(call.out, g, call.rows, dim), arena);
          }
          if (to[0] || to[1]) load(tile, slice<T>(call.cotangent, g, call.rows, dim), dim, slope);
          for (int64_t j = 0; to[0] && j < dim; ++j) to[0][j] = to[0][j] + output(slope[j]);
          if (to[1]) scale.template add_path<1>(slope, eps, to[1]);
        }
      });
      store(tile, grad_mean, dim, call.mean.gradient, arena);
      store(tile, grad_scale, scale.size(), call.scale.gradient, arena);
      return {};
    });
  });
}

}  // namespace PK_LEVEL
}  // namespace po_kernels
