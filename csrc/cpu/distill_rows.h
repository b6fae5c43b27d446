// The row pass of the distillation loss: one row of logits in, its statistics and its logit gradient out.
//
//   z student logits, u teacher logits, q = softmax(z / T), p = softmax(u / T'), y label
//   L = (1 - omega) CE + omega D(p, q) + c lse(z)^2
//
// Two passes over the row, cut into blocks that stay in the first cache. The first finds the block's maxima and
// keeps exp(z - max), exp(u - max) in scratch rows; the second turns them into q and p by one factor per block,
// so that each exponential is taken once. Plain loops over LANES independent lanes become vector code.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "fast_exp.h"

namespace effkern {

constexpr int LANES = 32;
constexpr int64_t BLOCK = 1024;

struct RowOptions {
  float temperature, teacher_temperature, label_smoothing, z_loss, softcap, logit_scale;
  bool grad_bfloat16;
};

// One float per field of DistillStats, in its order.
struct RowStats {
  float loss, ce, divergence, lse, teacher_lse, label_logprob, teacher_label_logprob, entropy, teacher_entropy, hit,
      teacher_hit;
};
constexpr int NUM_STATS = sizeof(RowStats) / sizeof(float);

// Per-thread working memory: exponentials of one row, and per block its maximum and its factor.
struct Scratch {
  int64_t blocks;
  std::vector<float> exp_q, exp_p, exp_1, max_z, max_u;
  Scratch(int64_t vocab, bool teacher, bool tempered)
      : blocks((vocab + BLOCK - 1) / BLOCK),
        exp_q(vocab),
        exp_p(teacher ? vocab : 0),
        exp_1(tempered ? vocab : 0),
        max_z(blocks),
        max_u(blocks) {}
};

EFFKERN_INLINE float widen(float value) { return value; }
EFFKERN_INLINE float widen(uint16_t value) { return from_bfloat16(value); }

EFFKERN_INLINE float sum_lanes(const float* lanes) {
  float total = 0.0f;
  for (int l = 0; l < LANES; ++l) total += lanes[l];
  return total;
}

// Calls f(lane, index) for [begin, end): full groups of lanes first, then the rest.
template <class F>
EFFKERN_INLINE void for_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t v = begin;
  for (; v + LANES <= end; v += LANES) {
#pragma GCC ivdep
    for (int l = 0; l < LANES; ++l) f(l, v + l);
  }
  for (int l = 0; v + l < end; ++l) f(l, v + l);
}

// Bias, scale and softcap of the student, in place: z = c tanh(k (raw + bias) / c).
EFFKERN_INLINE void finish_logits(float* z, const float* bias, int64_t vocab, const RowOptions& o) {
  const float k = o.logit_scale;
  if (bias) for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { z[v] = (z[v] + bias[v]) * k; });
  if (!bias && k != 1.0f) for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { z[v] *= k; });
  if (o.softcap > 0.0f) {
    const float c = o.softcap, inverse = 1.0f / o.softcap;
    for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { z[v] = c * fast_tanh(z[v] * inverse); });
  }
}

template <class T>
EFFKERN_INLINE float block_max(const T* x, int64_t begin, int64_t end) {
  // Starts above -inf, so that a block of -inf gives exp(-inf) = 0 and not exp(nan).
  float lanes[LANES];
  for (int l = 0; l < LANES; ++l) lanes[l] = -FLT_MAX;
  for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA {
    float value = widen(x[v]);
    lanes[l] = value > lanes[l] ? value : lanes[l];
  });
  float most = lanes[0];
  for (int l = 1; l < LANES; ++l) most = lanes[l] > most ? lanes[l] : most;
  return most;
}

// Fetches what the next block reads while this one computes: rows come from memory, and the hardware's own
// prefetching stops at the short loops.
template <class T>
EFFKERN_INLINE void prefetch_lanes(const T* x) {
  for (int64_t byte = 0; byte < LANES * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(x) + byte);
}

// out = exp((x - shift) * inverse_temperature); returns the sum.
template <class T>
EFFKERN_INLINE float block_exp(const T* x, float* out, int64_t begin, int64_t end, float shift, float inverse) {
  float lanes[LANES] = {};
  for (int64_t v0 = begin; v0 < end; v0 += LANES) {
    prefetch_lanes(x + v0 + BLOCK);
    for_lanes(v0, v0 + LANES < end ? v0 + LANES : end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      float e = fast_exp((widen(x[v]) - shift) * inverse);
      out[v] = e;
      lanes[l] += e;
    });
  }
  return sum_lanes(lanes);
}

