// effkern::loop_similarity_fwd and _bwd for CPU tensors: cosines between the layers of adjacent blocks.
//
// A group holds L tensors of one shape, layer after layer; with blocks of k layers those of layers j, j + k, j + 2k ...
// are a chain, and each two that follow each other a pair. A task is a range of elements of a whole chain: what was read
// as the second of a pair is in the first-level cache as the first of the next, so that memory is read once. Sums of a
// task are made in float lanes, then double; tasks are added up in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/rows.h"

namespace effkern {
namespace loop_similarity {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements of a step: two tensors' share the first-level cache.
constexpr int64_t kStep = 4096;
constexpr int64_t kTask = 4 * kStep;

struct Chain {
  int64_t group, first, length;  // `first`: index of its first tensor
};

struct Task {
  int64_t chain, begin, end;
};

struct Plan {
  std::vector<Chain> chains;
  std::vector<Task> tasks;
  int64_t block;

  Plan(const std::vector<Tensor>& tensors, const std::vector<int64_t>& layers, int64_t block) : block(block) {
    int64_t first = 0;
    for (size_t g = 0; g < layers.size(); ++g) {
      STD_TORCH_CHECK(block >= 1 && layers[g] >= 2 * block && layers[g] % block == 0 &&
                          first + layers[g] <= static_cast<int64_t>(tensors.size()),
                      "loop_similarity: a group must have a multiple of `block` layers, two blocks at least");
      const Tensor& like = tensors[first];
      for (int64_t l = 0; l < layers[g]; ++l) {
        const Tensor& x = tensors[first + l];
        STD_TORCH_CHECK(x.is_contiguous() && x.numel() == like.numel() && x.scalar_type() == like.scalar_type() &&
                            (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16),
                        "loop_similarity: tensors of a group must be contiguous, of one size, float32 or bfloat16");
      }
      for (int64_t j = 0; j < block; ++j) {
        for (int64_t begin = 0; begin < like.numel(); begin += kTask)
          tasks.push_back({static_cast<int64_t>(chains.size()), begin, std::min(begin + kTask, like.numel())});
        chains.push_back({static_cast<int64_t>(g), first + j, layers[g] / block});
      }
      first += layers[g];
    }
    STD_TORCH_CHECK(first == static_cast<int64_t>(tensors.size()), "loop_similarity: layers must add up to all tensors");
  }
};

// Adds u v to dot and v v to square; u may be missing.
template <typename T>
EFFKERN_INLINE void accumulate(const T* u, const T* v, int64_t begin, int64_t end, double& square, double& dot) {
  float squares[kLanes] = {}, dots[kLanes] = {};
  if (u) {
    for_lanes(begin, end, [&](int l, int64_t i) EFFKERN_LAMBDA {
      const float x = widen(v[i]);
      squares[l] += x * x;
      dots[l] += x * widen(u[i]);
    });
  } else {
    for_lanes(begin, end, [&](int l, int64_t i) EFFKERN_LAMBDA {
      const float x = widen(v[i]);
      squares[l] += x * x;
    });
  }
  square += sum_lanes(squares);
  dot += sum_lanes(dots);
}

// `tensors`: those of a chain, in order; `sums`: a square and a dot (with the tensor before) for each.
template <typename T>
EFFKERN_INLINE void forward_task(const void* const* tensors, int64_t length, int64_t begin, int64_t end, double* sums) {
  for (int64_t step = begin; step < end; step += kStep) {
    const int64_t last = std::min(step + kStep, end);
    const T* before = nullptr;
    for (int64_t i = 0; i < length; ++i) {
      const T* now = static_cast<const T*>(tensors[i]);
      accumulate(before, now, step, last, sums[2 * i], sums[2 * i + 1]);
      before = now;
    }
  }
}

// out_i = a x_(i-1) + b x_i + c x_(i+1), `factors` a, b, c of each; nothing where `out` has no memory.
template <typename T>
EFFKERN_INLINE void backward_task(const void* const* tensors, void* const* out, int64_t length, int64_t begin,
                                  int64_t end, const float* factors) {
  for (int64_t step = begin; step < end; step += kStep) {
    const int64_t last = std::min(step + kStep, end);
    for (int64_t i = 0; i < length; ++i) {
      T* to = static_cast<T*>(out[i]);
      if (to == nullptr) continue;
      const T* now = static_cast<const T*>(tensors[i]);
      // A chain has two tensors at least.
      const T* before = static_cast<const T*>(i > 0 ? tensors[i - 1] : tensors[i + 1]);
      const T* after = static_cast<const T*>(i + 1 < length ? tensors[i + 1] : tensors[i - 1]);
      const float a = factors[3 * i], b = factors[3 * i + 1], c = factors[3 * i + 2];
      if (i > 0 && i + 1 < length) {
        for_lanes(step, last, [&](int, int64_t v) EFFKERN_LAMBDA {
          store(to[v], a * widen(before[v]) + b * widen(now[v]) + c * widen(after[v]));
        });
      } else {
        const T* other = i > 0 ? before : after;
        const float of_other = i > 0 ? a : c;
        for_lanes(step, last, [&](int, int64_t v) EFFKERN_LAMBDA {
          store(to[v], of_other * widen(other[v]) + b * widen(now[v]));
        });
      }
    }
  }
}

// GCC clones functions, not templates.
#define EFFKERN_TASKS(T)                                                                                         \
  EFFKERN_CLONES void forward_tasks(T, const void* const* tensors, int64_t length, int64_t begin, int64_t end,   \
                                    double* sums) {                                                              \
    forward_task<T>(tensors, length, begin, end, sums);                                                          \
  }                                                                                                              \
  EFFKERN_CLONES void backward_tasks(T, const void* const* tensors, void* const* out, int64_t length,            \
                                     int64_t begin, int64_t end, const float* factors) {                         \
    backward_task<T>(tensors, out, length, begin, end, factors);                                                 \
  }
EFFKERN_TASKS(float)
EFFKERN_TASKS(BFloat16)
#undef EFFKERN_TASKS

std::tuple<Tensor, Tensor> forward(std::vector<Tensor> tensors, std::vector<int64_t> layers, int64_t block) {
  const Plan plan(tensors, layers, block);
  const int64_t count = static_cast<int64_t>(tensors.size()), num_tasks = static_cast<int64_t>(plan.tasks.size());
  int64_t longest = 0;
  for (const Chain& chain : plan.chains) longest = std::max(longest, chain.length);
  std::vector<double> partial(num_tasks * longest * 2);
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t first, int64_t last) {
    std::vector<const void*> pointers(longest);
    for (int64_t t = first; t < last; ++t) {
      const Task& task = plan.tasks[t];
      const Chain& chain = plan.chains[task.chain];
      for (int64_t i = 0; i < chain.length; ++i) pointers[i] = tensors[chain.first + i * block].const_data_ptr();
      double* sums = partial.data() + t * longest * 2;
      if (tensors[chain.first].scalar_type() == ScalarType::Float) {
        forward_tasks(float(), pointers.data(), chain.length, task.begin, task.end, sums);
      } else {
        forward_tasks(BFloat16(), pointers.data(), chain.length, task.begin, task.end, sums);
      }
    }
  });
  std::vector<double> squares(count), dots(count);
  for (int64_t t = 0; t < num_tasks; ++t) {
    const Chain& chain = plan.chains[plan.tasks[t].chain];
    for (int64_t i = 0; i < chain.length; ++i) {
      squares[chain.first + i * block] += partial[(t * longest + i) * 2];
      dots[chain.first + i * block] += partial[(t * longest + i) * 2 + 1];
    }
  }
  const Tensor values = torch::stable::new_empty(tensors[0], {static_cast<int64_t>(layers.size())}, ScalarType::Float);
  const Tensor factors = torch::stable::new_empty(tensors[0], {count, 3}, ScalarType::Double);
  float* value = static_cast<float*>(values.data_ptr());
  double* factor = static_cast<double*>(factors.data_ptr());
  std::fill_n(factor, 3 * count, 0.0);
  std::vector<double> sums(layers.size());
  for (const Chain& chain : plan.chains) {
    const double weight = 1.0 / static_cast<double>(layers[chain.group] - block);
    for (int64_t i = 0; i + 1 < chain.length; ++i) {
      const int64_t u = chain.first + i * block, v = u + block;
      // A tensor of zeros is like no other, and moves nothing.
      if (squares[u] == 0.0 || squares[v] == 0.0) continue;
      const double inverse = 1.0 / (std::sqrt(squares[u]) * std::sqrt(squares[v])), cosine = dots[v] * inverse;
      sums[chain.group] += weight * cosine;
      factor[3 * u + 2] += weight * inverse;
      factor[3 * u + 1] -= weight * cosine / squares[u];
      factor[3 * v] += weight * inverse;
      factor[3 * v + 1] -= weight * cosine / squares[v];
    }
  }
  for (size_t g = 0; g < layers.size(); ++g) value[g] = static_cast<float>(sums[g]);
  return {values, factors};
}

