// effkern::laurel_forward_rows_, laurel_backward_rows_ and laurel_grad_x_ on CPU: the stable-ABI side of laurel_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "cpu/clones.h"
#include "cpu/laurel_rows.h"

namespace effkern {
namespace laurel {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Elements below which handing a task to another thread costs more than it saves, about 10 microseconds.
constexpr int64_t kGrain = 1 << 15;

template <typename T>
constexpr ScalarType type_of() {
  return sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::BFloat16;
}

// A dimension of one element has a stride that nobody uses.
bool packed(const Tensor& x, int64_t dim) { return x.size(dim) <= 1 || x.stride(dim) == 1; }

struct Shape {
  int64_t rows, dim;
};

template <typename T>
Rows<T> matrix(const Tensor& x, const Shape& shape) {
  STD_TORCH_CHECK(x.scalar_type() == type_of<T>() && x.dim() == 2 && x.size(0) == shape.rows &&
                      x.size(1) == shape.dim && packed(x, 1),
                  "laurel: operands must be [rows, D] like x, of its dtype (g: float32), with stride 1 along D");
  return {static_cast<T*>(x.data_ptr()), x.stride(0)};
}

template <typename T>
Rows<T> matrix(const Optional& x, const Shape& shape) {
  return x ? matrix<T>(*x, shape) : Rows<T>();
}

template <typename T>
std::vector<Rows<T>> matrices(const std::vector<Tensor>& given, const Shape& shape) {
  std::vector<Rows<T>> result;
  for (const Tensor& x : given) result.push_back(matrix<T>(x, shape));
  return result;
}

float* vector(const Optional& x, int64_t size) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 1 && x->size(0) == size && packed(*x, 0),
                  "laurel: rstd, norm weight and its gradient must be packed float32 [rows] and [D]");
  return static_cast<float*>(x->data_ptr());
}

Factor factor(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 1 && (x.size(0) == 1 || x.size(0) == dim) &&
                      packed(x, 0),
                  "laurel: alpha and beta must be packed float32 [1] or [D]");
  return {static_cast<const float*>(x.data_ptr()), x.size(0) > 1};
}

std::vector<Factor> factors(const Optional& x, size_t count, int64_t dim) {
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

// GCC clones functions, not templates.
#define EFFKERN_LOOPS(T)                                                                                    \
  EFFKERN_CLONES void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {                       \
    for (int64_t r = begin; r < end; ++r) forward_row(a, r);                                                \
  }                                                                                                         \
  EFFKERN_CLONES void backward_rows(const Backward<T>& a, int64_t begin, int64_t end, float* norm_weight,   \
                                    double* sums) {                                                         \
    for (int64_t r = begin; r < end; ++r) backward_row(a, r, norm_weight, sums);                            \
  }                                                                                                         \
  EFFKERN_CLONES void grad_x_rows(const GradX<T>& a, int64_t begin, int64_t end) {                          \
    for (int64_t r = begin; r < end; ++r) grad_x_row(a, r);                                                 \
  }
EFFKERN_LOOPS(float)
EFFKERN_LOOPS(BFloat16)
#undef EFFKERN_LOOPS

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)); }

// Runs every strip into partial sums of its own, and adds these up in order.
template <typename T>
void run(const Backward<T>& a, float* norm_weight, double* sums, int64_t sums_stride) {
  const int64_t strips = (a.rows + kStrip - 1) / kStrip;
  const int64_t weights = a.sum_norm_weight ? a.dim : 0, columns = a.sum_per_channel ? a.dim : 1;
  const int64_t others = static_cast<int64_t>(a.others.size()), count = others * columns;
  std::vector<float> part_weight(strips * weights);
  std::vector<double> part_sums(strips * count);
  torch::stable::parallel_for(0, strips, grain(kStrip * a.dim), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      backward_rows(a, s * kStrip, std::min((s + 1) * kStrip, a.rows), part_weight.data() + s * weights,
                    part_sums.data() + s * count);
  });
  for (int64_t s = 0; s < strips; ++s) {
    for (int64_t v = 0; v < weights; ++v) norm_weight[v] += part_weight[s * weights + v];
    for (int64_t j = 0; j < others; ++j)
      for (int64_t v = 0; v < columns; ++v) sums[j * sums_stride + v] += part_sums[s * count + j * columns + v];
  }
}

template <typename T>
void forward_as(const Tensor& branch, const Tensor& x, const Optional& low_rank, const std::vector<Tensor>& addends,
                const Tensor& alpha, const Tensor& beta, const Optional& coefficients, const Optional& norm_weight,
                double norm_eps, const Tensor& y, const Optional& normed, const Optional& rstd) {
  const Shape shape{x.size(0), x.size(1)};
  STD_TORCH_CHECK(normed.has_value() == norm_weight.has_value() && normed.has_value() == rstd.has_value(),
                  "laurel_forward_rows_: norm_weight, normed and rstd come together");
  const Forward<T> a{matrix<const T>(branch, shape),
                     matrix<const T>(x, shape),
                     matrix<const T>(low_rank, shape),
                     matrices<const T>(addends, shape),
                     factor(alpha, shape.dim),
                     factor(beta, shape.dim),
                     factors(coefficients, addends.size(), shape.dim),
                     vector(norm_weight, shape.dim),
                     static_cast<float>(norm_eps),
                     matrix<T>(y, shape),
                     matrix<T>(normed, shape),
                     vector(rstd, shape.rows),
                     shape.rows,
                     shape.dim};
  torch::stable::parallel_for(0, shape.rows, grain(shape.dim),
                              [&](int64_t begin, int64_t end) { forward_rows(a, begin, end); });
}

