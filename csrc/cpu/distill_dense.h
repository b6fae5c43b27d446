// The row pass of a dense teacher: one row of both models' logits in, statistics and logit gradient out.
#pragma once

#include "cpu/distill_chunk.h"
#include "cpu/distill_divergences.h"
#include "cpu/widen.h"

namespace effkern {

// One row: the student's logits (finished in place, then overwritten by the gradient), the teacher's, and scalars.
struct DenseRow {
  float* z;
  const float* u;
  int64_t vocab, label;
  float scale, omega;
};

// Both softmaxes of a row. `rest_*` are those off the label where a divergence asks for them, else the same.
struct DenseSoftmaxes {
  Softmax q, one, p, rest_q, rest_p;
};

template <class D>
EFFKERN_INLINE DenseSoftmaxes dense_statistics(const DenseRow& row, const RowOptions& o, Scratch& s, RowFacts& facts,
                                               double& sum_z) {
  const float* z = row.z;
  const float* u = row.u;
  const bool tempered = o.temperature != 1.0f;
  const float inverse_q = 1.0f / o.temperature;
  const float inverse_p = o.teacher_logprobs ? 1.0f : 1.0f / o.teacher_temperature;
  double reverse = 0.0;
  s.cut(row.vocab, D::label_apart ? row.label : -1);
  std::vector<double> cross(D::needs_reverse ? s.blocks.size() : 0);
  sum_z = D::label_apart ? z[row.label] : 0.0;
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    auto& b = s.blocks[i];
    b.max_z = block_max(z, b.begin, b.end);
    b.sum_q = block_exp(z, s.exp_q.data(), b.begin, b.end, b.max_z, inverse_q);
    if (tempered) b.sum_1 = block_exp(z, s.exp_1.data(), b.begin, b.end, b.max_z, 1.0f);
    b.max_u = block_max(u, b.begin, b.end);
    b.sum_p = block_exp(u, s.exp_p.data(), b.begin, b.end, b.max_u, inverse_p);
    if constexpr (D::needs_reverse) {
      const float* e = s.exp_q.data();
      const float max_z = b.max_z, max_u = b.max_u;
      float lanes[LANES] = {};
      for_lanes(b.begin, b.end, [&](int l, int64_t v) EFFKERN_LAMBDA {
        const float gap = (z[v] - max_z) * inverse_q - (u[v] - max_u) * inverse_p;
        lanes[l] += e[v] > 0.0f ? e[v] * gap : 0.0f;
      });
      cross[i] = sum_lanes(lanes);
    }
    if (o.label_smoothing > 0.0f) sum_z += block_sum(z, b.begin, b.end);
  }
  DenseSoftmaxes x;
  x.rest_q = merge(s.blocks, &Scratch::Block::max_z, &Scratch::Block::sum_q, inverse_q);
  x.rest_p = merge(s.blocks, &Scratch::Block::max_u, &Scratch::Block::sum_p, inverse_p);
  const Softmax rest_1 = tempered ? merge(s.blocks, &Scratch::Block::max_z, &Scratch::Block::sum_1, 1.0f) : x.rest_q;
  x.q = D::label_apart ? x.rest_q.with(z[row.label]) : x.rest_q;
  x.one = D::label_apart ? rest_1.with(z[row.label]) : rest_1;
  x.p = D::label_apart ? x.rest_p.with(u[row.label]) : x.rest_p;
  if (o.teacher_logprobs) {
    facts.mass = std::exp(static_cast<double>(x.p.lse()));
    x.p = x.rest_p = Softmax();
  }
  if constexpr (D::needs_reverse) {
    for (size_t i = 0; i < s.blocks.size(); ++i) {
      const auto& b = s.blocks[i];
      const double share = std::exp((static_cast<double>(b.max_z) - x.q.most) * inverse_q) / x.q.sum;
      // log q - log p = gap + the maxima's part of it.
      const double offset = (static_cast<double>(b.max_z) - x.q.most) * inverse_q - std::log(x.q.sum) -
                            (static_cast<double>(b.max_u) - x.p.most) * inverse_p + std::log(x.p.sum);
      if (share > 0.0) reverse += share * (cross[i] + b.sum_q * offset);
    }
    facts.reverse = reverse;
  }
  facts.vocab = row.vocab;
  return x;
}

