// effkern::mean_pool and effkern::norm_mean_pool for CPU tensors: means of ragged groups of rows.
//
// A group is one task. Ids that count are listed first; then columns are taken in blocks whose sums stay in registers
// while the rows go by, the rows ahead prefetched. Sums of a strip of rows are added to those of the group, so that the
// rounding error grows with the number of strips only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/rows.h"

namespace effkern {
namespace mean_pool {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kStripRows = 64;
constexpr int64_t kAhead = 8;

// sums[0, W) += the columns of rows[0, count).
template <typename T, int W>
EFFKERN_INLINE void add_strip(const T* table, int64_t stride, const int64_t* rows, int64_t count, int64_t left,
                              float* sums) {
  float strip[W] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < left) {
      const char* ahead = reinterpret_cast<const char*>(table + rows[i + kAhead] * stride);
      for (size_t byte = 0; byte < W * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
    }
    const T* row = table + rows[i] * stride;
    for (int l = 0; l < W; ++l) strip[l] += widen(row[l]);
  }
  for (int l = 0; l < W; ++l) sums[l] += strip[l];
}

template <typename T>
EFFKERN_INLINE void add_narrow(const T* table, int64_t stride, const int64_t* rows, int64_t count, int width,
                               float* sums) {
  float strip[kLanes] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int l = 0; l < width; ++l) strip[l] += widen(table[rows[i] * stride + l]);
  for (int l = 0; l < width; ++l) sums[l] += strip[l];
}

template <typename T>
EFFKERN_INLINE void sum_table_rows(const T* table, int64_t stride, int64_t dim, const int64_t* rows, int64_t count,
                                   float* sums) {
  constexpr int kWide = (sizeof(T) == 2 ? 8 : 4) * kLanes;
  int64_t column = 0;
  for (; column + kWide <= dim; column += kWide)
    for (int64_t i = 0; i < count; i += kStripRows)
      add_strip<T, kWide>(table + column, stride, rows + i, std::min(kStripRows, count - i), count - i, sums + column);
  for (; column + kLanes <= dim; column += kLanes)
    for (int64_t i = 0; i < count; i += kStripRows)
      add_strip<T, kLanes>(table + column, stride, rows + i, std::min(kStripRows, count - i), count - i, sums + column);
  if (column < dim)
    for (int64_t i = 0; i < count; i += kStripRows)
      add_narrow(table + column, stride, rows + i, std::min(kStripRows, count - i), static_cast<int>(dim - column),
                 sums + column);
}

// strip += x / sqrt(mean(x^2) + eps), or x.
template <typename T>
EFFKERN_INLINE void add_hidden_row(const T* x, int64_t dim, bool norm, float eps, float* strip) {
  float factor = 1.0f;
  if (norm) {
    float squares[kLanes] = {};
    for_lanes(0, dim, [&](int l, int64_t v) EFFKERN_LAMBDA { squares[l] += widen(x[v]) * widen(x[v]); });
    factor = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(dim) + eps);
  }
  for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { strip[v] += factor * widen(x[v]); });
}

template <typename T>
EFFKERN_INLINE void sum_hidden_rows(const T* hidden, int64_t stride, int64_t dim, const bool* keep, int64_t begin,
                                    int64_t end, bool norm, float eps, float* strip, float* sums) {
  for (int64_t first = begin; first < end; first += kStripRows) {
    std::fill_n(strip, dim, 0.0f);
    for (int64_t t = first; t < std::min(first + kStripRows, end); ++t)
      if (keep == nullptr || keep[t]) add_hidden_row(hidden + t * stride, dim, norm, eps, strip);
    for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { sums[v] += strip[v]; });
  }
}

// The mean from the sums, in place; then, if asked for, of length 1.
template <typename W>
EFFKERN_INLINE void finish_row(float* y, int64_t dim, int64_t count, const W* weight, bool normalize) {
  const float divisor = static_cast<float>(std::max<int64_t>(count, 1));
  if (weight == nullptr) {
    for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { y[v] /= divisor; });
  } else {
    for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { y[v] = y[v] / divisor * widen(weight[v]); });
  }
  if (!normalize) return;
  // Squares of what is very large or small would leave the range. NaN passes through: it is not 0.
  float largest = 0.0f;
  for (int64_t v = 0; v < dim; ++v) largest = std::abs(y[v]) > largest || y[v] != y[v] ? std::abs(y[v]) : largest;
  if (largest == 0.0f) return;
  float squares[kLanes] = {};
  for_lanes(0, dim, [&](int l, int64_t v) EFFKERN_LAMBDA {
    y[v] /= largest;
    squares[l] += y[v] * y[v];
  });
  const float length = std::sqrt(sum_lanes(squares));
  for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { y[v] /= length; });
}

