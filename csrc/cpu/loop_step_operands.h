// What the operators of the loop step take and give: checks, tensors as the kernels see them, fresh memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/loop_step_rows.h"
#include "cpu/skinny_products.h"

namespace effkern {
namespace loop_step {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Results from which on huge pages pay.
constexpr int64_t kHugeBytes = 8 << 20;

// In the order of the operator's results.
enum Wanted { kOfF, kOfH, kOfE, kOfAlpha, kOfBeta, kOfStateScale, kOfInputScale, kOfDown, kOfUp, kOfWeight, kOfEmbedding };

inline void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, "loop_step: ", rule); }

struct Shape {
  int64_t rows, dim;

  explicit Shape(const Tensor& x) : rows(0), dim(0) {
    check(x.dim() >= 1 && x.size(x.dim() - 1) > 0, "streams must be [..., D] with D >= 1");
    dim = x.size(x.dim() - 1);
    rows = x.numel() / dim;
  }
};

template <typename T>
Rows<T> stream(const Optional& x, const Shape& shape) {
  if (!x) return {};
  check(x->scalar_type() == type_of<std::remove_const_t<T>>() && x->dim() >= 1 &&
            x->size(x->dim() - 1) == shape.dim && x->numel() == shape.rows * shape.dim && x->is_contiguous(),
        "streams must be contiguous, of one shape, float32 or bfloat16");
  return {static_cast<T*>(const_cast<void*>(x->const_data_ptr())), shape.dim};
}

inline const float* vector(const Optional& x, int64_t size) {
  if (!x) return nullptr;
  check(x->scalar_type() == ScalarType::Float && x->numel() == size && x->is_contiguous(),
        "rstd, norm_weight and embedding must be packed float32 [N] and [D]");
  return static_cast<const float*>(x->const_data_ptr());
}

// The factors of the step, and where their numbers live.
struct Factors {
  float numbers[4];
  Factor alpha, beta, state_scale, input_scale;

  Factors(const Factors&) = delete;
  Factors(std::initializer_list<const Optional*> tensors, const std::vector<double>& given, int64_t dim) {
    check(given.size() == 4, "numbers must be the four factors");
    Factor* factors[] = {&alpha, &beta, &state_scale, &input_scale};
    int i = 0;
    for (const Optional* x : tensors) {
      numbers[i] = static_cast<float>(given[i]);
      *factors[i] = {&numbers[i], false};
      if (*x) {
        check((*x)->scalar_type() == ScalarType::Float && ((*x)->numel() == 1 || (*x)->numel() == dim) &&
                  (*x)->is_contiguous(),
              "factors must be packed float32 of 1 or D numbers");
        *factors[i] = {static_cast<const float*>((*x)->const_data_ptr()), (*x)->numel() > 1};
      }
      ++i;
    }
    // As the number 0 it is no term.
    if (!beta.per_channel && beta.values == &numbers[1] && numbers[1] == 0.0f) beta = {};
  }
};

template <typename T>
struct LowRank {
  Matrix<const T> down{}, up{};
  int64_t rank = 0;

  LowRank(const Optional& a, const Optional& b, int64_t dim) {
    check(a.has_value() == b.has_value(), "down and up come together");
    if (!a) return;
    rank = a->dim() == 2 ? a->size(1) : 0;
    down = matrix(*a, dim, rank);
    up = matrix(*b, rank, dim);
  }

  // A product takes a transposed matrix as it is.
  static Matrix<const T> matrix(const Tensor& x, int64_t rows, int64_t columns) {
    check(x.scalar_type() == type_of<T>() && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns && columns > 0,
          "down must be [D, R] and up [R, D], of h's dtype");
    return {static_cast<const T*>(x.const_data_ptr()), rows, columns, x.stride(0), x.stride(1)};
  }
};

// The norm's weight, 1 where there is none, and 1 / weight.
struct Weight {
  Buffer<float> ones, inverse;
  const float* values = nullptr;

  Weight(const Optional& given, bool norm, bool divides, int64_t dim) {
    if (!norm) return;
    values = vector(given, dim);
    if (values == nullptr) {
      ones = Buffer<float>(dim);
      std::fill_n(ones.get(), dim, 1.0f);
      values = ones.get();
    }
    if (!divides) return;
    inverse = Buffer<float>(dim);
    for (int64_t v = 0; v < dim; ++v) inverse.get()[v] = 1.0f / values[v];
  }
};

// Fresh memory costs a page fault for each 4 KiB.
inline Tensor result_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (bytes >= kHugeBytes) advise_huge_pages(y.data_ptr(), static_cast<size_t>(bytes));
  return y;
}

inline Tensor empty(const Tensor& x, std::initializer_list<int64_t> size, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(x, {size.begin(), size.size()}, type);
}

}  // namespace loop_step
}  // namespace effkern
