// effkern::distill_rows_ on CPU: the stable-ABI side of the row passes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "distill_chunk.h"

namespace effkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [divergence][gradient]
#define EFFKERN_ROW(D) {D##_eval, D##_grad},
constexpr DistillVariant DENSE_VARIANTS[][2] = {EFFKERN_DIVERGENCES(EFFKERN_ROW)};
#undef EFFKERN_ROW
constexpr int NUM_DIVERGENCES = sizeof(DENSE_VARIANTS) / sizeof(DENSE_VARIANTS[0]);
constexpr DistillVariant SPARSE_VARIANTS[2] = {sparse_eval, sparse_grad};

// A dimension of one element has a stride that nobody uses.
bool packed(const Tensor& x, int64_t dim) { return x.size(dim) <= 1 || x.stride(dim) == 1; }

bool is_index(const Tensor& x) { return x.scalar_type() == ScalarType::Long || x.scalar_type() == ScalarType::Int; }

bool is_vector(const Tensor& x, int64_t size, ScalarType type) {
  return x.scalar_type() == type && x.dim() == 1 && x.size(0) == size && packed(x, 0);
}

TeacherType teacher_type(const Tensor& teacher, int64_t rows, int64_t vocab) {
  STD_TORCH_CHECK(teacher.size(0) == rows && teacher.size(1) >= vocab && packed(teacher, 1),
                  "distill_rows_: teacher must be [rows, >= vocab] with stride 1 along the vocabulary");
  const ScalarType type = teacher.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "distill_rows_: teacher must be float32, bfloat16 or float16");
  if (type == ScalarType::Float) return TeacherType::FLOAT;
  return type == ScalarType::BFloat16 ? TeacherType::BFLOAT16 : TeacherType::FLOAT16;
}

void distill_rows(Tensor logits, std::optional<Tensor> teacher, std::optional<Tensor> ids,
                  std::optional<Tensor> logprobs, std::optional<Tensor> bias, Tensor labels, Tensor scale,
                  Tensor omega, Tensor stats, int64_t divergence, double alpha, double beta, double divergence_scale,
                  bool teacher_logprobs, int64_t sparse_kind, bool want_grad, bool grad_bfloat16, double temperature,
                  double teacher_temperature, double label_smoothing, double z_loss, double softcap,
                  double logit_scale, int64_t ignore_index) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  STD_TORCH_CHECK(divergence >= 0 && divergence < NUM_DIVERGENCES, "distill_rows_: unknown divergence");
  STD_TORCH_CHECK(sparse_kind >= -1 && sparse_kind < 8, "distill_rows_: unknown kind of sparse teacher");
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float && packed(logits, 1),
                  "distill_rows_: logits must be float32 with stride 1 along the vocabulary");
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.size(0) == NUM_STATS && stats.size(1) == rows &&
                      packed(stats, 1),
                  "distill_rows_: stats must be float32 [13, rows] with stride 1 along the rows");
  STD_TORCH_CHECK(is_vector(scale, rows, ScalarType::Float) && is_vector(omega, rows, ScalarType::Float),
                  "distill_rows_: scale and omega must be contiguous float32 [rows]");
  STD_TORCH_CHECK(labels.size(0) == rows && packed(labels, 0) && is_index(labels),
                  "distill_rows_: labels must be contiguous int64 or int32 [rows]");
  STD_TORCH_CHECK(!bias || is_vector(*bias, vocab, ScalarType::Float),
                  "distill_rows_: bias must be contiguous float32 [vocab]");
  STD_TORCH_CHECK(ids.has_value() == logprobs.has_value() && ids.has_value() == (sparse_kind >= 0) &&
                      !(ids && teacher),
                  "distill_rows_: a sparse teacher needs ids, logprobs and its kind, and no dense one");
  DistillChunk chunk = {};
  if (ids) {
    STD_TORCH_CHECK(is_index(*ids) && ids->dim() == 2 && ids->size(0) == rows && ids->is_contiguous() &&
                        logprobs->scalar_type() == ScalarType::Float && logprobs->dim() == 2 &&
                        logprobs->size(0) == rows && logprobs->size(1) == ids->size(1) && logprobs->is_contiguous(),
                    "distill_rows_: ids and float32 logprobs must be contiguous [rows, K]");
    chunk.ids = ids->data_ptr();
    chunk.logprobs = static_cast<const float*>(logprobs->data_ptr());
    chunk.kept = ids->size(1);
    chunk.long_ids = ids->scalar_type() == ScalarType::Long;
  }
  if (teacher) {
    chunk.teacher_type = teacher_type(*teacher, rows, vocab);
    chunk.teacher = teacher->data_ptr();
    chunk.teacher_stride = teacher->stride(0);
  }
  chunk.logits = static_cast<float*>(logits.data_ptr());
  chunk.bias = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  chunk.labels = labels.data_ptr();
  chunk.scale = static_cast<const float*>(scale.data_ptr());
  chunk.omega = static_cast<const float*>(omega.data_ptr());
  chunk.stats = static_cast<float*>(stats.data_ptr());
  chunk.vocab = vocab;
  chunk.logits_stride = logits.stride(0);
  chunk.stats_stride = stats.stride(0);
  chunk.ignore_index = ignore_index;
  chunk.long_labels = labels.scalar_type() == ScalarType::Long;
  chunk.grad_bfloat16 = grad_bfloat16;
  const bool reverse = divergence == 1;
  chunk.options = {static_cast<float>(alpha),           static_cast<float>(beta),
                   static_cast<float>(1.0 - alpha),     static_cast<float>(1.0 - beta),
                   static_cast<float>(divergence_scale), static_cast<float>(temperature),
                   static_cast<float>(teacher_temperature), static_cast<float>(label_smoothing),
                   static_cast<float>(z_loss),          static_cast<float>(softcap),
                   static_cast<float>(logit_scale),     teacher_logprobs,
                   reverse,                             static_cast<int>(sparse_kind)};
  const DistillVariant variant = teacher ? DENSE_VARIANTS[divergence][want_grad] : SPARSE_VARIANTS[want_grad];
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { variant(chunk, begin, end); });
}

}  // namespace
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("distill_rows_", TORCH_BOX(&effkern::distill_rows)); }
