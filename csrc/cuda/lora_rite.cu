// r x r stages of LoRA-RITE for CUDA tensors; the kernels are in lora_rite_kernel.cuh and lora_rite_rebase.cuh.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cuda/lora_rite_rebase.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, "lora_rite: ", rule); }

template <typename T>
T* packed(const Tensor& x, ScalarType type, int64_t count) {
  check(x.scalar_type() == type && x.is_contiguous() && x.numel() == count,
        "operands must be packed, float64 [F, r, r], [F, r] or [F], steps int64 [F], exact int32 [F]");
  return static_cast<T*>(x.data_ptr());
}
double* doubles(const Tensor& x, int64_t count) { return packed<double>(x, ScalarType::Double, count); }

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::optional<Tensor> scratch(const Tensor& like, int64_t count, int n) {
  if (!effkern::rite_needs_scratch(n)) return std::nullopt;
  return torch::stable::new_empty(like, {count, effkern::jacobi_elements(n)}, ScalarType::Double);
}
double* data(const std::optional<Tensor>& x) { return x ? static_cast<double*>(x->data_ptr()) : nullptr; }

std::tuple<Tensor, Tensor> reduce(Tensor partial, Tensor first, Tensor rows, int64_t rank, double skip_rms) {
  const int64_t count = rows.numel(), width = partial.dim() == 2 ? partial.size(1) : 0;
  check(width >= rank * rank && rank >= 1, "partial must be [tiles, width] with width >= r^2");
  const torch::stable::accelerator::DeviceGuard guard(partial.get_device_index());
  const Tensor sums = torch::stable::new_empty(partial, {count, width}), traces = torch::stable::new_empty(rows, {count});
  effkern::launch_rite_reduce({doubles(partial, partial.numel()), packed<int64_t>(first, ScalarType::Long, count + 1),
                               doubles(rows, count), doubles(sums, count * width), doubles(traces, count), width,
                               static_cast<int>(rank), skip_rms},
                              count, stream_of(partial));
  return {sums, traces};
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five precondition_(Tensor grams, Tensor all_traces, Tensor rows, Tensor lr, std::optional<Tensor> grad_scale,
                   Tensor whiten, Tensor second, Tensor transport, Tensor escaped, Tensor steps,
                   std::vector<double> numbers, std::vector<bool> flags) {
  check(grams.dim() == 3 && grams.size(1) == grams.size(2) && grams.size(1) <= effkern::kJacobiMaxOrder &&
            grams.size(0) % 2 == 0 && numbers.size() == 7 && flags.size() == 3,
        "grams must be [F, r, r] of an even number of factors, numbers and flags those of Terms");
  const torch::stable::accelerator::DeviceGuard guard(grams.get_device_index());
  const int64_t count = grams.size(0), square = grams.size(1) * grams.size(1);
  const int n = static_cast<int>(grams.size(1));
  const Tensor gate = torch::stable::new_empty(all_traces, {});
  const Tensor carry = torch::stable::empty_like(grams), take = torch::stable::empty_like(grams);
  const Tensor apply = torch::stable::empty_like(grams), shrink = torch::stable::empty_like(rows);
  const std::optional<Tensor> memory = scratch(grams, count, n);
  effkern::PreconditionArgs args{};
  args.grams = doubles(grams, count * square), args.traces = doubles(all_traces, all_traces.numel());
  args.rows = doubles(rows, count), args.lr = doubles(lr, count);
  args.grad_scale = grad_scale ? doubles(*grad_scale, 1) : nullptr;
  args.whiten = doubles(whiten, count * square), args.second = doubles(second, count * n);
  args.transport = doubles(transport, count * square), args.escaped = doubles(escaped, count);
  args.steps = packed<int64_t>(steps, ScalarType::Long, count);
  args.gate = doubles(gate, 1), args.carry = doubles(carry, count * square), args.take = doubles(take, count * square);
  args.apply = doubles(apply, count * square), args.shrink = doubles(shrink, count);
  args.scratch = data(memory), args.num_traces = all_traces.numel(), args.n = n;
  args.terms = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], flags[0], flags[1], flags[2]};
  effkern::launch_rite_precondition(args, count, stream_of(grams));
  return {gate, carry, take, apply, shrink};
}

void launch_rebase(effkern::RebaseArgs args, const std::optional<Tensor>& gate, const Tensor& whiten,
                   const Tensor& transport, const Tensor& exact, bool single, double tolerance) {
  const int64_t count = whiten.size(0), square = whiten.size(1) * whiten.size(1);
  args.n = static_cast<int>(whiten.size(1));
  const std::optional<Tensor> memory = scratch(whiten, count, args.n);
  args.gate = gate ? doubles(*gate, 1) : nullptr;
  args.whiten = doubles(whiten, count * square), args.transport = doubles(transport, count * square);
  args.exact = packed<int>(exact, ScalarType::Int, count);
  args.scratch = data(memory), args.single = single, args.tolerance = tolerance;
  effkern::launch_rite_rebase(args, count, stream_of(whiten));
}

void check_whiten(const Tensor& whiten) {
  check(whiten.dim() == 3 && whiten.size(1) == whiten.size(2) && whiten.size(1) <= effkern::kJacobiMaxOrder,
        "whiten must be [F, r, r]");
}

void rebase_(Tensor grams, Tensor crosses, Tensor sizes, std::optional<Tensor> gate, Tensor whiten, Tensor transport,
             Tensor exact, bool single, double tolerance) {
  check_whiten(whiten);
  const torch::stable::accelerator::DeviceGuard guard(whiten.get_device_index());
  const int64_t count = whiten.size(0), square = whiten.size(1) * whiten.size(1);
  effkern::RebaseArgs args{};
  args.grams = doubles(grams, count * square), args.crosses = doubles(crosses, count * square);
  args.sizes = doubles(sizes, count);
  args.gram_step = args.cross_step = square, args.size_step = 1;
  launch_rebase(args, gate, whiten, transport, exact, single, tolerance);
}

// The same from sums per tile, [tiles, 2 r^2 + 1]: grams, crosses, sizes.
void rebase_tiles_(Tensor partial, Tensor first, Tensor gate, Tensor whiten, Tensor transport, Tensor exact, bool single,
                   double tolerance) {
  check_whiten(whiten);
  const torch::stable::accelerator::DeviceGuard guard(whiten.get_device_index());
  const int64_t count = whiten.size(0), square = whiten.size(1) * whiten.size(1);
  check(partial.dim() == 2 && partial.size(1) == 2 * square + 1, "partial must be [tiles, 2 r^2 + 1]");
  effkern::RebaseArgs args{};
  args.grams = doubles(partial, partial.numel());
  args.crosses = args.grams + square, args.sizes = args.grams + 2 * square;
  args.first = packed<int64_t>(first, ScalarType::Long, count + 1);
  args.gram_step = args.cross_step = args.size_step = 2 * square + 1;
  launch_rebase(args, gate, whiten, transport, exact, single, tolerance);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CUDA, library) {
  library.impl("lora_rite_reduce", TORCH_BOX(&reduce));
  library.impl("lora_rite_precondition_", TORCH_BOX(&precondition_));
  library.impl("lora_rite_rebase_", TORCH_BOX(&rebase_));
  library.impl("lora_rite_rebase_tiles_", TORCH_BOX(&rebase_tiles_));
}
