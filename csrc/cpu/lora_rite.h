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
#include "cpu/lapack_parallel.h"

namespace effkern {
namespace lora_rite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Products take 32-bit sizes. Above 128 eigenvalues come from LAPACK.
constexpr int64_t kMaxRank = 4096;
// Elements of a tile: three of them and what they are made from share the second cache.
constexpr int64_t kTile = 16384;
// Rows whose products are summed up in float32; at large ranks the sums themselves cost more.
inline int64_t strip_rows(int64_t rank) { return rank <= 32 ? 128 : 256; }
// Tiles of a task, whose sums are float64. Never by the number of threads: the bits do not depend on it.
constexpr int64_t kTaskTiles = 8;

inline void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, "lora_rite: ", rule); }

inline double* doubles(const Tensor& x, int64_t count) {
  check(x.scalar_type() == ScalarType::Double && x.is_contiguous() && x.numel() == count,
        "r x r operands must be packed float64, [F, r, r], [F, r] or [F]");
  return static_cast<double*>(x.data_ptr());
}

inline double trace(const double* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i * n + i];
  return sum;
}

// X [rows, r], kept as such or as its transpose.
struct Tall {
  float* data;
  int64_t rows, rank;
  bool wide;

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
  check(rank >= 1 && rank <= kMaxRank, "ranks must be in [1, 4096]");
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

// Rows of one layout in a tile; a stride is between rows, or between columns of a wide one.
template <typename T>
struct Tile {
  T* data;
  int64_t stride;
  bool wide;
};

// out = alpha x w + beta out; w [r, r] by rows. The layouts may differ.
template <typename T>
void times(int64_t rows, int64_t rank, T alpha, const Tile<T>& x, const T* w, T beta, const Tile<T>& out) {
  const int n = static_cast<int>(rows), r = static_cast<int>(rank);
  const int ldx = static_cast<int>(x.stride), ldo = static_cast<int>(out.stride);
  if (out.wide) lapack::gemm(x.wide ? 'N' : 'T', 'T', n, r, r, alpha, x.data, ldx, w, r, beta, out.data, ldo);
  else lapack::gemm('N', x.wide ? 'T' : 'N', r, n, r, alpha, w, r, x.data, ldx, beta, out.data, ldo);
}

// out [r, r] by rows = y^T z.
template <typename T>
void cross(int64_t rows, int64_t rank, const Tile<T>& y, const Tile<T>& z, T* out) {
  const int n = static_cast<int>(rows), r = static_cast<int>(rank);
  lapack::gemm(z.wide ? 'T' : 'N', y.wide ? 'N' : 'T', r, r, n, T(1), z.data, static_cast<int>(z.stride), y.data,
               static_cast<int>(y.stride), T(0), out, r);
}

}  // namespace lora_rite
}  // namespace effkern
