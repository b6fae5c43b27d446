// What the row passes of the distillation loss share: options, statistics, loops over lanes, and softmaxes.
//
//   z student logits, u teacher logits, q = softmax(z / T), p = softmax(u / T'), y label
//   L = (1 - omega) CE + omega s D(p, q) + c lse(z)^2,  s the divergence's factor
//
// A row is cut into blocks that stay in the first cache. The statistics pass finds each block's maximum and keeps
// exp(z - max) in a scratch row; later passes turn it into q by one factor per block, so that each exponential is
// taken once. Plain loops over LANES independent lanes become vector code.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/fast_exp.h"

namespace effkern {

constexpr int LANES = 32;
constexpr int64_t BLOCK = 1024;

// The scalars of effkern/ops/distill/rows.py.
struct RowOptions {
  // 1 - alpha and 1 - beta come from double: near 1, float would lose them.
  float alpha, beta, rest_alpha, rest_beta, divergence_scale, temperature, teacher_temperature, label_smoothing, z_loss, softcap, logit_scale;
  bool teacher_logprobs, reverse;
  int sparse_kind;
};

// One float per field of DistillStats, in its order.
struct RowStats {
  float loss, ce, divergence, lse, teacher_lse, label_logprob, teacher_label_logprob, entropy, teacher_entropy, hit,
      teacher_hit, gradient_ratio, agreement;
};
constexpr int NUM_STATS = sizeof(RowStats) / sizeof(float);

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

EFFKERN_INLINE float sum_lanes(const float* lanes) {
  float total = 0.0f;
  for (int l = 0; l < LANES; ++l) total += lanes[l];
  return total;
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

// The derivative of finish_logits, onto the gradient with respect to z.
EFFKERN_INLINE void chain_logits(float* g, const float* z, int64_t vocab, const RowOptions& o) {
  const float k = o.logit_scale, cap = o.softcap > 0.0f ? 1.0f / o.softcap : 0.0f;
  if (cap > 0.0f)
    for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] *= k * (1.0f - z[v] * cap * (z[v] * cap)); });
  if (cap == 0.0f && k != 1.0f) for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] *= k; });
}

EFFKERN_INLINE float block_max(const float* x, int64_t begin, int64_t end) {
  // Starts above -inf, so that a block of -inf gives exp(-inf) = 0 and not exp(nan).
  float lanes[LANES];
  for (int l = 0; l < LANES; ++l) lanes[l] = -FLT_MAX;
  for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { lanes[l] = x[v] > lanes[l] ? x[v] : lanes[l]; });
  float most = lanes[0];
  for (int l = 1; l < LANES; ++l) most = lanes[l] > most ? lanes[l] : most;
  return most;
}

EFFKERN_INLINE float block_sum(const float* x, int64_t begin, int64_t end) {
  float lanes[LANES] = {};
  for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { lanes[l] += x[v]; });
  return sum_lanes(lanes);
}

// Fetches what the next block reads while this one computes: rows come from memory, and the hardware's own
// prefetching stops at the short loops.
EFFKERN_INLINE void prefetch_lanes(const float* x) {
  for (int64_t i = 0; i < LANES; i += 64 / static_cast<int64_t>(sizeof(float))) __builtin_prefetch(x + i);
}

// out = exp((x - shift) * inverse); returns the sum.
EFFKERN_INLINE float block_exp(const float* x, float* out, int64_t begin, int64_t end, float shift, float inverse) {
  float lanes[LANES] = {};
  for (int64_t v0 = begin; v0 < end; v0 += LANES) {
    prefetch_lanes(x + v0 + BLOCK);
    for_lanes(v0, v0 + LANES < end ? v0 + LANES : end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      float e = fast_exp((x[v] - shift) * inverse);
      out[v] = e;
      lanes[l] += e;
    });
  }
  return sum_lanes(lanes);
}

// A softmax of x / T: log-sum-exp as maximum / T + log(sum).
struct Softmax {
  float inverse = 1.0f, most = 0.0f, log_sum = 0.0f;
  double sum = 1.0;

  EFFKERN_INLINE float log_prob(float x) const { return (x - most) * inverse - log_sum; }
  EFFKERN_INLINE float lse() const { return most * inverse + log_sum; }
  // From exp((x - block maximum) / T) to the probability.
  EFFKERN_INLINE float factor(float block_most) const {
    return static_cast<float>(std::exp((static_cast<double>(block_most) - most) * inverse) / sum);
  }
  // The same softmax with one entry more.
  EFFKERN_INLINE Softmax with(float x) const {
    Softmax s = *this;
    s.most = x > most ? x : most;
    s.sum = sum * std::exp((static_cast<double>(most) - s.most) * inverse) +
            std::exp((static_cast<double>(x) - s.most) * inverse);
    s.log_sum = static_cast<float>(std::log(s.sum));
    return s;
  }
};