// Label against rest: probabilities and the binary divergence, from the odds, so that nothing cancels.
EFFKERN_INLINE void apart_facts(const DenseRow& row, const DenseSoftmaxes& x, RowFacts& facts) {
  // Around the rest's maximum: as a float, the log-sum-exp of large logits has lost its fraction.
  const auto odds = [](double x, const Softmax& rest) { return (x - rest.most) * rest.inverse - rest.log_sum; };
  const double odds_q = odds(row.z[row.label], x.rest_q), odds_p = odds(row.u[row.label], x.rest_p);
  const auto log_sigmoid = [](double t) { return t < 0.0 ? t - std::log1p(std::exp(t)) : -std::log1p(std::exp(-t)); };
  const auto term = [](double p, double log_p, double log_q) { return p > 0.0 ? p * (log_p - log_q) : 0.0; };
  facts.q_label = std::exp(log_sigmoid(odds_q));
  facts.p_label = std::exp(log_sigmoid(odds_p));
  facts.binary = term(facts.p_label, log_sigmoid(odds_p), log_sigmoid(odds_q)) +
                 term(std::exp(log_sigmoid(-odds_p)), log_sigmoid(-odds_p), log_sigmoid(-odds_q));
}

template <class D>
EFFKERN_INLINE void logit_facts(const DenseRow& row, const Scratch& s, RowFacts& facts) {
  const float *z = row.z, *u = row.u;
  double sum_z = 0.0, sum_u = 0.0;
  if constexpr (D::centred) {
    for (const auto& b : s.blocks) {
      sum_z += block_sum(z, b.begin, b.end);
      sum_u += block_sum(u, b.begin, b.end);
    }
    facts.mean_z = sum_z / static_cast<double>(row.vocab);
    facts.mean_u = sum_u / static_cast<double>(row.vocab);
  }
  const float mean_z = static_cast<float>(facts.mean_z), mean_u = static_cast<float>(facts.mean_u);
  for (const auto& b : s.blocks) {
    float zz[LANES] = {}, uu[LANES] = {}, zu[LANES] = {};
    for_lanes(b.begin, b.end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      const float d = z[v] - mean_z, e = u[v] - mean_u;
      zz[l] += d * d;
      uu[l] += e * e;
      zu[l] += d * e;
    });
    facts.zz += sum_lanes(zz);
    facts.uu += sum_lanes(uu);
    facts.zu += sum_lanes(zu);
  }
}

// s dD / dz of the label.
template <class D>
EFFKERN_INLINE float label_slope(const DenseRow& row, const DenseSoftmaxes& x, const RowFacts& facts, const D& d,
                                 float total, const RowOptions& o) {
  const float s = o.divergence_scale / o.temperature;
  if constexpr (D::label_apart) return s * o.alpha * static_cast<float>(facts.q_label - facts.p_label);
  const float z = row.z[row.label], u = row.u[row.label];
  const float a = x.q.log_prob(z), b = x.p.log_prob(u);
  Entry e = {};
  e.p = fast_exp(b), e.q = fast_exp(a), e.log_p = b, e.log_q = a, e.z = z, e.u = u;
  d.prepare(e);
  return s * (d.weight(e) - e.q * total);
}

