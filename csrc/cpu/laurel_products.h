// The inner norm of the LAuReL residual on R numbers per row.
#pragma once

#include <cmath>

#include "cpu/laurel_rows.h"
#include "cpu/skinny_products.h"

namespace effkern {
namespace laurel {

// The inner norm on R numbers per row: v = s raw, s = (raw G raw^T / D + eps)^-1/2, as in effkern/ops/laurel/low_rank.py.
struct Gram {
  const float* values = nullptr;  // G, [R, R]
  float eps;
  int64_t rank, dim;
};

// raw as float, and raw G.
template <typename T>
void times_gram(const Gram& gram, const Matrix<const T>& raw, float* wide, float* product) {
  for (int64_t n = 0; n < raw.rows; ++n)
    for (int64_t j = 0; j < gram.rank; ++j) wide[n * gram.rank + j] = widen(raw.data[n * raw.row_stride + j]);
  multiply<float, const float, const float>({product, raw.rows, gram.rank, gram.rank},
                                            {wide, raw.rows, gram.rank, gram.rank},
                                            {gram.values, gram.rank, gram.rank, gram.rank});
}

inline float inverse_rms(const Gram& gram, const float* raw, const float* product) {
  float square = 0.0f;
  for (int64_t j = 0; j < gram.rank; ++j) square += raw[j] * product[j];
  // Rounding may leave a sum of squares just below zero; NaN passes.
  square = square < 0.0f ? 0.0f : square;
  return 1.0f / std::sqrt(square / static_cast<float>(gram.dim) + gram.eps);
}

}  // namespace laurel
}  // namespace effkern