// A softmax in progress: log-sum-exp of x / T as maximum / T + log(sum).
struct Softmax {
  float inverse = 1.0f, most = 0.0f, log_sum = 0.0f;
  double sum = 0.0;

  EFFKERN_INLINE float log_prob(float x) const { return (x - most) * inverse - log_sum; }
  EFFKERN_INLINE float lse() const { return most * inverse + log_sum; }
  // From exp((x - block maximum) / T) to the probability.
  EFFKERN_INLINE float factor(float block_most) const {
    return static_cast<float>(std::exp((static_cast<double>(block_most) - most) * inverse) / sum);
  }
};

EFFKERN_INLINE Softmax merge(const float* maxima, const double* sums, int64_t blocks, float inverse) {
  Softmax s;
  s.inverse = inverse;
  s.most = maxima[0];
  for (int64_t b = 1; b < blocks; ++b) s.most = maxima[b] > s.most ? maxima[b] : s.most;
  for (int64_t b = 0; b < blocks; ++b)
    s.sum += sums[b] * std::exp((static_cast<double>(maxima[b]) - s.most) * inverse);
  s.log_sum = static_cast<float>(std::log(s.sum));
  return s;
}

// The divergences whose gradient needs one statistics pass and one gradient pass. To add one: value and gradient.
struct ForwardKL {
  // p (log p - log q) + q - p, whose sum is the divergence; x = log p - log q, anything where p = 0.
  static EFFKERN_INLINE float value(float p, float q, float x) {
    // p (x + exp(-x) - 1) by its series where the plain form would cancel.
    float s = 2.48015873e-5f;
    s = s * x - 1.98412698e-4f;
    s = s * x + 1.38888889e-3f;
    s = s * x - 8.33333333e-3f;
    s = s * x + 4.16666667e-2f;
    s = s * x - 1.66666667e-1f;
    s = s * x + 0.5f;
    float near = p * x * x * s;
    float far = (p > 0.0f ? p * x : 0.0f) + (q - p);
    return (x < 0.5f) & (x > -0.5f) ? near : far;
  }
  // d D / d (z / T)
  static EFFKERN_INLINE float grad(float p, float q) { return q - p; }
};

