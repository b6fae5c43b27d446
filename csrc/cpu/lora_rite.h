// What the stages of LoRA-RITE share on the CPU: checks, tall matrices of both layouts, tiles.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/clones.h"
#include "cpu/vendor.h"

namespace effkern {
namespace lora_rite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxRank = 128;
// Elements of a tile: three of them and what they are made from share the second cache.
constexpr int64_t kTile = 16384;
// Tiles of a task, whose sums are float64. Never by the number of threads: the bits do not depend on it.
constexpr int64_t kTaskTiles = 8;

inline void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, "lora_rite: ", rule); }

inline double* doubles(const Tensor& x, int64_t count) {
  check(x.scalar_type() == ScalarType::Double && x.is_contiguous() && x.numel() == count,
        "r x r operands must be packed float64, [F, r, r], [F, r] or [F]");
  return static_cast<double*>(x.data_ptr());
}

// X [rows, r], kept as such or as its transpose.
struct Tall {
  float* data;
  int64_t rows, rank;
  bool wide;

  int64_t stride() const { return wide ? rows : rank; }
  float* from(int64_t row) const { return data + (wide ? row : row * rank); }
};

inline Tall tall(const Tensor& x, bool wide, int64_t rank) {
  check(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.is_contiguous() && x.size(wide ? 0 : 1) == rank,
        "tall tensors must be contiguous float32 [rows, r], or [r, rows] where wide says so");
  return {static_cast<float*>(x.data_ptr()), x.size(wide ? 1 : 0), rank, wide};
}

inline std::vector<Tall> talls(const std::vector<Tensor>& tensors, const std::vector<bool>& wide) {
  check(!tensors.empty() && tensors.size() == wide.size() && tensors[0].dim() == 2,
        "lists must be of one length, and not empty");
  const int64_t rank = tensors[0].size(wide[0] ? 0 : 1);
  check(rank >= 1 && rank <= kMaxRank, "ranks must be in [1, 128]");
  std::vector<Tall> found;
  for (size_t i = 0; i < tensors.size(); ++i) found.push_back(tall(tensors[i], wide[i], rank));
  return found;
}

// Rows [begin, end) of a factor; tasks of a factor follow each other.
struct Task {
  int64_t factor, begin, end;
};

inline int64_t tile_rows(int64_t rank) { return std::max<int64_t>(64, kTile / rank / 64 * 64); }

inline std::vector<Task> tasks_of(const std::vector<Tall>& factors) {
  std::vector<Task> tasks;
  for (size_t f = 0; f < factors.size(); ++f) {
    const int64_t step = kTaskTiles * tile_rows(factors[f].rank);
    for (int64_t begin = 0; begin < factors[f].rows; begin += step)
      tasks.push_back({static_cast<int64_t>(f), begin, std::min(begin + step, factors[f].rows)});
  }
  return tasks;
}

// out = alpha x w + beta out for rows of one layout; w [r, r] by rows. A stride is between rows, or between columns of
// a wide one.
template <typename T>
void times(bool wide, int64_t rows, int64_t rank, T alpha, const T* x, int64_t x_stride, const T* w, T beta, T* out,
           int64_t out_stride) {
  const int n = static_cast<int>(rows), r = static_cast<int>(rank);
  const int ldx = static_cast<int>(x_stride), ldo = static_cast<int>(out_stride);
  if (wide) vendor::gemm('N', 'T', n, r, r, alpha, x, ldx, w, r, beta, out, ldo);
  else vendor::gemm('N', 'N', r, n, r, alpha, w, r, x, ldx, beta, out, ldo);
}

// out [r, columns] by rows = y^T z, y of r and z of `columns` columns.
template <typename T>
void cross(bool wide, int64_t rows, int64_t rank, int64_t columns, const T* y, int64_t y_stride, const T* z,
           int64_t z_stride, T* out) {
  const int n = static_cast<int>(rows), r = static_cast<int>(rank), c = static_cast<int>(columns);
  const int ldy = static_cast<int>(y_stride), ldz = static_cast<int>(z_stride);
  if (wide) vendor::gemm('T', 'N', c, r, n, T(1), z, ldz, y, ldy, T(0), out, c);
  else vendor::gemm('N', 'T', c, r, n, T(1), z, ldz, y, ldy, T(0), out, c);
}

}  // namespace lora_rite
}  // namespace effkern
