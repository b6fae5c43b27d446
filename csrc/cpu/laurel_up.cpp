// effkern::laurel_scale_up_ and laurel_up_grads_: what the LAuReL residual does to B [R, D] before and after its passes.
//
// On one thread: R x D elements take a thread less time than waking another, and each operator of torch wakes it.
#include <torch/csrc/stable/library.h>

#include "cpu/laurel_checks.h"

namespace effkern {
namespace laurel {
namespace {

// to = from * factors of the columns, each of them optional.
template <typename To, typename From>
EFFKERN_INLINE void scale_row_(To* to, const From* from, const float* inner, const Factor& beta, int64_t dim) {
  float row[kBlock];
  for_blocks(dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { row[v - begin] = widen(from[v]); });
    if (inner != nullptr)
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { row[v - begin] *= inner[v]; });
    if (beta.values != nullptr)
      with_factor(beta, [&](auto factor) EFFKERN_LAMBDA {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { row[v - begin] *= factor(v); });
      });
    for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(to[v], row[v - begin]); });
  });
}

// products[v] += up grad; one number for all channels where `per_channel` is false.
template <typename From>
EFFKERN_INLINE void add_products_(double* products, bool per_channel, const From* up, const float* grad, int64_t dim) {
  if (per_channel) {
    for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { products[v] += static_cast<double>(widen(up[v]) * grad[v]); });
    return;
  }
  float lanes[kLanes];
  double total = 0.0;
  for_blocks(dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    std::fill_n(lanes, kLanes, 0.0f);
    for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { lanes[l] += widen(up[v]) * grad[v]; });
    total += static_cast<double>(sum_lanes(lanes));
  });
  *products += total;
}

// Templates get no clones.
#define EFFKERN_SCALE_ROW(To, From)                                                                              \
  EFFKERN_CLONES void scale_row(To* to, const From* from, const float* inner, const Factor& beta, int64_t dim) { \
    scale_row_(to, from, inner, beta, dim);                                                                      \
  }
EFFKERN_SCALE_ROW(float, float)
EFFKERN_SCALE_ROW(float, BFloat16)
EFFKERN_SCALE_ROW(BFloat16, float)
EFFKERN_SCALE_ROW(BFloat16, BFloat16)
#undef EFFKERN_SCALE_ROW

#define EFFKERN_ADD_PRODUCTS(From)                                                                                   \
  EFFKERN_CLONES void add_products(double* products, bool per_channel, const From* up, const float* grad, int64_t dim) { \
    add_products_(products, per_channel, up, grad, dim);                                                             \
  }
EFFKERN_ADD_PRODUCTS(float)
EFFKERN_ADD_PRODUCTS(BFloat16)
#undef EFFKERN_ADD_PRODUCTS

Shape shape_of(const Tensor& up) {
  const ScalarType type = up.scalar_type();
  STD_TORCH_CHECK(up.dim() == 2 && (up.numel() == 0 || packed(up, 1)) && (type == ScalarType::Float || type == ScalarType::BFloat16),
                  "laurel: up must be [R, D] with stride 1 along D, float32 or bfloat16");
  return {up.size(0), up.size(1)};
}

template <typename To, typename From>
void scale_rows(const Tensor& to, const Tensor& from, const float* inner, const Factor& beta, const Shape& m) {
  STD_TORCH_CHECK(to.is_contiguous() && to.dim() == 2 && to.size(0) == m.rows && to.size(1) == m.dim,
                  "laurel: a scaled matrix must be contiguous and of the shape of up");
  for (int64_t r = 0; r < m.rows; ++r)
    scale_row(static_cast<To*>(to.data_ptr()) + r * m.dim,
              static_cast<const From*>(from.data_ptr()) + r * from.stride(0), inner, beta, m.dim);
}

template <typename From>
void scale_to(const Tensor& to, const Tensor& from, const float* inner, const Factor& beta, const Shape& m) {
  STD_TORCH_CHECK(to.scalar_type() == ScalarType::Float || to.scalar_type() == ScalarType::BFloat16,
                  "laurel: a scaled matrix must be float32 or bfloat16");
  (to.scalar_type() == ScalarType::Float ? scale_rows<float, From> : scale_rows<BFloat16, From>)(to, from, inner, beta, m);
}

void scale(const Tensor& to, const Tensor& from, const float* inner, const Factor& beta, const Shape& m) {
  (from.scalar_type() == ScalarType::Float ? scale_to<float> : scale_to<BFloat16>)(to, from, inner, beta, m);
}

void scale_up(Tensor scaled, Tensor up, Optional low_rank_weight, Optional beta) {
  const Shape m = shape_of(up);
  scale(scaled, up, vector(low_rank_weight, m.dim), beta ? factor(*beta, m.dim) : Factor{}, m);
}

void up_grads(Tensor up, Tensor grad_scaled, Tensor beta, Tensor grad_up, Optional of_scaled) {
  const Shape m = shape_of(up);
  const float* grads = packed_matrix(grad_scaled, m.rows, m.dim);
  if (of_scaled) {
    STD_TORCH_CHECK(of_scaled->scalar_type() == ScalarType::Double && of_scaled->dim() == 1 && packed(*of_scaled, 0) &&
                        (of_scaled->size(0) == 1 || of_scaled->size(0) == m.dim),
                    "laurel: of_scaled must be packed float64 [1] or [D]");
    double* products = static_cast<double*>(of_scaled->data_ptr());
    const bool per_channel = of_scaled->size(0) > 1;
    std::fill_n(products, of_scaled->size(0), 0.0);
    for (int64_t r = 0; r < m.rows; ++r) {
      const int64_t at = r * up.stride(0);
      if (up.scalar_type() == ScalarType::Float) {
        add_products(products, per_channel, static_cast<const float*>(up.data_ptr()) + at, grads + r * m.dim, m.dim);
      } else {
        add_products(products, per_channel, static_cast<const BFloat16*>(up.data_ptr()) + at, grads + r * m.dim, m.dim);
      }
    }
  }
  scale(grad_up, grad_scaled, nullptr, factor(beta, m.dim), m);
}

}  // namespace
}  // namespace laurel
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("laurel_scale_up_", TORCH_BOX(&effkern::laurel::scale_up));
  m.impl("laurel_up_grads_", TORCH_BOX(&effkern::laurel::up_grads));
}
