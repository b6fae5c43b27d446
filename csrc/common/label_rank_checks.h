// What the CPU and the CUDA kernel of label_rank demand and allocate; users meet the Python checks first.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

namespace effkern {

inline void check_label_rank(const torch::stable::Tensor& logits, const torch::stable::Tensor& labels,
                             int64_t vocab_valid) {
  using torch::headeronly::ScalarType;
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(logits.dim() == 2, "label_rank: logits must be [N, V]");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "label_rank: logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) == 1, "label_rank: logits must have stride 1 along V");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == logits.size(0) &&
                      labels.is_contiguous(),
                  "label_rank: labels must be int64, contiguous, one per row of logits");
  STD_TORCH_CHECK(labels.device() == logits.device(), "label_rank: labels must be on the device of logits");
  STD_TORCH_CHECK(vocab_valid >= 1 && vocab_valid <= logits.size(1) && vocab_valid <= std::numeric_limits<int>::max(),
                  "label_rank: vocab_valid must be in [1, V] and below 2^31");
  STD_TORCH_CHECK(logits.size(0) <= std::numeric_limits<int>::max(),
                  "label_rank: logits must have fewer than 2^31 rows");
}

struct LabelRankOutputs {
  LabelRankOutputs(const torch::stable::Tensor& logits, const torch::stable::Tensor& labels)
      : loss(torch::stable::new_empty(logits, {labels.size(0)}, torch::headeronly::ScalarType::Float)),
        lse(torch::stable::empty_like(loss)),
        label_logit(torch::stable::empty_like(loss)),
        rank(torch::stable::empty_like(labels)) {}
  torch::stable::Tensor loss, lse, label_logit, rank;
};

}  // namespace effkern