std::vector<Tensor> backward(std::vector<Tensor> tensors, Tensor factors, Tensor grad_values,
                             std::vector<int64_t> layers, int64_t block, std::vector<int64_t> wanted) {
  const Plan plan(tensors, layers, block);
  const int64_t count = static_cast<int64_t>(tensors.size()), num_tasks = static_cast<int64_t>(plan.tasks.size());
  STD_TORCH_CHECK(factors.scalar_type() == ScalarType::Double && factors.numel() == 3 * count &&
                      factors.is_contiguous() && grad_values.scalar_type() == ScalarType::Float &&
                      grad_values.numel() == static_cast<int64_t>(layers.size()) && grad_values.is_contiguous() &&
                      static_cast<int64_t>(wanted.size()) == count,
                  "loop_similarity: factors must be float64 [tensors, 3], grad_values float32 [groups]");
  const double* factor = static_cast<const double*>(factors.const_data_ptr());
  const float* grad = static_cast<const float*>(grad_values.const_data_ptr());
  std::vector<float> scaled(3 * count);
  for (const Chain& chain : plan.chains)
    for (int64_t i = 0; i < chain.length; ++i)
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t at = 3 * (chain.first + i * block) + j;
        scaled[at] = static_cast<float>(factor[at] * grad[chain.group]);
      }
  std::vector<Tensor> grads;
  for (int64_t t = 0; t < count; ++t)
    grads.push_back(wanted[t] ? torch::stable::empty_like(tensors[t]) : torch::stable::new_empty(tensors[t], {0}));
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const Task& task = plan.tasks[t];
      const Chain& chain = plan.chains[task.chain];
      std::vector<const void*> pointers;
      std::vector<void*> out;
      std::vector<float> of_chain;
      for (int64_t i = 0; i < chain.length; ++i) {
        const int64_t at = chain.first + i * block;
        pointers.push_back(tensors[at].const_data_ptr());
        out.push_back(wanted[at] ? grads[at].data_ptr() : nullptr);
        of_chain.insert(of_chain.end(), {scaled[3 * at], scaled[3 * at + 1], scaled[3 * at + 2]});
      }
      if (tensors[chain.first].scalar_type() == ScalarType::Float) {
        backward_tasks(float(), pointers.data(), out.data(), chain.length, task.begin, task.end, of_chain.data());
      } else {
        backward_tasks(BFloat16(), pointers.data(), out.data(), chain.length, task.begin, task.end, of_chain.data());
      }
    }
  });
  return grads;
}

}  // namespace
}  // namespace loop_similarity
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("loop_similarity_fwd", TORCH_BOX(&effkern::loop_similarity::forward));
  m.impl("loop_similarity_bwd", TORCH_BOX(&effkern::loop_similarity::backward));
}
