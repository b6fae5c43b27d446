// effkern::label_rank for CUDA tensors; the kernel is in label_rank_kernel.cuh.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "common/label_rank_checks.h"
#include "cuda/label_rank_kernel.cuh"

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

template <typename T>
void run(const Tensor& logits, const Tensor& labels, const effkern::LabelRankOutputs& out, int64_t ignore_index,
         int vocab) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(logits.get_device_index(), &stream));
  const effkern::LabelRankArgs<T> args{static_cast<const T*>(logits.const_data_ptr()),
                                       logits.stride(0),
                                       labels.const_data_ptr<int64_t>(),
                                       out.loss.mutable_data_ptr<float>(),
                                       out.lse.mutable_data_ptr<float>(),
                                       out.label_logit.mutable_data_ptr<float>(),
                                       out.rank.mutable_data_ptr<int64_t>(),
                                       logits.size(0),
                                       vocab,
                                       ignore_index};
  effkern::launch_label_rank(args, effkern::label_rank_threads<T>(vocab), static_cast<cudaStream_t>(stream));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> label_rank(const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                                                      int64_t vocab_valid) {
  effkern::check_label_rank(logits, labels, vocab_valid);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const effkern::LabelRankOutputs out(logits, labels);
  const int vocab = static_cast<int>(vocab_valid);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      run<float>(logits, labels, out, ignore_index, vocab);
      break;
    case ScalarType::BFloat16:
      run<__nv_bfloat16>(logits, labels, out, ignore_index, vocab);
      break;
    default:
      run<__half>(logits, labels, out, ignore_index, vocab);
  }
  return {out.loss, out.lse, out.label_logit, out.rank};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, library) { library.impl("label_rank", TORCH_BOX(&label_rank)); }
