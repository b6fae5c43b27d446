// The low-rank map of the LAuReL residual as the kernels see it.
#pragma once

#include "cpu/laurel_checks.h"
#include "cpu/laurel_products.h"

namespace effkern {
namespace laurel {

// The low-rank map: A, B (in backward times beta), what earlier layers sent, and its inner norm.
template <typename T>
struct LowRank {
  Matrix<const T> down{}, up{};
  Rows<const T> past;
  Gram gram;
  int64_t dim, columns = 0, rank = 0, own = 0;  // D, S, R, R - P

  LowRank(const Optional& a, const Optional& b, const Optional& p, const Optional& g, double eps, const Shape& shape)
      : dim(shape.dim) {
    if (a) {
      columns = a->size(1);
      down = any_matrix(*a, dim, columns);
    }
    if (!b) return;
    own = rank = b->size(0);
    up = any_matrix(*b, rank, dim);
    if (p) {
      past = narrow<const T>(*p, shape, p->size(1));
      own -= p->size(1);
    }
    STD_TORCH_CHECK(0 <= own && own <= columns, "laurel: up must have P to P + S rows");
    gram = {packed_matrix(g, rank, rank), static_cast<float>(eps), rank, dim};
  }

  // [N, `columns`], of x's dtype.
  template <typename U>
  static Rows<U> narrow(const Tensor& x, const Shape& shape, int64_t columns) {
    return matrix<U>(x, shape.rows, columns, "own, past and their gradients must be [N, S] or [N, P], of x's dtype");
  }

  // A product takes a transposed matrix as it is.
  static Matrix<const T> any_matrix(const Tensor& x, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(x.scalar_type() == type_of<T>() && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns,
                    "laurel: down must be [D, S] and up [R, D], of x's dtype");
    return {static_cast<const T*>(x.data_ptr()), rows, columns, x.stride(0), x.stride(1)};
  }
};

template <typename T>
struct Small {
  Buffer<T> raw, v;
  Buffer<float> wide, product;

  Small(const LowRank<T>& l, int64_t rows)
      : raw(l.past && l.own > 0 ? rows * l.rank : 0),
        v(l.gram.values ? rows * l.rank : 0),
        wide(l.gram.values ? rows * l.rank : 0),
        product(l.gram.values ? rows * l.rank : 0) {}
};

// [own | past] of a chunk.
template <typename T>
Matrix<const T> join(const LowRank<T>& l, Rows<const T> own, int64_t first, int64_t count, Small<T>& s) {
  if (!l.past) return matrix_of(own, first, count, l.rank);
  if (l.own == 0) return matrix_of(l.past, first, count, l.rank);
  for (int64_t n = 0; n < count; ++n) {
    std::copy_n(own[first + n], l.own, s.raw.get() + n * l.rank);
    std::copy_n(l.past[first + n], l.rank - l.own, s.raw.get() + n * l.rank + l.own);
  }
  return {s.raw.get(), count, l.rank, l.rank};
}

// v: raw, or with an inner norm s raw.
template <typename T>
Matrix<const T> scaled(const LowRank<T>& l, const Matrix<const T>& raw, Small<T>& s) {
  if (!l.gram.values) return raw;
  times_gram(l.gram, raw, s.wide.get(), s.product.get());
  for (int64_t n = 0; n < raw.rows; ++n) {
    const float* row = s.wide.get() + n * l.rank;
    const float factor = inverse_rms(l.gram, row, s.product.get() + n * l.rank);
    for (int64_t j = 0; j < l.rank; ++j) store(s.v.get()[n * l.rank + j], factor * row[j]);
  }
  return {s.v.get(), raw.rows, l.rank, l.rank};
}

}  // namespace laurel
}  // namespace effkern
