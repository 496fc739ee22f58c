// The triangular scale S = L, lower triangular with a positive diagonal; what stands above it is not read.
#pragma once

#include "po_kernels/gaussian_family.hpp"

namespace po_kernels {
inline namespace PK_LEVEL {

template <class V>
struct TriangularScale {
  using T = Element<V>;
  using P = Primal<V>;
  static constexpr bool triangular = true;

  Index dim;
  const V* tril;              // (dim, dim)
  P* lift = nullptr;          // of L_jj that is subnormal, and whose inverse would be inf: a power of two
  P* inverse_diag = nullptr;  // 1 / (L_jj lift_j)
  V* work_ = nullptr;         // 2 kBlock dim

  PK_FN TriangularScale(Index dim, const V* parameter) : dim(dim), tril(parameter) {}

  PK_FN static Index size(Index dim) { return dim * dim; }
  PK_FN static Index work(Index dim) { return (2 + 2 * kBlock) * dim; }
  PK_FN static Index team_work(Index dim) { return 2 * dim; }
  PK_FN Index size() const { return dim * dim; }

  PK_FN const V* row(Index i) const { return tril + i * dim; }

  template <class Team = Alone>
  PK_FN void prepare(V* scratch, bool, Team team = {}) {
    lift = reinterpret_cast<P*>(scratch);
    inverse_diag = lift + dim;
    work_ = scratch + 2 * dim;
    const T small = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
    const T power = T(18446744073709551616.0);  // 2^64
    team.each(dim, [&](Index j) PK_LAMBDA {
      const P diagonal = stop(row(j)[j]);
      lift[j] = select(diagonal < small, broadcast<P>(power), broadcast<P>(T(1)));
      inverse_diag[j] = broadcast<P>(T(1)) / (diagonal * lift[j]);
    });
  }

  // Divides by L_jj.
  struct Divisor {
    V diagonal;
    P lift, inverse;

    PK_FN P of_value(P x) const { return x * lift * inverse; }
    PK_FN V of(V x) const {
      if constexpr (is_dual<V>) {
        const P value = of_value(x.v);
        return {value, of_value(x.t - value * diagonal.t)};
      } else {
        return of_value(x);
      }
    }
  };
  PK_FN Divisor divisor(Index j) const { return {row(j)[j], lift[j], inverse_diag[j]}; }

  template <class Team = Alone>
  PK_FN V log_determinant(Team team = {}) const {
    return team.template sum<V>(dim, [&](Index j) PK_LAMBDA { return log(row(j)[j]); });
  }

  template <int S, class R>
  PK_FN void stretch(const R* base, const P* eps, R* y) const {
    rows_in_runs(dim, [&](auto runs) PK_LAMBDA {
      for (Index i = 0; i < dim; ++i) {
        R sum[1][S];
        unrolled<S>([&](auto s) PK_LAMBDA { sum[0][s] = base[i]; });
        row_sums<runs>(0, i + 1, sum, [&](Index first, Index end, R(&run)[1][S]) PK_LAMBDA {
          for (Index j = first; j < end; ++j) {
            const R l = as<R>(row(i)[j]);
            unrolled<S>([&](auto s) PK_LAMBDA { run[0][s] = run[0][s] + l * eps[s * dim + j]; });
          }
        });
        unrolled<S>([&](auto s) PK_LAMBDA { y[s * dim + i] = sum[0][s]; });
      }
    });
  }

  // L z = residual.
  template <int S>
  PK_FN void whiten(const V* residual, V* z) const {
    rows_in_runs(dim, [&](auto runs) PK_LAMBDA {
      for (Index i = 0; i < dim; ++i) {
        V sum[1][S];
        unrolled<S>([&](auto s) PK_LAMBDA { sum[0][s] = residual[s * dim + i]; });
        row_sums<runs>(0, i, sum, [&](Index first, Index end, V(&run)[1][S]) PK_LAMBDA {
          for (Index j = first; j < end; ++j) {
            const V l = row(i)[j];
            unrolled<S>([&](auto s) PK_LAMBDA { run[0][s] = run[0][s] - l * z[s * dim + j]; });
          }
        });
        const Divisor divisor = this->divisor(i);
        unrolled<S>([&](auto s) PK_LAMBDA { z[s * dim + i] = divisor.of(sum[0][s]); });
      }
    });
  }

  // Lᵀ a = z.
  template <int S>
  PK_FN void whiten_transposed(const V* z, V* a) const {
    rows_in_runs(dim, [&](auto runs) PK_LAMBDA {
      for (Index i = dim - 1; i >= 0; --i) {
        V sum[1][S];
        unrolled<S>([&](auto s) PK_LAMBDA { sum[0][s] = z[s * dim + i]; });
        row_sums<runs>(i + 1, dim, sum, [&](Index first, Index end, V(&run)[1][S]) PK_LAMBDA {
          for (Index k = first; k < end; ++k) {
            const V l = row(k)[i];
            unrolled<S>([&](auto s) PK_LAMBDA { run[0][s] = run[0][s] - l * a[s * dim + k]; });
          }
        });
        const Divisor divisor = this->divisor(i);
        unrolled<S>([&](auto s) PK_LAMBDA { a[s * dim + i] = divisor.of(sum[0][s]); });
      }
    });
  }

  // The constant sample obeys L z = ŷ - μ, so that L ż = -(μ̇ + L̇ eps).
  template <int S>
  PK_FN void whiten_noise(const V* mean, const P* eps, V* z) const {
    if constexpr (is_dual<V>) {
      rows_in_runs(dim, [&](auto runs) PK_LAMBDA {
        for (Index i = 0; i < dim; ++i) {
          P sum[1][S];
          unrolled<S>([&](auto s) PK_LAMBDA {
            constexpr int at = s;
            sum[0][at] = -mean[i].t - row(i)[i].t * eps[at * dim + i];
          });
          row_sums<runs>(0, i, sum, [&](Index first, Index end, P(&run)[1][S]) PK_LAMBDA {
            for (Index j = first; j < end; ++j) {
              const V l = row(i)[j];
              unrolled<S>([&](auto s) PK_LAMBDA {
                constexpr int at = s;
                run[0][at] = run[0][at] - l.t * eps[at * dim + j] - l.v * z[at * dim + j].t;
              });
            }
          });
          const Divisor divisor = this->divisor(i);
          unrolled<S>([&](auto s) PK_LAMBDA {
            constexpr int at = s;
            z[at * dim + i] = V{eps[at * dim + i], divisor.of_value(sum[0][at])};
          });
        }
      });
    }
  }

  // ∂log p/∂μ = a, ∂log p/∂L_ij = a_i z_j - [i = j] / L_jj, with Lᵀ a = z.
  template <int S>
  PK_FN void add_score(const V (&f)[S], const V* z, P* mean, P* scale) const {
    V* a = work_;
    whiten_transposed<S>(z, a);
    V all{};
    unrolled<S>([&](auto s) PK_LAMBDA { all = all + f[s]; });
    for (Index i = 0; i < dim; ++i) {
      P sum{};
      unrolled<S>([&](auto s) PK_LAMBDA {
        V& to = a[s * dim + i];
        to = f[s] * to;
        sum = sum + output(to);
      });
      if (mean) mean[i] = mean[i] + sum;
      if (scale) scale[i * dim + i] = scale[i * dim + i] - output(divisor(i).of(all));
    }
    if (scale) add_outer<S>(dim, 0, a, z, [&](Index i) PK_LAMBDA { return scale + i * dim; });
  }

  template <int S>
  PK_FN void add_path(const V* slope, const P* eps, P* scale) const {
    V* constants = work_;
    for (Index j = 0; j < S * dim; ++j) constants[j] = constant<V>(eps[j]);
    add_outer<S>(dim, 0, slope, static_cast<const V*>(constants), [&](Index i) PK_LAMBDA { return scale + i * dim; });
  }

  template <class Team = Alone>
  PK_FN void add_entropy(V f, P* scale, Team team = {}) const {
    team.each(dim, [&](Index j) PK_LAMBDA { scale[j * dim + j] = scale[j * dim + j] + output(divisor(j).of(f)); });
  }

  // Column by column of L: tr(U L Lᵀ) = Σ_j l_jᵀ U l_j.
  PK_FN V trace(Precision<V> precision, V weight, P* scale, P* precision_out) const {
    V* column = work_;
    V* other = work_ + dim;
    return long_sum<V>(dim, [&](Index j) PK_LAMBDA {
      const V term = trace_at(j, precision, weight, scale, column, other);
      if (precision_out) {
        for (Index i = j; i < dim; ++i) other[i] = weight * column[i];
        accumulate_outer<1>(precision.kind, dim, other, column, precision_out, j);
      }
      return term;
    });
  }

  // The term of column j, without the gradient in U; from row j on, leaves the column and U times it.
  PK_FN V trace_at(Index j, Precision<V> precision, V weight, P* scale, V* column, V* weighted) const {
    for (Index i = j; i < dim; ++i) column[i] = row(i)[j];
    apply<1>(precision, dim, column, weighted, j);
    return long_sum<V>(dim - j, [&](Index k) PK_LAMBDA {
      const Index i = j + k;
      if (scale) scale[i * dim + j] = scale[i * dim + j] + output(weight * weighted[i] * T(2));
      return column[i] * weighted[i];
    });
  }

  // 2 ‖LᵀUL‖² + 4 ‖Lᵀx‖².
  PK_FN V reward_variance(Precision<V> precision, const V* x) const {
    return long_sum<V>(dim, [&](Index j) PK_LAMBDA { return reward_variance_at(j, precision, x, work_, work_ + dim); });
  }

  // The terms of column j.
  PK_FN V reward_variance_at(Index j, Precision<V> precision, const V* x, V* column, V* weighted) const {
    const V along = long_sum<V>(dim, [&](Index i) PK_LAMBDA {
      column[i] = i < j ? V{} : row(i)[j];
      return column[i] * x[i];
    });
    apply<1>(precision, dim, column, weighted);
    return square(along) * T(4) + long_sum<V>(dim, [&](Index k) PK_LAMBDA {
             const V product = long_sum<V>(dim - k, [&](Index i) PK_LAMBDA { return row(k + i)[k] * weighted[k + i]; });
             return square(product) * T(2);
           });
  }
};

}  // namespace PK_LEVEL
}  // namespace po_kernels
