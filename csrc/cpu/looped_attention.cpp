// effkern::looped_attention_forward_ and looped_attention_backward_: tasks of whole groups of problems.
//
// How a batch is cut does not depend on the number of threads, and sums over tasks are added up in order.
#include "cpu/looped_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#include "cpu/clones.h"

namespace effkern {
namespace looped {

// Numbers of a row of a parameter's gradient, a whole number of the widest vectors.
constexpr int64_t padded(int64_t columns) { return (columns + kGroup - 1) / kGroup * kGroup; }

// One instruction set's.
template <typename T>
struct Kernels {
  void (*forward)(const Problem<T>&, int64_t begin, int64_t end, void* memory, T* predictions);
  void (*backward)(const Problem<T>&, int64_t begin, int64_t end, void* memory, const Gradients<T>&);
  int64_t (*bytes)(const Problem<T>&, bool backward);
};

}  // namespace looped
}  // namespace effkern

// Vectors are passed only between functions that are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define EFFKERN_LANES_NAMESPACE baseline
#define EFFKERN_LANES_TARGET
#define EFFKERN_LANES_BYTES 16
#define EFFKERN_LANES_ROWS 2
#include "cpu/looped_lanes.h"
//
#include "cpu/looped_attention_kernel.h"
#undef EFFKERN_LANES_NAMESPACE
#undef EFFKERN_LANES_TARGET
#undef EFFKERN_LANES_BYTES

#if defined(EFFKERN_HAS_CLONES) || defined(EFFKERN_CPU_CLONE)
#define EFFKERN_LANES_NAMESPACE v3
#define EFFKERN_LANES_TARGET __attribute__((target("arch=x86-64-v3")))
#define EFFKERN_LANES_BYTES 32
#include "cpu/looped_lanes.h"
//
#include "cpu/looped_attention_kernel.h"
#undef EFFKERN_LANES_NAMESPACE
#undef EFFKERN_LANES_TARGET
#undef EFFKERN_LANES_BYTES
#undef EFFKERN_LANES_ROWS

#define EFFKERN_LANES_NAMESPACE v4
#define EFFKERN_LANES_TARGET __attribute__((target("arch=x86-64-v4")))
#define EFFKERN_LANES_BYTES 64
#define EFFKERN_LANES_ROWS 4
#include "cpu/looped_lanes.h"
//
#include "cpu/looped_attention_kernel.h"
#endif

namespace effkern {
namespace looped {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <typename T>
const Kernels<T>& kernels() {
#if defined(EFFKERN_HAS_CLONES) || defined(EFFKERN_CPU_CLONE)
  const int64_t clone = cpu_clone();
  return clone == 0 ? v4::kKernels<T> : clone == 1 ? v3::kKernels<T> : baseline::kKernels<T>;
#else
  return baseline::kKernels<T>;
#endif
}

// Memory whose first byte starts a cache line.
template <typename T>
class Aligned {
 public:
  explicit Aligned(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kLine))) {}
  ~Aligned() { ::operator delete(static_cast<void*>(data_), kLine); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

// Tasks of a backward pass, each with its own sums of the parameters' gradients, and the bytes that these may take.
constexpr int64_t kTasks = 64, kSumBytes = 1 << 24;

void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, "looped_attention: ", rule); }

template <typename T>
constexpr ScalarType kType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <typename T>
T* data(const Tensor& x, std::initializer_list<int64_t> shape, const char* rule) {
  bool holds = x.scalar_type() == kType<T> && x.dim() == static_cast<int64_t>(shape.size()) && x.is_contiguous();
  int64_t i = 0;
  for (const int64_t size : shape) holds = holds && x.size(i++) == size;
  check(holds, rule);
  return static_cast<T*>(x.data_ptr());
}

template <typename T>
T* data(const Optional& x, std::initializer_list<int64_t> shape, const char* rule) {
  return x ? data<T>(*x, shape, rule) : nullptr;
}

constexpr const char* kResults = "results must be packed, of the dtype and shape of what they belong to";

Form form_of(int64_t index) {
  check(index >= 0 && index < 3, "form must be 0 (factors), 1 (primal) or 2 (dual)");
  return static_cast<Form>(index);
}

template <typename T>
Problem<T> problem_of(const Tensor& x, const Tensor& y, const Tensor& query, const Tensor& a, const Optional& steps,
                      int64_t loops, bool every_loop, Form form) {
  constexpr const char* rule = "x [B, N, D], y [B, N], query [B, M, D], preconditioner [1 or L, D, D] and steps [L] "
                               "must be packed and of one dtype, float32 or float64";
  check(x.dim() == 3 && query.dim() == 3 && a.dim() == 3 && loops >= 1, rule);
  Problem<T> p{};
  p.batch = x.size(0), p.examples = x.size(1), p.dim = x.size(2), p.queries = query.size(1), p.loops = loops;
  p.every_loop = every_loop, p.form = form;
  check(p.examples >= 1 && p.dim >= 1 && p.queries >= 1, rule);
  check(a.size(0) == 1 || (a.size(0) == loops && form == Form::kFactors),
        "a preconditioner per loop needs form factors");
  p.x = data<T>(x, {p.batch, p.examples, p.dim}, rule);
  p.y = data<T>(y, {p.batch, p.examples}, rule);
  p.query = data<T>(query, {p.batch, p.queries, p.dim}, rule);
  p.a = data<T>(a, {a.size(0), p.dim, p.dim}, rule);
  p.a_stride = a.size(0) > 1 ? p.dim * p.dim : 0;
  p.steps = data<T>(steps, {loops}, rule);
  return p;
}

