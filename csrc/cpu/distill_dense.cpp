// The variants of the dense row pass, one per divergence, with and without gradient.
#include "distill_chunk.h"
#include "distill_dense.h"
#include "widen.h"

namespace effkern {
namespace {

template <class T>
EFFKERN_INLINE void widen_row(const void* teacher, int64_t offset, float* out, int64_t vocab) {
  const T* x = static_cast<const T*>(teacher) + offset;
  for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { out[v] = widen(x[v]); });
}

template <class D, bool Grad>
EFFKERN_INLINE void run_rows(const DistillChunk& c, int64_t begin, int64_t end) {
  const bool widened = c.teacher_type != TeacherType::FLOAT;
  Scratch scratch(c.vocab, true, c.options.temperature != 1.0f, widened);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = load_index(c.labels, c.long_labels, n);
    RowStats stats = {};
    if (label != c.ignore_index) {
      float* z = c.logits + n * c.logits_stride;
      const int64_t offset = n * c.teacher_stride;
      const float* u = scratch.u.data();
      if (!widened) u = static_cast<const float*>(c.teacher) + offset;
      if (c.teacher_type == TeacherType::BFLOAT16) widen_row<BFloat16>(c.teacher, offset, scratch.u.data(), c.vocab);
      if (c.teacher_type == TeacherType::FLOAT16) widen_row<Float16>(c.teacher, offset, scratch.u.data(), c.vocab);
      finish_logits(z, c.bias, c.vocab, c.options);
      stats = dense_row<D, Grad>({z, u, c.vocab, label, c.scale[n], c.omega[n]}, c.options, scratch);
    }
    store_row<Grad>(c, n, label != c.ignore_index, stats, scratch.exp_q.data());
  }
}

// target_clones takes plain functions only, hence one name per variant.
#define EFFKERN_VARIANT(D)                                                                                           \
  EFFKERN_CLONES void D##_eval(const DistillChunk& c, int64_t begin, int64_t end) { run_rows<D, false>(c, begin, end); } \
  EFFKERN_CLONES void D##_grad(const DistillChunk& c, int64_t begin, int64_t end) { run_rows<D, true>(c, begin, end); }

#define EFFKERN_DIVERGENCES(_)                                                                             \
  _(ForwardKL) _(ReverseKL) _(SymmetricKL) _(JSD) _(SkewForwardKL) _(SkewReverseKL) _(TVD) _(DecoupledKL) \
      _(MSE) _(CenteredMSE) _(ZScoredMSE) _(Cosine)

EFFKERN_DIVERGENCES(EFFKERN_VARIANT)

}  // namespace

#define EFFKERN_ROW(D) {D##_eval, D##_grad},
const DistillVariant DENSE_VARIANTS[NUM_DIVERGENCES][2] = {EFFKERN_DIVERGENCES(EFFKERN_ROW)};

}  // namespace effkern