template <class D, bool Grad>
EFFKERN_INLINE RowStats dense_row(const DenseRow& row, const RowOptions& o, Scratch& s) {
  const float *z = row.z, *u = row.u;
  const bool tempered = o.temperature != 1.0f;
  RowFacts facts;
  double sum_z = 0.0;
  const DenseSoftmaxes x = dense_statistics<D>(row, o, s, facts, sum_z);
  if constexpr (D::label_apart) apart_facts(row, x, facts);
  if constexpr (D::on_logits) logit_facts<D>(row, s, facts);
  const D divergence(facts, o);

  RowStats stats = {};
  float top_z = x.rest_q.most, top_u = s.blocks[0].max_u;
  for (const auto& b : s.blocks) top_u = b.max_u > top_u ? b.max_u : top_u;
  const float z_label = z[row.label], u_label = u[row.label];
  if constexpr (D::label_apart) {
    top_z = z_label > top_z ? z_label : top_z;
    top_u = u_label > top_u ? u_label : top_u;
  }
  student_stats(stats, z_label, top_z, x.q, x.one);
  stats.teacher_lse = o.teacher_logprobs ? static_cast<float>(std::log(facts.mass)) : x.p.lse();
  stats.teacher_label_logprob = x.p.log_prob(u_label);
  stats.teacher_hit = u_label >= top_u ? 1.0f : 0.0f;

  // The gradient is hard (q1 - target) + soft (w - q W) + zed q1, times the chain of scale and softcap.
  const float hard = row.scale * (1.0f - row.omega);
  const float soft = row.scale * row.omega * o.divergence_scale / o.temperature;
  const float zed = row.scale * 2.0f * o.z_loss * stats.lse;
  const float smooth = hard * o.label_smoothing / static_cast<float>(row.vocab);
  const bool mixed = row.omega > 0.0f;
  float* exp_q = s.exp_q.data();
  float* exp_p = s.exp_p.data();
  const float* exp_1 = tempered ? s.exp_1.data() : exp_q;
  double value = 0.0, entropy_q = 0.0, entropy_p = 0.0, total = divergence.total;
  float agree = 0.0f;
  for (const auto& b : s.blocks) {
    const float factor_q = x.q.factor(b.max_z), factor_p = x.p.factor(b.max_u);
    const float factor_1 = tempered ? x.one.factor(b.max_z) : factor_q;
    const float rest_q = x.rest_q.factor(b.max_z), rest_p = x.rest_p.factor(b.max_u);
    // Copies, so that the loop sees constants and not memory that its stores might change.
    const Softmax lq = x.q, lp = x.p, rq = x.rest_q, rp = x.rest_p;
    const D d = divergence;
    float values[LANES] = {}, q_log_q[LANES] = {}, p_log_p[LANES] = {}, weights[LANES] = {}, both[LANES] = {};
    for_lanes(b.begin, b.end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      Entry e;
      e.z = z[v];
      e.u = u[v];
      e.q = exp_q[v] * factor_q;
      e.p = exp_p[v] * factor_p;
      e.log_q = lq.log_prob(e.z);
      e.log_p = lp.log_prob(e.u);
      q_log_q[l] += times_log(e.q, e.log_q);
      p_log_p[l] += times_log(e.p, e.log_p);
      both[l] += select((e.z == top_z) & (e.u == top_u), 1.0f, 0.0f);
      [[maybe_unused]] const float q1 = exp_1[v] * factor_1;
      if constexpr (D::label_apart) {
        e.q = exp_q[v] * rest_q;
        e.p = exp_p[v] * rest_p;
        e.log_q = rq.log_prob(e.z);
        e.log_p = rp.log_prob(e.u);
      }
      d.prepare(e);
      values[l] += d.value(e);
      const float w = d.weight(e);
      if constexpr (D::sums_weights) {
        weights[l] += w;
        exp_p[v] = w;
      } else if constexpr (Grad) {
        float g = (hard + zed) * q1 - smooth;
        g += mixed ? soft * (D::on_logits ? w : w - e.q * d.total) : 0.0f;
        exp_q[v] = g;
      }
    });
    value += sum_lanes(values);
    entropy_q += sum_lanes(q_log_q);
    entropy_p += sum_lanes(p_log_p);
    total += sum_lanes(weights);
    agree += sum_lanes(both);
  }
  if constexpr (D::sums_weights && Grad) {
    const float sum = static_cast<float>(total);
    for (const auto& b : s.blocks) {
      const float factor_q = x.q.factor(b.max_z), factor_1 = tempered ? x.one.factor(b.max_z) : factor_q;
      for_lanes(b.begin, b.end, [&](int, int64_t v) EFFKERN_LAMBDA {
        float g = (hard + zed) * (exp_1[v] * factor_1) - smooth;
        g += mixed ? soft * (exp_p[v] - exp_q[v] * factor_q * sum) : 0.0f;
        exp_q[v] = g;
      });
    }
  }
  if constexpr (D::label_apart) {
    const float q = static_cast<float>(facts.q_label), p = static_cast<float>(facts.p_label);
    entropy_q += q > 0.0f ? q * x.q.log_prob(z_label) : 0.0f;
    entropy_p += p > 0.0f ? p * x.p.log_prob(u_label) : 0.0f;
    agree += (z_label == top_z) & (u_label == top_u) ? 1.0f : 0.0f;
  }
  const float slope = label_slope(row, x, facts, divergence, static_cast<float>(total), o);
  stats.divergence = o.divergence_scale * static_cast<float>(divergence.finish(value));
  stats.entropy = static_cast<float>(-entropy_q);
  stats.teacher_entropy = static_cast<float>(-entropy_p);
  stats.agreement = agree > 0.0f ? 1.0f : 0.0f;
  stats.gradient_ratio = gradient_ratio(slope, stats.ce, row.omega);
  finish_loss(stats, row.omega, sum_z, row.vocab, o);
  if constexpr (Grad) {
    if constexpr (D::label_apart)
      exp_q[row.label] = (hard + zed) * std::exp(-stats.ce) - smooth + (mixed ? row.scale * row.omega * slope : 0.0f);
    exp_q[row.label] -= hard * (1.0f - o.label_smoothing);
    chain_logits(exp_q, z, row.vocab, o);
  }
  return stats;
}

