// The passes of the LAuReL residual over rows; the contract is effkern/ops/laurel/rows.py.
//
// A row is walked in blocks: a block of the float result stays in the first cache while the operands are added one at a
// time, so that there is one loop per operand and not one per combination of operands. Lanes and strips are fixed, so
// that the order of additions depends on neither the clone nor the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/widen.h"

namespace effkern {
namespace laurel {

constexpr int kLanes = 32;
constexpr int64_t kBlock = 512;
// Rows that share one partial sum.
constexpr int64_t kStrip = 16;

// Rows of packed channels; without data where an operand is missing.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  explicit operator bool() const { return data != nullptr; }
  T* operator[](int64_t r) const { return data == nullptr ? nullptr : data + r * stride; }
};

// A factor for all channels, or one per channel.
struct Factor {
  const float* values = nullptr;
  bool per_channel = false;
};

template <typename T>
struct Forward {
  Rows<const T> branch, x, low_rank;
  std::vector<Rows<const T>> addends;
  Factor alpha, beta;
  std::vector<Factor> coefficients;
  const float* norm_weight;
  float norm_eps;
  Rows<T> y, normed;
  float* rstd;
  int64_t rows, dim;
};

template <typename T>
struct Backward {
  Rows<const T> grad_y, grad_normed, y;
  const float* rstd;
  const float* norm_weight;
  Factor alpha;
  std::vector<Factor> coefficients;
  Rows<float> g;
  Rows<T> rounded, grad_branch;
  std::vector<Rows<T>> grad_addends;
  // What g is multiplied with in each row of the sums.
  std::vector<Rows<const T>> others;
  bool sum_per_channel, sum_norm_weight;
  int64_t rows, dim;
};

template <typename T>
struct GradX {
  Rows<const float> g;
  Rows<const T> low_rank;
  Factor beta;
  Rows<T> out;
  int64_t rows, dim;
};

EFFKERN_INLINE void store(float& to, float value) { to = value; }
EFFKERN_INLINE void store(BFloat16& to, float value) { to.bits = to_bfloat16(value); }

// Calls f(lane, index) for [begin, end): full groups of lanes first, then the rest.
template <class F>
EFFKERN_INLINE void for_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t v = begin;
  for (; v + kLanes <= end; v += kLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) f(l, v + l);
  }
  for (int l = 0; v + l < end; ++l) f(l, v + l);
}

template <class F>
EFFKERN_INLINE void for_blocks(int64_t dim, const F& f) {
  for (int64_t begin = 0; begin < dim; begin += kBlock) f(begin, std::min(begin + kBlock, dim));
}

EFFKERN_INLINE float sum_lanes(const float* lanes) {
  float total = 0.0f;
  for (int l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

// Calls f(factor of a channel) with a function that the compiler sees through.
template <class F>
EFFKERN_INLINE void with_factor(const Factor& factor, const F& f) {
  const float* values = factor.values;
  if (factor.per_channel) {
    f([values](int64_t v) EFFKERN_LAMBDA { return values[v]; });
  } else {
    const float value = *values;
    f([value](int64_t) EFFKERN_LAMBDA { return value; });
  }
}

template <typename T>
EFFKERN_INLINE void forward_row(const Forward<T>& a, int64_t r) {
  const T *f = a.branch[r], *x = a.x[r], *low = a.low_rank[r];
  T* y = a.y[r];
  float squares[kLanes] = {};
  for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    alignas(64) float sum[kBlock];
    with_factor(a.alpha, [&](auto alpha) EFFKERN_LAMBDA {
      with_factor(a.beta, [&](auto beta) EFFKERN_LAMBDA {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA {
          sum[v - begin] = alpha(v) * widen(f[v]) + beta(v) * widen(x[v]);
        });
      });
    });
    if (low) for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { sum[v - begin] += widen(low[v]); });
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

// `norm_weight` and `sums` are those of the row's strip: [D], and [others] or [others, D].
template <typename T>
EFFKERN_INLINE void backward_row(const Backward<T>& a, int64_t r, float* norm_weight, double* sums) {
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

template <typename T>
EFFKERN_INLINE void grad_x_row(const GradX<T>& a, int64_t r) {
  const float* g = a.g[r];
  const T* low = a.low_rank[r];
  T* out = a.out[r];
  with_factor(a.beta, [&](auto beta) EFFKERN_LAMBDA {
    if (low) {
      for_lanes(0, a.dim, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], beta(v) * g[v] + widen(low[v])); });
    } else {
      for_lanes(0, a.dim, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], beta(v) * g[v]); });
    }
  });
}

}  // namespace laurel
}  // namespace effkern