// U: float, uint16_t (bfloat16 bits), or void for no teacher. Tempered: T != 1, so that CE has a softmax of its own.
template <class Divergence, class U, bool Tempered, bool Grad>
EFFKERN_INLINE RowStats row_pass(float* z, const U* u, const float* bias, int64_t vocab, int64_t label, float scale,
                                 float omega, const RowOptions& o, Scratch& scratch) {
  constexpr bool Teacher = !std::is_void<U>::value;
  float* exp_q = scratch.exp_q.data();
  float* exp_p = scratch.exp_p.data();
  float* exp_1 = scratch.exp_1.data();
  finish_logits(z, bias, vocab, o);

  std::vector<double> sums(3 * scratch.blocks);
  double *sum_q = sums.data(), *sum_p = sum_q + scratch.blocks, *sum_1 = sum_p + scratch.blocks;
  const float inverse_q = 1.0f / o.temperature, inverse_p = 1.0f / o.teacher_temperature;
  double sum_z = 0.0;
  for (int64_t b = 0; b < scratch.blocks; ++b) {
    const int64_t begin = b * BLOCK, end = begin + BLOCK < vocab ? begin + BLOCK : vocab;
    scratch.max_z[b] = block_max(z, begin, end);
    sum_q[b] = block_exp(z, exp_q, begin, end, scratch.max_z[b], inverse_q);
    if constexpr (Tempered) sum_1[b] = block_exp(z, exp_1, begin, end, scratch.max_z[b], 1.0f);
    if constexpr (Teacher) {
      scratch.max_u[b] = block_max(u, begin, end);
      sum_p[b] = block_exp(u, exp_p, begin, end, scratch.max_u[b], inverse_p);
    }
    if (o.label_smoothing > 0.0f) {
      float lanes[LANES] = {};
      for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { lanes[l] += z[v]; });
      sum_z += sum_lanes(lanes);
    }
  }
  const Softmax soft_q = merge(scratch.max_z.data(), sum_q, scratch.blocks, inverse_q);
  const Softmax soft_1 = Tempered ? merge(scratch.max_z.data(), sum_1, scratch.blocks, 1.0f) : soft_q;
  Softmax soft_p;
  if constexpr (Teacher) soft_p = merge(scratch.max_u.data(), sum_p, scratch.blocks, inverse_p);

  RowStats stats = {};
  const float z_label = z[label];
  stats.lse = soft_1.lse();
  stats.ce = -soft_1.log_prob(z_label);
  stats.label_logprob = soft_q.log_prob(z_label);
  stats.hit = z_label >= soft_q.most ? 1.0f : 0.0f;
  if constexpr (Teacher) {
    const float u_label = widen(u[label]);
    stats.teacher_lse = soft_p.lse();
    stats.teacher_label_logprob = soft_p.log_prob(u_label);
    stats.teacher_hit = u_label >= soft_p.most ? 1.0f : 0.0f;
  }

  // The gradient is hard (q1 - target) + soft dD + zed q1, times the chain of scale and softcap.
  const float hard = scale * (1.0f - omega), soft = scale * omega * inverse_q;
  const float zed = scale * 2.0f * o.z_loss * stats.lse;
  const float smooth = hard * o.label_smoothing / static_cast<float>(vocab);
  const float cap = o.softcap > 0.0f ? 1.0f / o.softcap : 0.0f;
  const bool mixed = omega > 0.0f;
  double divergence = 0.0, entropy_q = 0.0, entropy_p = 0.0;
  for (int64_t b = 0; b < scratch.blocks; ++b) {
    const int64_t begin = b * BLOCK, end = begin + BLOCK < vocab ? begin + BLOCK : vocab;
    const float factor_q = soft_q.factor(scratch.max_z[b]);
    // Copies, so that the loop sees constants and not memory that its stores might change.
    const Softmax lq = soft_q, lp = soft_p;
    const float factor_1 = Tempered ? soft_1.factor(scratch.max_z[b]) : factor_q;
    [[maybe_unused]] const float factor_p = Teacher ? soft_p.factor(scratch.max_u[b]) : 0.0f;
    float value[LANES] = {}, q_log_q[LANES] = {}, p_log_p[LANES] = {};
    for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      const float q = exp_q[v] * factor_q;
      const float a = lq.log_prob(z[v]);
      q_log_q[l] += q > 0.0f ? q * a : 0.0f;
      [[maybe_unused]] const float q1 = Tempered ? exp_1[v] * factor_1 : q;
      [[maybe_unused]] float g = (hard + zed) * q1 - smooth;
      if constexpr (Teacher) {
        const float p = exp_p[v] * factor_p;
        const float log_p = lp.log_prob(widen(u[v]));
        p_log_p[l] += p > 0.0f ? p * log_p : 0.0f;
        value[l] += Divergence::value(p, q, log_p - a);
        if constexpr (Grad) g += mixed ? soft * Divergence::grad(p, q) : 0.0f;
      }
      if constexpr (Grad) exp_q[v] = g;
    });
    divergence += sum_lanes(value);
    entropy_q += sum_lanes(q_log_q);
    entropy_p += sum_lanes(p_log_p);
  }
  stats.divergence = static_cast<float>(divergence);
  stats.entropy = static_cast<float>(-entropy_q);
  stats.teacher_entropy = static_cast<float>(-entropy_p);

  float hard_loss = stats.ce;
  if (o.label_smoothing > 0.0f) {
    const float mean = static_cast<float>(sum_z / static_cast<double>(vocab));
    hard_loss = (1.0f - o.label_smoothing) * stats.ce + o.label_smoothing * (stats.lse - mean);
  }
  stats.loss = (omega < 1.0f ? (1.0f - omega) * hard_loss : 0.0f) + (mixed ? omega * stats.divergence : 0.0f);
  if (o.z_loss > 0.0f) stats.loss += o.z_loss * stats.lse * stats.lse;

  if constexpr (Grad) {
    exp_q[label] -= hard * (1.0f - o.label_smoothing);
    const float k = o.logit_scale;
    if (cap > 0.0f) for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { exp_q[v] *= k * (1.0f - z[v] * cap * (z[v] * cap)); });
    if (cap == 0.0f && k != 1.0f) for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { exp_q[v] *= k; });
    if (o.grad_bfloat16) {
      uint16_t* out = reinterpret_cast<uint16_t*>(z);
      for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { out[v] = to_bfloat16(exp_q[v]); });
    } else {
      for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { z[v] = exp_q[v]; });
    }
  }
  return stats;
}

}  // namespace effkern