template <class T>
EFFKERN_INLINE void widen_row(const void* teacher, int64_t offset, float* out, int64_t vocab) {
  const T* x = static_cast<const T*>(teacher) + offset;
  for_lanes(0, vocab, [&](int, int64_t v) EFFKERN_LAMBDA { out[v] = widen(x[v]); });
}

template <class D, bool Grad>
EFFKERN_INLINE void run_dense_rows(const DistillChunk& c, int64_t begin, int64_t end) {
  const bool widened = c.teacher_type != TeacherType::FLOAT;
  Scratch scratch(c.vocab, true, c.options.temperature != 1.0f, widened);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = load_index(c.labels, c.long_labels, n);
    RowStats stats = {};
    if (label != c.ignore_index) {
      float* z = c.logits + n * c.logits_stride;
      const int64_t offset = n * c.teacher_stride;
      const float* u = scratch.u.data();
      if (!widened) u = static_cast<const float*>(c.teacher) + offset;
      if (c.teacher_type == TeacherType::BFLOAT16) widen_row<BFloat16>(c.teacher, offset, scratch.u.data(), c.vocab);
      if (c.teacher_type == TeacherType::FLOAT16) widen_row<Float16>(c.teacher, offset, scratch.u.data(), c.vocab);
      finish_logits(z, c.bias, c.vocab, c.options);
      stats = dense_row<D, Grad>({z, u, c.vocab, label, c.scale[n], c.omega[n]}, c.options, scratch);
    }
    store_row<Grad>(c, n, label != c.ignore_index, stats, scratch.exp_q.data());
  }
}

// target_clones takes plain functions only, hence one name per variant; declared in distill_chunk.h.
#define EFFKERN_DENSE_VARIANT(D)                                                       \
  EFFKERN_CLONES void D##_eval(const DistillChunk& c, int64_t begin, int64_t end) {    \
    run_dense_rows<D, false>(c, begin, end);                                           \
  }                                                                                    \
  EFFKERN_CLONES void D##_grad(const DistillChunk& c, int64_t begin, int64_t end) {    \
    run_dense_rows<D, true>(c, begin, end);                                            \
  }

}  // namespace effkern