// [begin, end) of problems of a task.
struct Tasks {
  int64_t count, step, batch;
  Tasks(int64_t batch, int64_t most) : batch(batch) {
    const int64_t groups = (batch + kGroup - 1) / kGroup;
    step = (groups + most - 1) / most * kGroup;
    count = step > 0 ? (batch + step - 1) / step : 0;
  }
  int64_t begin(int64_t i) const { return i * step; }
  int64_t end(int64_t i) const { return std::min(batch, (i + 1) * step); }
};

template <typename T>
void forward_as(const Problem<T>& p, const Tensor& predictions) {
  T* to = data<T>(predictions, {p.every_loop ? p.loops : 1, p.batch, p.queries}, kResults);
  const Kernels<T>& k = kernels<T>();
  const int64_t bytes = k.bytes(p, false);
  torch::stable::parallel_for(0, (p.batch + kGroup - 1) / kGroup, 1, [&](int64_t begin, int64_t end) {
    const Aligned<char> memory(bytes);
    k.forward(p, begin * kGroup, std::min(end * kGroup, p.batch), memory.get(), to);
  });
}

template <typename T>
void backward_as(const Problem<T>& p, const Tensor& grad, const Optional& grad_x, const Optional& grad_y,
                 const Optional& grad_query, const Optional& grad_a, const Optional& grad_steps) {
  check(grad_x.has_value() == grad_y.has_value() && grad_x.has_value() == grad_query.has_value(),
        "the gradients of x, y and query come together");
  const int64_t layers = p.a_stride > 0 ? p.loops : 1, d = p.dim, width = padded(d);
  Gradients<T> results{data<T>(grad, {p.every_loop ? p.loops : 1, p.batch, p.queries}, kResults),
                       data<T>(grad_x, {p.batch, p.examples, d}, kResults),
                       data<T>(grad_y, {p.batch, p.examples}, kResults),
                       data<T>(grad_query, {p.batch, p.queries, d}, kResults),
                       data<T>(grad_a, {layers, d, d}, kResults),
                       data<T>(grad_steps, {p.loops}, kResults)};
  const int64_t of_a = results.a ? layers * d * width : 0, of_steps = results.steps ? padded(p.loops) : 0;
  const int64_t sums = of_a + of_steps;
  const int64_t fit = sums > 0 ? kSumBytes / (sums * static_cast<int64_t>(sizeof(T))) : kTasks;
  const Tasks tasks(p.batch, std::max<int64_t>(8, std::min(kTasks, fit)));
  const Aligned<T> partial(tasks.count * sums);
  const Kernels<T>& k = kernels<T>();
  const int64_t bytes = k.bytes(p, true);
  torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t begin, int64_t end) {
    const Aligned<char> memory(bytes);
    for (int64_t i = begin; i < end; ++i) {
      Gradients<T> own = results;
      T* at = partial.get() + i * sums;
      std::fill_n(at, sums, T(0));
      if (own.a) own.a = at;
      if (own.steps) own.steps = at + of_a;
      k.backward(p, tasks.begin(i), tasks.end(i), memory.get(), own);
    }
  });
  const auto add_up = [&](T* to, int64_t rows, int64_t columns, int64_t row_width, int64_t offset) {
    if (!to) return;
    std::fill_n(to, rows * columns, T(0));
    for (int64_t i = 0; i < tasks.count; ++i)
      for (int64_t r = 0; r < rows; ++r) {
        const T* from = partial.get() + i * sums + offset + r * row_width;
        for (int64_t c = 0; c < columns; ++c) to[r * columns + c] += from[c];
      }
  };
  add_up(results.a, layers * d, d, width, 0);
  add_up(results.steps, 1, p.loops, 0, of_a);
}

bool is_float(const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  return x.scalar_type() == ScalarType::Float;
}

void forward(Tensor x, Tensor y, Tensor query, Tensor a, Optional steps, int64_t loops, bool every_loop,
             int64_t form, Tensor predictions) {
  if (is_float(x)) {
    forward_as(problem_of<float>(x, y, query, a, steps, loops, every_loop, form_of(form)), predictions);
  } else {
    forward_as(problem_of<double>(x, y, query, a, steps, loops, every_loop, form_of(form)), predictions);
  }
}

void backward(Tensor grad, Tensor x, Tensor y, Tensor query, Tensor a, Optional steps, int64_t loops, bool every_loop,
              int64_t form, Optional grad_x, Optional grad_y, Optional grad_query, Optional grad_a,
              Optional grad_steps) {
  if (is_float(x)) {
    backward_as(problem_of<float>(x, y, query, a, steps, loops, every_loop, form_of(form)), grad, grad_x, grad_y,
                grad_query, grad_a, grad_steps);
  } else {
    backward_as(problem_of<double>(x, y, query, a, steps, loops, every_loop, form_of(form)), grad, grad_x, grad_y,
                grad_query, grad_a, grad_steps);
  }
}

}  // namespace
}  // namespace looped
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("looped_attention_forward_", TORCH_BOX(&effkern::looped::forward));
  m.impl("looped_attention_backward_", TORCH_BOX(&effkern::looped::backward));
}
