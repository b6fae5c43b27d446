// Looped linear attention on in-context regression, between its operators and its kernels.
//
//   B problems, N examples of D numbers, M queries, L loops, K numbers of state
//   s <- s + e_l (h - G s), prediction C s       primal: G = A^T S, h = A^T b, C = q;  dual: G = X (X A)^T / N, h = y / N,
//                                                C = q (X A)^T
//   w <- w + e_l A_l^T (b - S w), prediction q w           factors;  S = X^T X / N, b = X^T y / N
#pragma once

#include <algorithm>
#include <cstdint>

namespace effkern {
namespace looped {

enum class Form { kFactors, kPrimal, kDual };

// Problems side by side in a group of the widest vectors; a batch is cut into tasks of whole groups.
constexpr int64_t kGroup = 16;
// Loops whose states backward holds at a time; it runs every loop but those of the last segment once more for that.
constexpr int64_t kSegment = 64;

template <typename T>
struct Problem {
  const T *x, *y, *query, *a, *steps;
  int64_t batch, examples, dim, queries, loops, a_stride;
  bool every_loop;
  Form form;

  int64_t state() const { return form == Form::kDual ? examples : dim; }
  bool predicts(int64_t loop) const { return every_loop || loop + 1 == loops; }
  // The first prediction after `loop` of problem b.
  int64_t prediction(int64_t loop, int64_t b) const { return ((every_loop ? loop * batch : 0) + b) * queries; }
  T step(int64_t loop) const { return steps == nullptr ? T(1) : steps[loop]; }
};

template <typename T>
struct Gradients {
  const T* predictions;
  // Written, or null; those of the parameters per task, added to.
  T *x, *y, *query, *a, *steps;
};

}  // namespace looped
}  // namespace effkern
