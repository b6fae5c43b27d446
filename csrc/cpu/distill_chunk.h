// A chunk of rows as the op receives it, and the variants of the row pass that run over it.
#pragma once

#include <cstdint>

#include "cpu/distill_math.h"

namespace effkern {

enum class TeacherType { NONE, FLOAT, BFLOAT16, FLOAT16 };

// What the rows of one chunk share.
struct DistillChunk {
  float* logits;
  const void* teacher;
  const void* ids;
  const float *logprobs, *bias;
  const void* labels;
  const float *scale, *omega;
  float* stats;
  int64_t vocab, kept, logits_stride, teacher_stride, stats_stride, ignore_index;
  TeacherType teacher_type;
  bool long_labels, long_ids, grad_bfloat16;
  RowOptions options;
};

using DistillVariant = void (*)(const DistillChunk&, int64_t begin, int64_t end);

// The order is that of DIVERGENCES in effkern/ops/distill/rows.py. Several files, as each takes long to compile.
#define EFFKERN_DIVERGENCES(_)                                                                            \
  _(ForwardKL) _(ReverseKL) _(SymmetricKL) _(JSD) _(SkewForwardKL) _(SkewReverseKL) _(TVD) _(DecoupledKL) \
      _(MSE) _(CenteredMSE) _(ZScoredMSE) _(Cosine)

#define EFFKERN_DECLARE(D)                                              \
  void D##_eval(const DistillChunk& c, int64_t begin, int64_t end);     \
  void D##_grad(const DistillChunk& c, int64_t begin, int64_t end);
EFFKERN_DIVERGENCES(EFFKERN_DECLARE)
#undef EFFKERN_DECLARE
void sparse_eval(const DistillChunk& c, int64_t begin, int64_t end);
void sparse_grad(const DistillChunk& c, int64_t begin, int64_t end);

// Element n of an array of int64 or int32.
inline int64_t load_index(const void* x, bool is_long, int64_t n) {
  return is_long ? static_cast<const int64_t*>(x)[n] : static_cast<const int32_t*>(x)[n];
}

// Statistics of a finished row to their columns, and the gradient to where the logits were. A row without weight has
// no gradient even if it holds inf or NaN; all bits zero is zero in either type.
template <bool Grad>
EFFKERN_INLINE void store_row(const DistillChunk& c, int64_t n, bool valid, const RowStats& stats, const float* grad) {
  float* z = c.logits + n * c.logits_stride;
  if (Grad && (!valid || c.scale[n] == 0.0f)) {
    for (int64_t v = 0; v < c.vocab; ++v) z[v] = 0.0f;
  } else if (Grad) {
    store_grad(grad, z, c.vocab, c.grad_bfloat16);
  }
  const float* values = &stats.loss;
  for (int s = 0; s < NUM_STATS; ++s) c.stats[s * c.stats_stride + n] = values[s];
}

}  // namespace effkern
