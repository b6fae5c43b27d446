// Blocks of parameters and gradients as they lie in memory: any dtype and strides, read and written a row at a time.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace effkern::shampoo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Written before it is read; whole cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(size) + 64, std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

struct Block {
  void* data;
  int64_t rows, columns, row_stride, column_stride;
  ScalarType type;

  Block transposed() const { return {data, columns, rows, column_stride, row_stride, type}; }
};

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// The blocks of a list; all must have one shape and dtype. `name` is for the message.
std::vector<Block> blocks_of(const std::vector<Tensor>& tensors, const char* name);

// `count` numbers of row r from column `first` on, widened.
template <typename W>
void load_row(const Block& x, int64_t r, int64_t first, int64_t count, W* out);
// All of it, rows of the result `stride` apart.
template <typename W>
void load(const Block& x, W* out, int64_t stride);
// Row r of the block, rounded.
template <typename W>
void store_row(const Block& x, int64_t r, const W* values);

// Row r where it can be used as it lies, else null.
template <typename W>
W* packed_row(const Block& x, int64_t r) {
  const bool wide = x.type == (sizeof(W) == sizeof(float) ? ScalarType::Float : ScalarType::Double);
  return wide && x.column_stride == 1 ? static_cast<W*>(x.data) + r * x.row_stride : nullptr;
}

// Loops over wide rows.
// before = m, m = a m + b g; returns the sum of squares of g.
double average(float a, float* m, float b, const float* g, float* before, int64_t n);
double average(double a, double* m, double b, const double* g, double* before, int64_t n);
// Sum of squares.
double sum_of_squares(const float* x, int64_t n);
double sum_of_squares(const double* x, int64_t n);
// y = a x + b y
void combine(float a, const float* x, float b, float* y, int64_t n);
void combine(double a, const double* x, double b, double* y, int64_t n);
// Whether all are finite; adds whether one is not zero to `any`.
bool scan(const float* x, int64_t n, bool* any);
bool scan(const double* x, int64_t n, bool* any);
float dot(const float* x, const float* y, int64_t n);
double dot(const double* x, const double* y, int64_t n);

// The upper triangle from the lower one, [n, n].
template <typename W>
void mirror(W* x, int64_t n, int64_t stride);

// out (lower triangle, and what lies in a block with it) = sum over rows of p [depth, n] of p_k^T p_k. With tiles, n and
// the memory of `out` go up to a multiple of 16.
template <typename W>
void gram_of_rows(const W* p, int64_t depth, int64_t n, int64_t stride, W* out, int64_t out_stride);

// Whether tiles are used (they are by default where the CPU has them), and the side of a matrix for them.
bool tiles();
int64_t side_for_tiles(int64_t n);

}  // namespace effkern::shampoo