// GCC clones functions, not templates.
#define EFFKERN_SUMS(T)                                                                                              \
  EFFKERN_CLONES void table_sums(const T* table, int64_t stride, int64_t dim, const int64_t* rows, int64_t count,    \
                                 float* sums) {                                                                      \
    sum_table_rows(table, stride, dim, rows, count, sums);                                                           \
  }                                                                                                                  \
  EFFKERN_CLONES void hidden_sums(const T* hidden, int64_t stride, int64_t dim, const bool* keep, int64_t begin,     \
                                  int64_t end, bool norm, float eps, float* strip, float* sums) {                    \
    sum_hidden_rows(hidden, stride, dim, keep, begin, end, norm, eps, strip, sums);                                  \
  }                                                                                                                  \
  EFFKERN_CLONES void finish(float* y, int64_t dim, int64_t count, const T* weight, bool normalize) {                \
    finish_row(y, dim, count, weight, normalize);                                                                    \
  }
EFFKERN_SUMS(float)
EFFKERN_SUMS(BFloat16)
EFFKERN_SUMS(Float16)
#undef EFFKERN_SUMS

void check_offsets(const char* op, const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.numel() >= 1 && offsets.is_contiguous() &&
                      offsets.scalar_type() == ScalarType::Long,
                  op, ": offsets must be a contiguous int64 vector");
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t last = offsets.numel() - 1;
  bool sound = at[0] == 0 && at[last] == rows;
  for (int64_t n = 0; n < last; ++n) sound &= at[n] <= at[n + 1];
  STD_TORCH_CHECK(sound, op, ": offsets must go from 0 to ", rows, " and never fall");
}

void check_matrix(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) == 1 || x.stride(1) == 1), op, ": rows must have stride 1");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
                  ": rows must be float32, bfloat16 or float16");
}

// About 10 microseconds of work and more a task.
int64_t grain_of(int64_t groups, int64_t rows, int64_t dim) {
  const int64_t elements = groups > 0 ? rows * dim / groups : 0;
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(elements, 1));
}

template <typename T, typename I>
void run_table(const Tensor& table, const Tensor& ids, const int64_t* offsets, int64_t groups, int64_t pad, int64_t eod,
               bool normalize, float* out) {
  const int64_t num_rows = table.size(0), dim = table.size(1), stride = table.stride(0);
  const T* data = static_cast<const T*>(table.const_data_ptr());
  const I* id = static_cast<const I*>(ids.const_data_ptr());
  std::atomic<bool> outside{false};
  const int64_t grain = grain_of(groups, ids.numel(), dim);
  torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
    std::vector<int64_t> rows;
    for (int64_t n = first; n < last; ++n) {
      rows.clear();
      for (int64_t t = offsets[n]; t < offsets[n + 1]; ++t) {
        const int64_t row = id[t];
        if (row == pad || row == eod) continue;
        if (row < 0 || row >= num_rows) {
          outside = true;
          continue;
        }
        rows.push_back(row);
      }
      float* y = out + n * dim;
      std::fill_n(y, dim, 0.0f);
      const int64_t count = static_cast<int64_t>(rows.size());
      table_sums(data, stride, dim, rows.data(), count, y);
      finish(y, dim, count, static_cast<const float*>(nullptr), normalize);
    }
  });
  STD_TORCH_CHECK(!outside, "mean_pool: ids must lie in [0, ", num_rows, ")");
}

template <typename T>
void run_table_of(const Tensor& table, const Tensor& ids, const int64_t* offsets, int64_t groups, int64_t pad,
                  int64_t eod, bool normalize, float* out) {
  if (ids.scalar_type() == ScalarType::Long) {
    run_table<T, int64_t>(table, ids, offsets, groups, pad, eod, normalize, out);
  } else {
    run_table<T, int32_t>(table, ids, offsets, groups, pad, eod, normalize, out);
  }
}