template <typename T>
void backward_as(const Optional& grad_y, const Optional& grad_normed, const Tensor& x, const Optional& y,
                 const Optional& branch, const Optional& rstd, const std::vector<Tensor>& addends, const Tensor& alpha,
                 const Optional& coefficients, const Optional& norm_weight, const Tensor& g, const Optional& rounded,
                 const Optional& grad_branch, const std::vector<Tensor>& grad_addends, const Optional& sums,
                 const Optional& grad_norm_weight) {
  const Shape shape{x.size(0), x.size(1)};
  STD_TORCH_CHECK(!grad_normed || (y && rstd && norm_weight && grad_norm_weight),
                  "laurel_backward_rows_: grad_normed needs y, rstd, norm_weight and grad_norm_weight");
  Backward<T> a{matrix<const T>(grad_y, shape),
                matrix<const T>(grad_normed, shape),
                matrix<const T>(y, shape),
                vector(rstd, shape.rows),
                vector(norm_weight, shape.dim),
                factor(alpha, shape.dim),
                factors(coefficients, grad_addends.size(), shape.dim),
                matrix<float>(g, shape),
                matrix<T>(rounded, shape),
                matrix<T>(grad_branch, shape),
                matrices<T>(grad_addends, shape),
                {},
                false,
                grad_normed.has_value(),
                shape.rows,
                shape.dim};
  if (sums) {
    const int64_t count = 2 + static_cast<int64_t>(addends.size());
    STD_TORCH_CHECK(sums->scalar_type() == ScalarType::Double && sums->dim() == 2 && sums->size(0) == count &&
                        (sums->size(1) == 1 || sums->size(1) == shape.dim) && packed(*sums, 1),
                    "laurel_backward_rows_: sums must be float64 [2 + addends, 1] or [2 + addends, D]");
    a.others = matrices<const T>(addends, shape);
    a.others.insert(a.others.begin(), {branch ? matrix<const T>(branch, shape) : a.y, matrix<const T>(x, shape)});
    a.sum_per_channel = sums->size(1) > 1;
  }
  run(a, vector(grad_norm_weight, shape.dim), sums ? static_cast<double*>(sums->data_ptr()) : nullptr,
      sums ? sums->stride(0) : 0);
}

template <typename T>
void grad_x_as(const Tensor& g, const Optional& low_rank, const Tensor& beta, const Tensor& out) {
  const Shape shape{out.size(0), out.size(1)};
  const GradX<T> a{matrix<const float>(g, shape), matrix<const T>(low_rank, shape), factor(beta, shape.dim),
                   matrix<T>(out, shape), shape.rows, shape.dim};
  torch::stable::parallel_for(0, shape.rows, grain(shape.dim),
                              [&](int64_t begin, int64_t end) { grad_x_rows(a, begin, end); });
}

// True for bfloat16, false for float32.
bool is_bfloat16(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && (type == ScalarType::Float || type == ScalarType::BFloat16),
                  "laurel: x must be [rows, D], float32 or bfloat16");
  return type == ScalarType::BFloat16;
}

void forward(Tensor branch, Tensor x, Optional low_rank, std::vector<Tensor> addends, Tensor alpha, Tensor beta,
             Optional coefficients, Optional norm_weight, double norm_eps, Tensor y, Optional normed, Optional rstd) {
  (is_bfloat16(x) ? forward_as<BFloat16> : forward_as<float>)(branch, x, low_rank, addends, alpha, beta, coefficients,
                                                              norm_weight, norm_eps, y, normed, rstd);
}

void backward(Optional grad_y, Optional grad_normed, Tensor x, Optional y, Optional branch, Optional rstd,
              std::vector<Tensor> addends, Tensor alpha, Optional coefficients, Optional norm_weight, Tensor g,
              Optional rounded, Optional grad_branch, std::vector<Tensor> grad_addends, Optional sums,
              Optional grad_norm_weight) {
  (is_bfloat16(x) ? backward_as<BFloat16> : backward_as<float>)(grad_y, grad_normed, x, y, branch, rstd, addends, alpha,
                                                                coefficients, norm_weight, g, rounded, grad_branch,
                                                                grad_addends, sums, grad_norm_weight);
}

void grad_x(Tensor g, Optional low_rank, Tensor beta, Tensor out) {
  (is_bfloat16(out) ? grad_x_as<BFloat16> : grad_x_as<float>)(g, low_rank, beta, out);
}

}  // namespace
}  // namespace laurel
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("laurel_forward_rows_", TORCH_BOX(&effkern::laurel::forward));
  m.impl("laurel_backward_rows_", TORCH_BOX(&effkern::laurel::backward));
  m.impl("laurel_grad_x_", TORCH_BOX(&effkern::laurel::grad_x));
}
