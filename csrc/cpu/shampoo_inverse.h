// Sums of shifted inverses of a positive definite matrix: what partial fractions of a matrix function ask for.
#pragma once

#include "cpu/shampoo_tiles.h"

#if defined(EFFKERN_HAS_BF16)
namespace effkern::tiles {

// W = C^-1 of the Cholesky factor C of `s` (side n, a multiple of 16, rows `stride` apart; only its lower triangle is
// read), in place: s^-1 = W^T W. Above the diagonal blocks nothing is written, inside them zeros. False where a pivot is
// not positive; `s` is then of no use. `panels`: panel_size(n) floats.
bool invert_factor(float* s, int64_t n, int64_t stride, float* panels);
int64_t panel_size(int64_t n);

// x += weight W^T W, the lower triangle and what shares a tile with it.
void add_gram_of_triangle(const float* w, int64_t n, int64_t stride, float weight, float* x, int64_t x_stride);

// x += weight sum_k p_k^T p_k over the rows of p [depth, n], lower triangle.
void add_gram_of_rows(const float* p, int64_t depth, int64_t n, int64_t stride, float weight, float* x,
                      int64_t x_stride);

}  // namespace effkern::tiles
#endif
