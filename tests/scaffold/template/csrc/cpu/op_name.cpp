// effkern::op_name_fwd and _bwd for CPU tensors: the squared-ReLU gate, y = relu(g)^2 u.
//
// Every element is read once and written once. A task is a range of rows; each element is computed alone, so that the
// bits depend on neither the clone nor the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "cpu/dtypes.h"
#include "cpu/rows.h"

namespace effkern {
namespace op_name {
namespace {

using torch::stable::Tensor;

// Elements of a task: some ten microseconds.
constexpr int64_t kTask = 16384;

// A comparison with NaN is false, so that it passes through.
EFFKERN_INLINE float relu(float x) { return select(x < 0.0f, 0.0f, x); }

template <typename T>
EFFKERN_INLINE void forward_row(const T* gate, const T* up, T* out, int64_t dim) {
  for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA {
    const float r = relu(widen(gate[v]));
    store(out[v], r * r * widen(up[v]));
  });
}

template <typename T>
EFFKERN_INLINE void backward_row(const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up, int64_t dim) {
  for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA {
    const float x = widen(gate[v]), r = relu(x), g = widen(grad[v]);
    // As autograd has it: 0 where the gate is shut, even where up is infinite.
    store(grad_gate[v], select(x <= 0.0f, 0.0f, 2.0f * r * widen(up[v]) * g));
    store(grad_up[v], r * r * g);
  });
}

// GCC clones functions, not templates.
#define EFFKERN_ROWS(T)                                                                                     \
  EFFKERN_CLONES void forward_one(const T* gate, const T* up, T* out, int64_t dim) {                        \
    forward_row(gate, up, out, dim);                                                                        \
  }                                                                                                         \
  EFFKERN_CLONES void backward_one(const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up,     \
                                   int64_t dim) {                                                           \
    backward_row(gate, up, grad, grad_gate, grad_up, dim);                                                  \
  }
EFFKERN_ROWS(float)
EFFKERN_ROWS(BFloat16)
#undef EFFKERN_ROWS

void check(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 2 && like.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                      (x.size(1) <= 1 || x.stride(1) == 1) && x.scalar_type() == like.scalar_type(),
                  "op_name: tensors must be [N, D] of one shape and dtype, stride 1 along D");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "op_name: tensors must be float32 or bfloat16");
}

template <typename T>
struct View {
  T* data;
  int64_t stride;
  T* operator[](int64_t r) const { return data + r * stride; }
};

template <typename T>
View<const T> read(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0)};
}

template <typename T>
View<T> write(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0)};
}

template <class F>
void for_rows(const Tensor& x, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(x.size(1), 1));
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) f(r);
  });
}

template <typename T>
void run_forward(const Tensor& gate, const Tensor& up, const Tensor& out) {
  const View<const T> g = read<T>(gate), u = read<T>(up);
  const View<T> y = write<T>(out);
  const int64_t dim = gate.size(1);
  for_rows(gate, [&](int64_t r) { forward_one(g[r], u[r], y[r], dim); });
}

template <typename T>
void run_backward(const Tensor& gate, const Tensor& up, const Tensor& grad, const Tensor& grad_gate,
                  const Tensor& grad_up) {
  const View<const T> g = read<T>(gate), u = read<T>(up), dy = read<T>(grad);
  const View<T> dg = write<T>(grad_gate), du = write<T>(grad_up);
  const int64_t dim = gate.size(1);
  for_rows(gate, [&](int64_t r) { backward_one(g[r], u[r], dy[r], dg[r], du[r], dim); });
}

Tensor forward(Tensor gate, Tensor up) {
  check(gate, gate);
  check(up, gate);
  const Tensor out = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  if (gate.scalar_type() == ScalarType::Float) {
    run_forward<float>(gate, up, out);
  } else {
    run_forward<BFloat16>(gate, up, out);
  }
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor gate, Tensor up, Tensor grad) {
  check(gate, gate);
  check(up, gate);
  check(grad, gate);
  const Tensor grad_gate = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  const Tensor grad_up = torch::stable::new_empty(gate, {gate.size(0), gate.size(1)});
  if (gate.scalar_type() == ScalarType::Float) {
    run_backward<float>(gate, up, grad, grad_gate, grad_up);
  } else {
    run_backward<BFloat16>(gate, up, grad, grad_gate, grad_up);
  }
  return {grad_gate, grad_up};
}

}  // namespace
}  // namespace op_name
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("op_name_fwd", TORCH_BOX(&effkern::op_name::forward));
  m.impl("op_name_bwd", TORCH_BOX(&effkern::op_name::backward));
}
