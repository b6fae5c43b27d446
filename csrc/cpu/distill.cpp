// effkern::distill_rows_ on CPU: the stable-ABI side of distill_rows.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "distill_rows.h"

namespace effkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the rows of one chunk share.
struct Chunk {
  float* logits;
  const void* teacher;
  const float* bias;
  const void* labels;
  const float *scale, *omega;
  float* stats;
  int64_t vocab, logits_stride, teacher_stride, stats_stride, ignore_index;
  bool long_labels;
  RowOptions options;
};

template <class Divergence, class U, bool Tempered, bool Grad>
EFFKERN_INLINE void run_rows(const Chunk& c, int64_t begin, int64_t end) {
  Scratch scratch(c.vocab, !std::is_void<U>::value, Tempered);
  for (int64_t n = begin; n < end; ++n) {
    float* z = c.logits + n * c.logits_stride;
    const int64_t label =
        c.long_labels ? static_cast<const int64_t*>(c.labels)[n] : static_cast<const int32_t*>(c.labels)[n];
    RowStats stats = {};
    if (label != c.ignore_index) {
      const U* u = nullptr;
      if constexpr (!std::is_void<U>::value) u = static_cast<const U*>(c.teacher) + n * c.teacher_stride;
      stats = row_pass<Divergence, U, Tempered, Grad>(z, u, c.bias, c.vocab, label, c.scale[n], c.omega[n], c.options,
                                                      scratch);
    }
    if (Grad && (label == c.ignore_index || c.scale[n] == 0.0f)) {
      // A row without weight has no gradient even if it holds inf or NaN. All bits zero is zero in either type.
      for (int64_t v = 0; v < c.vocab; ++v) z[v] = 0.0f;
    }
    const float* values = &stats.loss;
    for (int s = 0; s < NUM_STATS; ++s) c.stats[s * c.stats_stride + n] = values[s];
  }
}

// target_clones takes plain functions only, hence one name per variant.
#define EFFKERN_VARIANT(name, Divergence, U, Tempered, Grad)                                   \
  EFFKERN_CLONES void name(const Chunk& c, int64_t begin, int64_t end) {                       \
    run_rows<Divergence, U, Tempered, Grad>(c, begin, end);                                    \
  }

EFFKERN_VARIANT(hard_eval, ForwardKL, void, false, false)
EFFKERN_VARIANT(hard_grad, ForwardKL, void, false, true)
EFFKERN_VARIANT(hard_tempered_eval, ForwardKL, void, true, false)
EFFKERN_VARIANT(hard_tempered_grad, ForwardKL, void, true, true)
EFFKERN_VARIANT(kl_float_eval, ForwardKL, float, false, false)
EFFKERN_VARIANT(kl_float_grad, ForwardKL, float, false, true)
EFFKERN_VARIANT(kl_float_tempered_eval, ForwardKL, float, true, false)
EFFKERN_VARIANT(kl_float_tempered_grad, ForwardKL, float, true, true)
EFFKERN_VARIANT(kl_bfloat16_eval, ForwardKL, uint16_t, false, false)
EFFKERN_VARIANT(kl_bfloat16_grad, ForwardKL, uint16_t, false, true)
EFFKERN_VARIANT(kl_bfloat16_tempered_eval, ForwardKL, uint16_t, true, false)
EFFKERN_VARIANT(kl_bfloat16_tempered_grad, ForwardKL, uint16_t, true, true)

using Variant = void (*)(const Chunk&, int64_t, int64_t);

// [divergence][teacher: none, float32, bfloat16][tempered][gradient]
constexpr Variant VARIANTS[1][3][2][2] = {
    {{{hard_eval, hard_grad}, {hard_tempered_eval, hard_tempered_grad}},
     {{kl_float_eval, kl_float_grad}, {kl_float_tempered_eval, kl_float_tempered_grad}},
     {{kl_bfloat16_eval, kl_bfloat16_grad}, {kl_bfloat16_tempered_eval, kl_bfloat16_tempered_grad}}}};

// A dimension of one element has a stride that nobody uses.
bool packed(const Tensor& x, int64_t dim) { return x.size(dim) <= 1 || x.stride(dim) == 1; }

void distill_rows(Tensor logits, std::optional<Tensor> teacher, std::optional<Tensor> bias, Tensor labels,
                  Tensor scale, Tensor omega, Tensor stats, int64_t divergence, bool want_grad, bool grad_bfloat16,
                  double temperature, double teacher_temperature, double label_smoothing, double z_loss,
                  double softcap, double logit_scale, int64_t ignore_index) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  STD_TORCH_CHECK(divergence == 0, "distill_rows_: unknown divergence");
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && packed(logits, 1),
                  "distill_rows_: logits must be float32 with stride 1 along the vocabulary");
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.size(0) == NUM_STATS && stats.size(1) == rows &&
                      packed(stats, 1),
                  "distill_rows_: stats must be float32 [11, rows] with stride 1 along the rows");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && omega.scalar_type() == ScalarType::Float &&
                      scale.size(0) == rows && omega.size(0) == rows && packed(scale, 0) && packed(omega, 0),
                  "distill_rows_: scale and omega must be contiguous float32 [rows]");
  STD_TORCH_CHECK(labels.size(0) == rows && packed(labels, 0) &&
                      (labels.scalar_type() == ScalarType::Long || labels.scalar_type() == ScalarType::Int),
                  "distill_rows_: labels must be contiguous int64 or int32 [rows]");
  int kind = 0;
  if (teacher) {
    const bool is_float = teacher->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(is_float || teacher->scalar_type() == ScalarType::BFloat16,
                    "distill_rows_: teacher must be float32 or bfloat16");
    STD_TORCH_CHECK(teacher->size(0) == rows && teacher->size(1) >= vocab && packed(*teacher, 1),
                    "distill_rows_: teacher must be [rows, >= vocab] with stride 1 along the vocabulary");
    kind = is_float ? 1 : 2;
  }
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->size(0) == vocab && packed(*bias, 0)),
                  "distill_rows_: bias must be contiguous float32 [vocab]");

  Chunk chunk;
  chunk.logits = static_cast<float*>(logits.data_ptr());
  chunk.teacher = teacher ? teacher->data_ptr() : nullptr;
  chunk.bias = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  chunk.labels = labels.data_ptr();
  chunk.scale = static_cast<const float*>(scale.data_ptr());
  chunk.omega = static_cast<const float*>(omega.data_ptr());
  chunk.stats = static_cast<float*>(stats.data_ptr());
  chunk.vocab = vocab;
  chunk.logits_stride = logits.stride(0);
  chunk.teacher_stride = teacher ? teacher->stride(0) : 0;
  chunk.stats_stride = stats.stride(0);
  chunk.ignore_index = ignore_index;
  chunk.long_labels = labels.scalar_type() == ScalarType::Long;
  chunk.options = {static_cast<float>(temperature),     static_cast<float>(teacher_temperature),
                   static_cast<float>(label_smoothing), static_cast<float>(z_loss),
                   static_cast<float>(softcap),         static_cast<float>(logit_scale),
                   grad_bfloat16};
  const Variant variant = VARIANTS[divergence][kind][temperature != 1.0][want_grad];
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { variant(chunk, begin, end); });
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("distill_rows_", TORCH_BOX(&effkern::distill_rows)); }