// Per-thread working memory: exponentials of one row, and per block its bounds, maxima and sums.
struct Scratch {
  struct Block {
    int64_t begin, end;
    float max_z, max_u;
    double sum_q, sum_1, sum_p;
  };
  std::vector<float> exp_q, exp_p, exp_1, u;
  std::vector<Block> blocks;

  Scratch(int64_t vocab, bool teacher, bool tempered, bool widened)
      : exp_q(vocab), exp_p(teacher ? vocab : 0), exp_1(tempered ? vocab : 0), u(widened ? vocab : 0) {
    blocks.reserve(vocab / BLOCK + 3);
  }

  // Cuts [0, vocab) into blocks; `hole` (-1: none) is in none of them.
  void cut(int64_t vocab, int64_t hole) {
    blocks.clear();
    const auto range = [this](int64_t begin, int64_t end) {
      for (; begin < end; begin += BLOCK) blocks.push_back({begin, begin + BLOCK < end ? begin + BLOCK : end, 0, 0, 0, 0, 0});
    };
    if (hole < 0) return range(0, vocab);
    range(0, hole);
    range(hole + 1, vocab);
  }
};

EFFKERN_INLINE Softmax merge(const std::vector<Scratch::Block>& blocks, float Scratch::Block::*most,
                             double Scratch::Block::*sum, float inverse) {
  Softmax s;
  s.inverse = inverse;
  s.most = blocks[0].*most;
  for (const auto& b : blocks) s.most = b.*most > s.most ? b.*most : s.most;
  s.sum = 0.0;
  for (const auto& b : blocks) s.sum += b.*sum * std::exp((static_cast<double>(b.*most) - s.most) * inverse);
  s.log_sum = static_cast<float>(std::log(s.sum));
  return s;
}

// p x, and 0 where p = 0: x is a logarithm that may be infinite there.
EFFKERN_INLINE float times_log(float p, float x) { return select(p > 0.0f, p * x, 0.0f); }

// Terms of sum p log(p / q) + q - p with x = log p - log q: every one is non-negative. 0 log 0 = 0, and x may be
// anything where p = 0.
EFFKERN_INLINE float kl_term(float p, float q, float x) {
  return select((x < 0.5f) & (x > -0.5f), p * excess_series(x), times_log(p, x) + (q - p));
}

// What every row pass says of the hard-label side. `top`: largest student logit.
EFFKERN_INLINE void student_stats(RowStats& s, float z_label, float top, const Softmax& q, const Softmax& one) {
  s.lse = one.lse();
  s.ce = -one.log_prob(z_label);
  s.label_logprob = q.log_prob(z_label);
  s.hit = z_label >= top ? 1.0f : 0.0f;
}

EFFKERN_INLINE void finish_loss(RowStats& s, float omega, double sum_z, int64_t vocab, const RowOptions& o) {
  float hard = s.ce;
  if (o.label_smoothing > 0.0f) {
    const float mean = static_cast<float>(sum_z / static_cast<double>(vocab));
    hard = (1.0f - o.label_smoothing) * s.ce + o.label_smoothing * (s.lse - mean);
  }
  // A weight of zero switches a term off, even where it is infinite.
  s.loss = (omega < 1.0f ? (1.0f - omega) * hard : 0.0f) + (omega > 0.0f ? omega * s.divergence : 0.0f);
  if (o.z_loss > 0.0f) s.loss += o.z_loss * s.lse * s.lse;
}

// omega_t: the gradient on the label's logit over that of CE alone; `slope` is s dD / dz_y.
EFFKERN_INLINE float gradient_ratio(float slope, float ce, float omega) {
  const float miss = -std::expm1(-ce);
  const float ratio = miss > 0.0f ? -slope / miss : 0.0f;
  return (1.0f - omega) + (omega > 0.0f ? omega * ratio : 0.0f);
}

// The gradient of one row, from scratch to where the logits were.
EFFKERN_INLINE void store_grad(const float* g, float* z, int64_t vocab, bool bfloat16) {
  if (bfloat16) {
    uint16_t* out = reinterpret_cast<uint16_t*>(z);
    for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { out[v] = to_bfloat16(g[v]); });
  } else {
    for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { z[v] = g[v]; });
  }
}

}  // namespace effkern
