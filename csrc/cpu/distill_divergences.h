// The divergences of a dense teacher. To add one: a struct with value, weight and what its sums mean, its name
// in distill_chunk.h and in effkern/ops/distill/rows.py, and a line in a distill_dense_*.cpp.
//
// As D depends on z through q alone, dD / d(z / T) = w - q W with w = q dD / dq and W = sum w. Class 2 knows W from
// the statistics pass; class 3 sums it in a pass of its own. The logit losses have W = 0.
#pragma once

#include "cpu/distill_math.h"

namespace effkern {

// One entry of both models; the second line, of their mixture m, is known where a divergence prepares it.
struct Entry {
  float p, q, log_p, log_q, z, u;
  float m, p_over_m, q_over_m;  // m and the logarithms of p / m and q / m
};

// What is known of a row after its statistics pass.
struct RowFacts {
  double mass = 1.0;     // sum of p
  double reverse = 0.0;  // sum q (log q - log p)
  // Of label against rest, decoupled_kl only.
  double q_label = 0.0, p_label = 0.0, binary = 0.0;
  // Means, and sums of squares and products about them (about 0 without centring), logit losses only.
  double mean_z = 0.0, mean_u = 0.0, zz = 0.0, uu = 0.0, zu = 0.0;
  int64_t vocab = 1;
};

struct Divergence {
  static constexpr bool sums_weights = false;  // class 3
  static constexpr bool needs_reverse = false;
  static constexpr bool label_apart = false;  // p and q of an Entry are those off the label
  static constexpr bool on_logits = false, centred = false;
  float total = 0.0f;   // W, class 2
  double extra = 0.0;   // D = factor * (sum of values) + extra
  double factor = 1.0;

  // Completes an entry before its value and weight are asked for.
  EFFKERN_INLINE void prepare(Entry&) const {}
  // A weight of zero switches a term off, even where it is infinite.
  EFFKERN_INLINE double finish(double sum) const { return (factor != 0.0 ? factor * sum : 0.0) + extra; }
};

struct ForwardKL : Divergence {
  ForwardKL(const RowFacts& r, const RowOptions&) {
    total = static_cast<float>(-r.mass);
    extra = r.mass - 1.0;
  }
  EFFKERN_INLINE float value(const Entry& e) const { return kl_term(e.p, e.q, e.log_p - e.log_q); }
  EFFKERN_INLINE float weight(const Entry& e) const { return -e.p; }
};

// q (log q - log p).
EFFKERN_INLINE float reverse_weight(const Entry& e) { return times_log(e.q, e.log_q - e.log_p); }

struct ReverseKL : Divergence {
  static constexpr bool needs_reverse = true;
  ReverseKL(const RowFacts& r, const RowOptions&) {
    total = static_cast<float>(r.reverse);
    extra = 1.0 - r.mass;
  }
  EFFKERN_INLINE float value(const Entry& e) const { return kl_term(e.q, e.p, e.log_q - e.log_p); }
  EFFKERN_INLINE float weight(const Entry& e) const { return reverse_weight(e); }
};

struct SymmetricKL : Divergence {
  static constexpr bool needs_reverse = true;
  float forward, backward;
  SymmetricKL(const RowFacts& r, const RowOptions& o) : forward(o.beta), backward(o.rest_beta) {
    total = static_cast<float>(backward * r.reverse - forward * r.mass);
    extra = (forward - backward) * (r.mass - 1.0);
  }
  EFFKERN_INLINE float value(const Entry& e) const {
    const float x = e.log_p - e.log_q;
    return forward * kl_term(e.p, e.q, x) + backward * kl_term(e.q, e.p, -x);
  }
  EFFKERN_INLINE float weight(const Entry& e) const { return backward * reverse_weight(e) - forward * e.p; }
};

// m = share p + rest q, share + rest = 1.
EFFKERN_INLINE void mix(Entry& e, float share, float rest) {
  // log(q / m) = -log(1 + share (p / q - 1)), or the same for p, from the term that makes up most of m.
  const float gap = e.log_p - e.log_q;
  const bool p_wins = share * e.p > rest * e.q;
  const float winner = select(p_wins, e.p, e.q), other = select(p_wins, e.q, e.p), away = select(p_wins, gap, -gap);
  const float ratio = other / (winner < FLT_MIN ? FLT_MIN : winner);
  const float less = select(std::fabs(away) < 0.5f, excess_series(away) - away, ratio - 1.0f);
  const float of_other = select(p_wins, rest, share), of_winner = select(p_wins, share, rest);
  // With what rounding takes from 1 + x; far below 1 a sum of two positive terms, as a tiny share would be lost there.
  const float x = of_other * less, sum = 1.0f + x;
  const bool near = !(x < -0.5f);
  const float above = fast_log(select(near, sum, of_winner + of_other * ratio), select(near, x - (sum - 1.0f), 0.0f));
  e.m = share * e.p + rest * e.q;
  e.p_over_m = select(p_wins, 0.0f, gap) - above;
  e.q_over_m = select(p_wins, -gap, 0.0f) - above;
}

struct JSD : Divergence {
  static constexpr bool sums_weights = true;
  float beta, rest;
  JSD(const RowFacts&, const RowOptions& o) : beta(o.beta), rest(o.rest_beta) {}
  EFFKERN_INLINE void prepare(Entry& e) const { mix(e, beta, rest); }
  EFFKERN_INLINE float value(const Entry& e) const {
    return beta * kl_term(e.p, e.m, e.p_over_m) + rest * kl_term(e.q, e.m, e.q_over_m);
  }
  EFFKERN_INLINE float weight(const Entry& e) const { return rest * times_log(e.q, e.q_over_m); }
};

struct SkewForwardKL : Divergence {
  static constexpr bool sums_weights = true;
  float alpha, rest;
  SkewForwardKL(const RowFacts& r, const RowOptions& o) : alpha(o.alpha), rest(o.rest_alpha) {
    extra = rest * (r.mass - 1.0);
  }
  EFFKERN_INLINE void prepare(Entry& e) const { mix(e, alpha, rest); }
  EFFKERN_INLINE float value(const Entry& e) const { return kl_term(e.p, e.m, e.p_over_m); }
  EFFKERN_INLINE float weight(const Entry& e) const {
    return select(e.m == 0.0f, 0.0f, -rest * e.p * (e.q / e.m));
  }
};

struct SkewReverseKL : Divergence {
  static constexpr bool sums_weights = true;
  float alpha, rest;
  SkewReverseKL(const RowFacts& r, const RowOptions& o) : alpha(o.alpha), rest(o.rest_alpha) {
    extra = rest * (1.0 - r.mass);
  }
  EFFKERN_INLINE void prepare(Entry& e) const { mix(e, rest, alpha); }
  EFFKERN_INLINE float value(const Entry& e) const { return kl_term(e.q, e.m, e.q_over_m); }
  EFFKERN_INLINE float weight(const Entry& e) const {
    return times_log(e.q, e.q_over_m - alpha * (e.q / e.m));
  }
};

struct TVD : Divergence {
  static constexpr bool sums_weights = true;
  TVD(const RowFacts&, const RowOptions&) {}
  EFFKERN_INLINE float value(const Entry& e) const { return 0.5f * std::fabs(e.p - e.q); }
  EFFKERN_INLINE float weight(const Entry& e) const {
    // The last is 0 or nan.
    return e.q > e.p ? 0.5f * e.q : (e.q < e.p ? -0.5f * e.q : e.q - e.p);
  }
};

struct DecoupledKL : Divergence {
  static constexpr bool label_apart = true;
  float beta;
  DecoupledKL(const RowFacts& r, const RowOptions& o) : beta(o.beta) {
    // Off the label: beta (q - p) - q alpha (q_y - p_y).
    total = static_cast<float>(o.alpha * (r.q_label - r.p_label) - o.beta);
    factor = o.beta;
    extra = o.alpha > 0.0f ? o.alpha * r.binary : 0.0;
  }
  EFFKERN_INLINE float value(const Entry& e) const { return kl_term(e.p, e.q, e.log_p - e.log_q); }
  EFFKERN_INLINE float weight(const Entry& e) const { return -beta * e.p; }
};

// share * sum (a (z - mean_z) - b (u - mean_u))^2, and its gradient without the part along z - mean_z that a
// normalisation takes away.
struct LogitLoss : Divergence {
  static constexpr bool on_logits = true;
  float a = 1.0f, b = 1.0f, mean_z = 0.0f, mean_u = 0.0f, along = 0.0f, slope = 0.0f;
  EFFKERN_INLINE float difference(const Entry& e) const { return a * (e.z - mean_z) - b * (e.u - mean_u); }
  EFFKERN_INLINE float value(const Entry& e) const { return difference(e) * difference(e); }
  EFFKERN_INLINE float weight(const Entry& e) const {
    return slope * (difference(e) - along * (a * (e.z - mean_z)));
  }

