// The passes of the LAuReL residual over rows of N x D.
//
//   forward:  y = alpha f + beta (x + low) + sum_j c_j e_j,  z = y rstd w,  rstd = (mean(y^2) + eps)^-1/2
//   backward: g = g_y + rstd (h - yh mean(h yh)),  h = g_z w,  yh = y rstd,  and what follows from g per element
//
// See rows.h for how a row is walked.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/rows.h"

namespace effkern {
namespace laurel {

template <typename T>
struct ForwardRows {
  Rows<const T> branch, x, low_rank;
  std::vector<Rows<const T>> addends;
  Factor alpha, beta;
  std::vector<Factor> coefficients;
  const float* norm_weight;
  float norm_eps;
  Rows<T> y, normed;
  float* rstd;
  int64_t dim;
};

template <typename T>
struct BackwardRows {
  Rows<const T> grad_y, grad_normed, y;
  const float *rstd, *norm_weight;
  Factor alpha, beta;
  std::vector<Factor> coefficients;
  // g, also in the type of x where that is another, alpha g, beta g; those without data are not written.
  Rows<float> g;
  Rows<T> rounded, grad_branch, grad_x;
  std::vector<Rows<T>> grad_addends;
  // What g is multiplied with in each row of the sums.
  std::vector<Rows<const T>> others;
  bool sum_per_channel;
  int64_t dim;
};

template <typename T>
EFFKERN_INLINE void forward_row(const ForwardRows<T>& a, int64_t r) {
  const T *f = a.branch[r], *x = a.x[r], *low = a.low_rank[r];
  T* y = a.y[r];
  float squares[kLanes] = {};
  for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    alignas(64) float sum[kBlock];
    with_factor(a.alpha, [&](auto alpha) EFFKERN_LAMBDA {
      with_factor(a.beta, [&](auto beta) EFFKERN_LAMBDA {
        if (low) {
          for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA {
            sum[v - begin] = alpha(v) * widen(f[v]) + beta(v) * (widen(x[v]) + widen(low[v]));
          });
        } else {
          for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA {
            sum[v - begin] = alpha(v) * widen(f[v]) + beta(v) * widen(x[v]);
          });
        }
      });
    });
    for (size_t j = 0; j < a.addends.size(); ++j) {
      const T* e = a.addends[j][r];
      with_factor(a.coefficients[j], [&](auto c) EFFKERN_LAMBDA {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { sum[v - begin] += c(v) * widen(e[v]); });
      });
    }
    // Of y as it was rounded, which is what backward sees.
    for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      store(y[v], sum[v - begin]);
      const float rounded = widen(y[v]);
      squares[l] += rounded * rounded;
    });
  });
  if (!a.normed) return;
  const float rstd = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(a.dim) + a.norm_eps);
  const float* w = a.norm_weight;
  T* z = a.normed[r];
  a.rstd[r] = rstd;
  for_lanes(0, a.dim, [&](int, int64_t v) EFFKERN_LAMBDA { store(z[v], widen(y[v]) * rstd * w[v]); });
}

// `norm_weight` [D] and `sums` [others] or [others, D] are added to.
template <typename T>
EFFKERN_INLINE void backward_row(const BackwardRows<T>& a, int64_t r, float* norm_weight, double* sums) {
  const T *gy = a.grad_y[r], *gz = a.grad_normed[r], *y = a.y[r];
  const float* w = a.norm_weight;
  float* g = a.g[r];
  float rstd = 0.0f, mean = 0.0f;
  if (gz) {
    rstd = a.rstd[r];
    float products[kLanes] = {};
    for_lanes(0, a.dim, [&](int l, int64_t v) EFFKERN_LAMBDA {
      products[l] += widen(gz[v]) * w[v] * (widen(y[v]) * rstd);
    });
    mean = sum_lanes(products) / static_cast<float>(a.dim);
  }
  for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    const auto norm = [&](int64_t v) EFFKERN_LAMBDA {
      const float yh = widen(y[v]) * rstd, of_z = widen(gz[v]);
      norm_weight[v] += of_z * yh;
      return rstd * (of_z * w[v] - yh * mean);
    };
    if (gz && gy) {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = widen(gy[v]) + norm(v); });
    } else if (gz) {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = norm(v); });
    } else if (gy) {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = widen(gy[v]); });
    } else {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = 0.0f; });
    }
    if (T* out = a.rounded[r]) for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], g[v]); });
    const auto scaled = [&](T* out, const Factor& factor) EFFKERN_LAMBDA {
      with_factor(factor, [&](auto c) EFFKERN_LAMBDA {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], c(v) * g[v]); });
      });
    };
    if (a.grad_branch) scaled(a.grad_branch[r], a.alpha);
    if (a.grad_x) scaled(a.grad_x[r], a.beta);
    for (size_t j = 0; j < a.grad_addends.size(); ++j) scaled(a.grad_addends[j][r], a.coefficients[j]);
    for (size_t j = 0; j < a.others.size(); ++j) {
      const T* other = a.others[j][r];
      if (other == nullptr) continue;
      if (a.sum_per_channel) {
        double* columns = sums + j * a.dim;
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { columns[v] += g[v] * widen(other[v]); });
      } else {
        float products[kLanes] = {};
        for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { products[l] += g[v] * widen(other[v]); });
        sums[j] += sum_lanes(products);
      }
    }
  });
}

// GCC clones functions, not templates.
namespace {

#define EFFKERN_LOOPS(T)                                                                                        \
  EFFKERN_CLONES void forward_rows(const ForwardRows<T>& a, int64_t begin, int64_t end) {                       \
    for (int64_t r = begin; r < end; ++r) forward_row(a, r);                                                    \
  }                                                                                                             \
  EFFKERN_CLONES void backward_rows(const BackwardRows<T>& a, int64_t begin, int64_t end, float* norm_weight,   \
                                    double* sums) {                                                             \
    for (int64_t r = begin; r < end; ++r) backward_row(a, r, norm_weight, sums);                                \
  }
EFFKERN_LOOPS(float)
EFFKERN_LOOPS(BFloat16)
#undef EFFKERN_LOOPS

}  // namespace
}  // namespace laurel
}  // namespace effkern