Tensor pool_table(const Tensor& table, const Tensor& ids, const Tensor& offsets, int64_t pad, int64_t eod,
                  bool normalize) {
  check_matrix("mean_pool", table);
  STD_TORCH_CHECK(ids.dim() == 1 && ids.is_contiguous() &&
                      (ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int),
                  "mean_pool: ids must be a contiguous int64 or int32 vector");
  check_offsets("mean_pool", offsets, ids.numel());
  const int64_t groups = offsets.numel() - 1;
  const Tensor out = torch::stable::new_empty(table, {groups, table.size(1)}, ScalarType::Float);
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  if (table.scalar_type() == ScalarType::Float) {
    run_table_of<float>(table, ids, at, groups, pad, eod, normalize, to);
  } else if (table.scalar_type() == ScalarType::BFloat16) {
    run_table_of<BFloat16>(table, ids, at, groups, pad, eod, normalize, to);
  } else {
    run_table_of<Float16>(table, ids, at, groups, pad, eod, normalize, to);
  }
  return out;
}

template <typename T>
void run_hidden(const Tensor& hidden, const int64_t* offsets, int64_t groups, const bool* keep, const Tensor* weight,
                float eps, bool normalize, float* out) {
  const int64_t dim = hidden.size(1), stride = hidden.stride(0);
  const T* data = static_cast<const T*>(hidden.const_data_ptr());
  const bool wide = weight != nullptr && weight->scalar_type() == ScalarType::Float;
  const void* factors = weight == nullptr ? nullptr : weight->const_data_ptr();
  const int64_t grain = grain_of(groups, hidden.size(0), dim);
  torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
    std::vector<float> strip(dim);
    for (int64_t n = first; n < last; ++n) {
      const int64_t begin = offsets[n], end = offsets[n + 1];
      const int64_t count = keep == nullptr ? end - begin : std::count(keep + begin, keep + end, true);
      float* y = out + n * dim;
      std::fill_n(y, dim, 0.0f);
      hidden_sums(data, stride, dim, keep, begin, end, weight != nullptr, eps, strip.data(), y);
      if (wide) {
        finish(y, dim, count, static_cast<const float*>(factors), normalize);
      } else {
        finish(y, dim, count, static_cast<const T*>(factors), normalize);
      }
    }
  });
}

Tensor pool_hidden(const Tensor& hidden, const Tensor& offsets, const std::optional<Tensor>& keep,
                   const std::optional<Tensor>& weight, double eps, bool normalize) {
  check_matrix("norm_mean_pool", hidden);
  check_offsets("norm_mean_pool", offsets, hidden.size(0));
  STD_TORCH_CHECK(!keep || (keep->numel() == hidden.size(0) && keep->is_contiguous() &&
                            keep->scalar_type() == ScalarType::Bool),
                  "norm_mean_pool: keep must be contiguous booleans, one a row");
  STD_TORCH_CHECK(!weight || (weight->numel() == hidden.size(1) && weight->is_contiguous() &&
                              (weight->scalar_type() == ScalarType::Float ||
                               weight->scalar_type() == hidden.scalar_type())),
                  "norm_mean_pool: weight must be contiguous, one value a column, float32 or of the rows' type");
  const int64_t groups = offsets.numel() - 1;
  const Tensor out = torch::stable::new_empty(hidden, {groups, hidden.size(1)}, ScalarType::Float);
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const bool* kept = keep ? static_cast<const bool*>(keep->const_data_ptr()) : nullptr;
  const Tensor* factors = weight ? &*weight : nullptr;
  float* to = static_cast<float*>(out.data_ptr());
  const float small = static_cast<float>(eps);
  if (hidden.scalar_type() == ScalarType::Float) {
    run_hidden<float>(hidden, at, groups, kept, factors, small, normalize, to);
  } else if (hidden.scalar_type() == ScalarType::BFloat16) {
    run_hidden<BFloat16>(hidden, at, groups, kept, factors, small, normalize, to);
  } else {
    run_hidden<Float16>(hidden, at, groups, kept, factors, small, normalize, to);
  }
  return out;
}

}  // namespace
}  // namespace mean_pool
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("mean_pool", TORCH_BOX(&effkern::mean_pool::pool_table));
  m.impl("norm_mean_pool", TORCH_BOX(&effkern::mean_pool::pool_hidden));
}