 protected:
  explicit LogitLoss(const RowFacts& r, double share) : mean_z(r.mean_z), mean_u(r.mean_u) {
    factor = share;
    slope = static_cast<float>(2.0 * share);
  }
  // z and u are divided by their size, whose squares are these; 0 stays 0.
  void divide(const RowFacts& r, double zz, double uu) {
    // nan stays nan.
    a = static_cast<float>(zz > 0.0 ? 1.0 / std::sqrt(zz) : zz);
    b = static_cast<float>(uu > 0.0 ? 1.0 / std::sqrt(uu) : uu);
    const double length = std::sqrt(r.zz) * std::sqrt(r.uu);
    along = static_cast<float>(1.0 - (length > 0.0 ? r.zu / length : 0.0));
    slope *= a;
  }
};

struct MSE : LogitLoss {
  MSE(const RowFacts& r, const RowOptions&) : LogitLoss(r, 1.0 / static_cast<double>(r.vocab)) {}
};

struct CenteredMSE : MSE {
  static constexpr bool centred = true;
  using MSE::MSE;
};

struct ZScoredMSE : LogitLoss {
  static constexpr bool centred = true;
  ZScoredMSE(const RowFacts& r, const RowOptions&) : LogitLoss(r, 1.0 / static_cast<double>(r.vocab)) {
    divide(r, r.zz / static_cast<double>(r.vocab), r.uu / static_cast<double>(r.vocab));
  }
};

struct Cosine : LogitLoss {
  Cosine(const RowFacts& r, const RowOptions&) : LogitLoss(r, 0.5) {
    divide(r, r.zz, r.uu);
    // |a - b|^2 / 2 is 1 - cos of unit vectors; a zero vector has the cosine 0 with everything.
    if (a == 0.0f || b == 0.0f) {
      factor = 0.0;
      extra = 1.0;
    }
  }
};

}  // namespace effkern
