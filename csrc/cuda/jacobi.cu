// effkern::batched_eigh for CUDA tensors; the kernel is in jacobi_kernel.cuh.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/jacobi_kernel.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
void run(const Tensor& matrices, const Tensor& values, const Tensor& vectors, const Tensor& status) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(matrices.get_device_index(), &stream));
  const int64_t count = matrices.size(0);
  const int n = static_cast<int>(matrices.size(1));
  std::optional<Tensor> scratch;
  if (effkern::eigh_needs_scratch<T>(n))
    scratch = torch::stable::new_empty(matrices, {count, n, effkern::jacobi_stride(n)});
  effkern::launch_batched_eigh(
      effkern::EighArgs<T>{static_cast<const T*>(matrices.const_data_ptr()), static_cast<T*>(values.data_ptr()),
                           static_cast<T*>(vectors.data_ptr()), static_cast<int*>(status.data_ptr()),
                           scratch ? static_cast<T*>(scratch->data_ptr()) : nullptr, count, n},
      static_cast<cudaStream_t>(stream));
}

std::tuple<Tensor, Tensor, Tensor> batched_eigh(Tensor matrices, int64_t method) {
  const auto dtype = matrices.scalar_type();
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2) && matrices.is_contiguous() &&
                      (dtype == ScalarType::Float || dtype == ScalarType::Double) && (method == 0 || method == 1) &&
                      matrices.size(1) <= effkern::kJacobiMaxOrder &&
                      matrices.size(0) <= std::numeric_limits<int>::max(),
                  "batched_eigh: matrices must be contiguous [B, n, n] with n <= 128, float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(matrices.get_device_index());
  const int64_t count = matrices.size(0), n = matrices.size(1);
  const Tensor values = torch::stable::new_empty(matrices, {count, n});
  const Tensor vectors = torch::stable::new_empty(matrices, {count, n, n});
  const Tensor status = torch::stable::new_empty(matrices, {count}, ScalarType::Int);
  if (dtype == ScalarType::Float) run<float>(matrices, values, vectors, status);
  else run<double>(matrices, values, vectors, status);
  return {values, vectors, status};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, library) { library.impl("batched_eigh", TORCH_BOX(&batched_eigh)); }
