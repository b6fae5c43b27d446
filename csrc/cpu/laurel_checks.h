// Checks of the LAuReL residual's operands, and tensors as the kernels see them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/rows.h"

namespace effkern {
namespace laurel {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct Shape {
  int64_t rows, dim;
};

// A dimension of one element has a stride that nobody uses.
inline bool packed(const Tensor& x, int64_t dim) { return x.size(dim) <= 1 || x.stride(dim) == 1; }

template <typename T>
Rows<T> matrix(const Tensor& x, int64_t rows, int64_t columns, const char* rule) {
  STD_TORCH_CHECK(x.scalar_type() == type_of<std::remove_const_t<T>>() && x.dim() == 2 && x.size(0) == rows &&
                      x.size(1) == columns && packed(x, 1),
                  "laurel: ", rule);
  // The stride of a single row is free, and products want one that is possible.
  return {static_cast<T*>(x.data_ptr()), rows > 1 ? x.stride(0) : columns};
}

template <typename T>
Rows<T> wide(const Optional& x, const Shape& shape) {
  constexpr const char* rule = "operands must be [N, D] like x, of its dtype, with stride 1 along D";
  return x ? matrix<T>(*x, shape.rows, shape.dim, rule) : Rows<T>();
}

template <typename T>
std::vector<Rows<T>> wide(const std::vector<Tensor>& given, const Shape& shape) {
  std::vector<Rows<T>> result;
  for (const Tensor& x : given) result.push_back(wide<T>(x, shape));
  return result;
}

inline float* vector(const Optional& x, int64_t size) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 1 && x->size(0) == size && packed(*x, 0),
                  "laurel: rstd, norm_weight and its gradient must be packed float32 [N] and [D]");
  return static_cast<float*>(x->data_ptr());
}

inline float* packed_matrix(const Optional& x, int64_t rows, int64_t columns) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(0) == rows &&
                      x->size(1) == columns && x->is_contiguous(),
                  "laurel: the gram matrix and the gradients of matrices must be contiguous float32 of their shapes");
  return static_cast<float*>(x->data_ptr());
}

inline Factor factor(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 1 && (x.size(0) == 1 || x.size(0) == dim) &&
                      packed(x, 0),
                  "laurel: alpha and beta must be packed float32 [1] or [D]");
  return {static_cast<const float*>(x.data_ptr()), x.size(0) > 1};
}

inline std::vector<Factor> factors(const Optional& x, size_t count, int64_t dim) {
  std::vector<Factor> result;
  if (count == 0) return result;
  STD_TORCH_CHECK(x && x->scalar_type() == ScalarType::Float && x->dim() == 2 &&
                      x->size(0) == static_cast<int64_t>(count) && (x->size(1) == 1 || x->size(1) == dim) &&
                      packed(*x, 1),
                  "laurel: coefficients must be float32 [addends, 1] or [addends, D] with stride 1 along D");
  const float* values = static_cast<const float*>(x->data_ptr());
  for (size_t j = 0; j < count; ++j) result.push_back({values + j * x->stride(0), x->size(1) > 1});
  return result;
}

}  // namespace laurel
}  // namespace effkern
