// Products of a chunk of rows with a skinny matrix, by the library behind torch.mm.
//
// They are called from inside a parallel region, one chunk of rows per thread; the order of the library's sums depends on
// the number of threads there are, and on nothing else. The shim's functions are torch's kernels without dispatch, so
// that autograd and inference mode of the caller's thread do not matter.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <type_traits>

#include "cpu/dtypes.h"
#include "cpu/rows.h"

namespace effkern {

// Memory that is written before it is read.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(size > 0 ? new T[size] : nullptr) {}
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  Matrix t() const { return {data, columns, rows, column_stride, row_stride}; }
  torch::stable::Tensor tensor() const {
    return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(data), {rows, columns},
                                    {row_stride, column_stride}, torch::headeronly::DeviceType::CPU,
                                    type_of<std::remove_const_t<T>>());
  }
};

template <typename T>
Matrix<T> matrix_of(const Rows<T>& x, int64_t first, int64_t rows, int64_t columns) {
  return {x[first], rows, columns, x.stride};
}

// out = a b
template <typename T, typename A, typename B>
void multiply(const Matrix<T>& out, const Matrix<A>& a, const Matrix<B>& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(out.tensor().get(), a.tensor().get(), b.tensor().get()));
}

// out += a b
inline void add_product(const Matrix<float>& out, const Matrix<const float>& a, const Matrix<const float>& b) {
  const auto total = out.tensor();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(total.get(), total.get(), a.tensor().get(), b.tensor().get(), 1.0, 1.0));
}

// Whether effkern multiplies bfloat16 itself here, with float results (gemm_bf16.cpp; 2 is its "none").
inline bool own_products() {
  std::array<StableIValue, 1> kernel{};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("effkern::bf16_gemm_kernel", "", kernel.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<int64_t>(kernel[0]) < 2;
}

// The gradient of what a product took: beta g + low.
template <typename T>
EFFKERN_INLINE void grad_x_row(const float* g, const Factor& beta, const float* low, T* out, int64_t dim) {
  with_factor(beta, [&](auto b) EFFKERN_LAMBDA {
    for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], b(v) * g[v] + low[v]); });
  });
}

// GCC clones functions, not templates.
namespace {

EFFKERN_CLONES void grad_x_rows(Rows<const float> g, const Factor& beta, Rows<const float> low, Rows<BFloat16> out,
                                int64_t dim, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) grad_x_row(g[r], beta, low[r], out[r], dim);
}

EFFKERN_CLONES void add_widened(float* total, const BFloat16* x, int64_t size) {
  for_lanes(0, size, [&](int, int64_t i) EFFKERN_LAMBDA { total[i] += widen(x[i]); });
}

}  // namespace

// Products with float results. Those of bfloat16 are our own; without them (`own` is false), or with a layout that they
// do not take, they go through `part`, as the library rounds to bfloat16.
template <typename T>
struct Products {
  bool own;
  T* part;

  // out = a b^T, packed.
  void nt(float* out, const Matrix<const T>& a, const Matrix<const T>& b) const {
    const Matrix<float> to{out, a.rows, b.rows, b.rows};
    if constexpr (std::is_same_v<T, float>) {
      multiply(to, a, b.t());
    } else if (own && b.column_stride == 1) {
      std::array<StableIValue, 3> stack{torch::stable::detail::from(to.tensor()),
                                        torch::stable::detail::from(a.tensor()),
                                        torch::stable::detail::from(b.tensor())};
      STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("effkern::bf16_mm_nt_", "", stack.data(), TORCH_ABI_VERSION));
    } else {
      multiply(Matrix<T>{part, a.rows, b.rows, b.rows}, a, b.t());
      std::fill_n(out, a.rows * b.rows, 0.0f);
      add_widened(out, part, a.rows * b.rows);
    }
  }

  // total += a^T b, packed.
  void add_tn(float* total, const Matrix<const T>& a, const Matrix<const T>& b) const {
    const Matrix<float> to{total, a.columns, b.columns, b.columns};
    if constexpr (std::is_same_v<T, float>) {
      add_product(to, a.t(), b);
    } else if (own) {
      std::array<StableIValue, 4> stack{
          torch::stable::detail::from(to.tensor()), torch::stable::detail::from(a.tensor()),
          torch::stable::detail::from(b.tensor()), torch::stable::detail::from(false)};
      STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("effkern::bf16_add_tn_", "", stack.data(), TORCH_ABI_VERSION));
    } else {
      multiply(Matrix<T>{part, a.columns, b.columns, b.columns}, a.t(), b);
      add_widened(total, part, a.columns * b.columns);
    }
  }
};

}  // namespace effkern
