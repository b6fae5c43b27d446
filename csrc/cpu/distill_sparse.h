// The row pass of a sparse teacher, or of none: nothing V-wide but the student's logits.
//
//   dD / d(z / T) = c q + b, with corrections at the kept entries and at the label
#pragma once

#include "cpu/distill_math.h"

namespace effkern {

// The order of SPARSE_KINDS in effkern/ops/distill/rows.py.
enum SparseKind {
  NO_TEACHER = -1, TRUNCATED, RENORMALIZED, BOTH_RENORMALIZED, TAIL_BUCKET, TAIL_TO_LABEL, UNIFORM_TAIL, SAMPLED,
  STRATIFIED
};

constexpr double TAIL_FLOOR = 1e-7;

// A row's kept entries: those with an id inside of the vocabulary.
struct Kept {
  int64_t id;
  double t, log_t, q, log_q, delta;
};

struct SparseRow {
  float* z;
  int64_t vocab, label;
  float scale, omega;
  std::vector<Kept>* kept;  // id and log_t filled in, by rising id
};

// Coefficients of the gradient, value and entropy of the target.
struct SparseSums {
  double c = 0.0, b = 0.0, at_label = 0.0, value = 0.0, entropy = 0.0, log_mass = 0.0, log_label = 0.0;
  double top_t = 0.0;
};

// 0 log 0 = 0; nan stays nan.
inline double xlogx(double x) { return x == 0.0 ? 0.0 : x * std::log(x); }

inline double log_sum_exp(const std::vector<Kept>& kept) {
  double most = -INFINITY, sum = 0.0;
  for (const Kept& k : kept) most = k.log_t > most ? k.log_t : most;
  if (!(most > -INFINITY)) return most;
  for (const Kept& k : kept) sum += std::exp(k.log_t - most);
  return most + std::log(sum);
}

// All in double: K entries only. `sum_z` is the sum of all z, for a uniform tail; `outside` that of q off the kept
// entries, for a tail bucket.
inline SparseSums sparse_sums(const SparseRow& row, const Softmax& soft_q, double sum_z, double outside,
                              const RowOptions& o) {
  std::vector<Kept>& kept = *row.kept;
  SparseSums r;
  r.log_mass = log_sum_exp(kept);
  const bool normalised = o.sparse_kind == RENORMALIZED || o.sparse_kind == BOTH_RENORMALIZED;
  double shift = 0.0;
  if (normalised) {
    for (Kept& k : kept) k.log_t /= o.teacher_temperature;
    shift = log_sum_exp(kept);
    if (!(shift > -INFINITY)) shift = 0.0;
  }
  double S = 0.0, base = 0.0, log_q_sum = 0.0, t_label = 0.0, t_log_t = 0.0;
  bool has_label = false;
  for (Kept& k : kept) {
    k.log_t -= shift;
    k.t = std::exp(k.log_t);
    k.log_q = soft_q.log_prob(row.z[k.id]);
    k.q = std::exp(k.log_q);
    S += k.t;
    log_q_sum += k.log_q;
    // Not of 0 log 0 alone: a mass of nan must be seen.
    if (k.t != 0.0) base += k.t * (k.log_t - k.log_q);
    t_log_t += xlogx(k.t);
    r.top_t = k.t > r.top_t ? k.t : r.top_t;
    if (k.id == row.label) has_label = true, t_label += k.t;
  }
  const double tail = S > 1.0 ? 0.0 : 1.0 - S;
  r.c = S;
  r.value = base;
  r.entropy = -t_log_t;
  r.log_label = std::log(t_label);
  for (Kept& k : kept) k.delta = -k.t;

  if (o.sparse_kind == BOTH_RENORMALIZED) {
    r.c = 0.0;
    if (!kept.empty()) {
      double most = -INFINITY, sum = 0.0;
      for (const Kept& k : kept) most = k.log_q > most ? k.log_q : most;
      for (const Kept& k : kept) sum += std::exp(k.log_q - most);
      const double log_Q = most + std::log(sum);
      r.value += S * log_Q;
      for (Kept& k : kept) k.delta = std::exp(k.log_q - log_Q) * S - k.t;
    }
  } else if (o.sparse_kind == TAIL_BUCKET) {
    const double tail_t = tail < TAIL_FLOOR ? TAIL_FLOOR : tail, tail_q = outside < TAIL_FLOOR ? TAIL_FLOOR : outside;
    r.entropy -= xlogx(tail);
    if (o.reverse) {
      const double rest = std::log(tail_q / tail_t);
      r.value = tail_q * rest;
      for (const Kept& k : kept)
        if (k.q > 0.0) r.value += k.q * (k.log_q - k.log_t);
      r.c = rest - r.value;
      for (Kept& k : kept) k.delta = k.q > 0.0 ? k.q * (k.log_q - k.log_t - rest) : 0.0;
    } else {
      r.value += tail_t * std::log(tail_t / tail_q);
      r.c = 1.0 - tail_t / tail_q;
      for (Kept& k : kept) k.delta = k.q * (tail_t / tail_q) - k.t;
    }
  } else if (o.sparse_kind == TAIL_TO_LABEL) {
    const double log_q_label = soft_q.log_prob(row.z[row.label]);
    r.value += xlogx(t_label + tail) - xlogx(t_label) - (tail > 0.0 ? tail * log_q_label : 0.0);
    r.entropy += xlogx(t_label) - xlogx(t_label + tail);
    r.log_label = std::log(t_label + tail);
    r.c = S + tail;
    r.at_label = -tail;
  } else if (o.sparse_kind == UNIFORM_TAIL) {
    const int64_t others = row.vocab - static_cast<int64_t>(kept.size());
    const double each = others > 0 ? tail / static_cast<double>(others) : 0.0;
    // Sum of log q over all entries, less the kept ones.
    const double all = sum_z * soft_q.inverse - static_cast<double>(row.vocab) * soft_q.lse();
    r.value += static_cast<double>(others) * xlogx(each) - (each > 0.0 ? each * (all - log_q_sum) : 0.0);
    r.entropy -= static_cast<double>(others) * xlogx(each);
    r.log_label = has_label ? r.log_label : std::log(each);
    r.c = S + each * static_cast<double>(others);
    r.b = -each;
    for (Kept& k : kept) k.delta = each - k.t;
  }
  return r;
}

// Sum of q over what is not kept, from the exponentials: one minus the kept sum would cancel where the student is sure.
EFFKERN_INLINE double sum_outside(std::vector<Kept>& kept, const float* z, Scratch& s, const Softmax& soft_q) {
  for (Kept& k : kept) k.q = s.exp_q[k.id];
  for (const Kept& k : kept) s.exp_q[k.id] = 0.0f;
  double total = 0.0;
  for (const auto& b : s.blocks)
    total += static_cast<double>(block_sum(s.exp_q.data(), b.begin, b.end)) * soft_q.factor(b.max_z);
  for (const Kept& k : kept) s.exp_q[k.id] = static_cast<float>(k.q);
  // An id that stands twice counts twice among the kept ones.
  for (size_t i = 1; i < kept.size(); ++i)
    if (kept[i].id == kept[i - 1].id) total -= std::exp(static_cast<double>(soft_q.log_prob(z[kept[i].id])));
  return total;
}

template <bool Grad>
EFFKERN_INLINE RowStats sparse_row(const SparseRow& row, const RowOptions& o, Scratch& s) {
  const float* z = row.z;
  const bool tempered = o.temperature != 1.0f, teacher = o.sparse_kind != NO_TEACHER;
  const bool wants_sum = o.label_smoothing > 0.0f || o.sparse_kind == UNIFORM_TAIL;
  const float inverse = 1.0f / o.temperature;
  double sum_z = 0.0;
  s.cut(row.vocab, -1);
  for (auto& b : s.blocks) {
    b.max_z = block_max(z, b.begin, b.end);
    b.sum_q = block_exp(z, s.exp_q.data(), b.begin, b.end, b.max_z, inverse);
    if (tempered) b.sum_1 = block_exp(z, s.exp_1.data(), b.begin, b.end, b.max_z, 1.0f);
    if (wants_sum) sum_z += block_sum(z, b.begin, b.end);
  }
  const Softmax soft_q = merge(s.blocks, &Scratch::Block::max_z, &Scratch::Block::sum_q, inverse);
  const Softmax soft_1 = tempered ? merge(s.blocks, &Scratch::Block::max_z, &Scratch::Block::sum_1, 1.0f) : soft_q;

  RowStats stats = {};
  const float z_label = z[row.label];
  student_stats(stats, z_label, soft_q.most, soft_q, soft_1);
  SparseSums sums;
  float slope = 0.0f;
  if (teacher) {
    const double outside = o.sparse_kind == TAIL_BUCKET ? sum_outside(*row.kept, z, s, soft_q) : 0.0;
    sums = sparse_sums(row, soft_q, sum_z, outside, o);
    stats.divergence = o.divergence_scale * static_cast<float>(sums.value);
    stats.teacher_lse = static_cast<float>(sums.log_mass);
    stats.teacher_label_logprob = static_cast<float>(sums.log_label);
    stats.teacher_entropy = static_cast<float>(sums.entropy);
    double at_label = sums.c * std::exp(static_cast<double>(stats.label_logprob)) + sums.b + sums.at_label;
    for (const Kept& k : *row.kept) {
      if (k.id == row.label) at_label += k.delta;
      const bool top = k.t == sums.top_t && k.t > 0.0;
      if (top && k.id == row.label) stats.teacher_hit = 1.0f;
      if (top && z[k.id] >= soft_q.most) stats.agreement = 1.0f;
    }
    slope = o.divergence_scale * inverse * static_cast<float>(at_label);
  }
  stats.gradient_ratio = teacher ? gradient_ratio(slope, stats.ce, row.omega) : 1.0f - row.omega;
  finish_loss(stats, row.omega, sum_z, row.vocab, o);

  const float hard = row.scale * (1.0f - row.omega);
  const bool mixed = row.omega > 0.0f && teacher;
  const float soft = mixed ? row.scale * row.omega * o.divergence_scale * inverse : 0.0f;
  const float soft_c = mixed ? soft * static_cast<float>(sums.c) : 0.0f;
  const float soft_b = mixed ? soft * static_cast<float>(sums.b) : 0.0f;
  const float one = hard + row.scale * 2.0f * o.z_loss * stats.lse;
  const float constant = soft_b - hard * o.label_smoothing / static_cast<float>(row.vocab);
  float* exp_q = s.exp_q.data();
  const float* exp_1 = tempered ? s.exp_1.data() : exp_q;
  double entropy = 0.0;
  for (const auto& b : s.blocks) {
    const float factor_q = soft_q.factor(b.max_z), factor_1 = tempered ? soft_1.factor(b.max_z) : factor_q;
    const Softmax lq = soft_q;
    float q_log_q[LANES] = {};
    for_lanes(b.begin, b.end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      const float q = exp_q[v] * factor_q;
      q_log_q[l] += q > 0.0f ? q * lq.log_prob(z[v]) : 0.0f;
      if constexpr (Grad) exp_q[v] = one * (exp_1[v] * factor_1) + soft_c * q + constant;
    });
    entropy += sum_lanes(q_log_q);
  }
  stats.entropy = static_cast<float>(-entropy);
  if constexpr (Grad) {
    if (mixed) {
      // The slope of a kept entry in double: c q and its corrections may be large and cancel.
      const std::vector<Kept>& kept = *row.kept;
      for (size_t i = 0; i < kept.size();) {
        const int64_t id = kept[i].id;
        double slope_k = sums.c * kept[i].q + sums.b;
        for (; i < kept.size() && kept[i].id == id; ++i) slope_k += kept[i].delta;
        exp_q[id] = one * fast_exp(soft_1.log_prob(z[id])) + (constant - soft_b) + soft * static_cast<float>(slope_k);
      }
      exp_q[row.label] += soft * static_cast<float>(sums.at_label);
    }
    exp_q[row.label] -= hard * (1.0f - o.label_smoothing);
    chain_logits(exp_q, z, row.vocab, o);
  }
  return stats;
}

}  // namespace effkern
