// The passes of the loop step over rows of N x D.
//
//   forward:  s~ = alpha f + beta h + low,  s = s~ rstd w or s~,  x = c s + k e + m,  change = |s - h| / |s|
//   backward: G = g_s + c g_x,  g = rstd (G w - yh mean(G w yh)) or G,  yh = s~ rstd,  and what follows per element
//
// See rows.h for how a row is walked.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/rows.h"

namespace effkern {
namespace loop_step {

template <typename T>
struct ForwardRows {
  Rows<const T> f, h, e, low;
  Factor alpha, beta, state_scale, input_scale;  // beta without values: no term
  const float *norm_weight, *embedding;
  bool norm;
  float eps;
  // `low` may be the memory of `state`; without one s is f.
  Rows<T> state, core_input;
  float *rstd, *change;
  int64_t dim;
};

// What is summed over tokens.
enum Slot { kAlpha, kBeta, kStateScale, kInputScale, kEmbedding, kNormWeight, kSlots };

// Per channel a strip's sums are float, and join the totals at its end; those of one number are totals at once.
struct Sums {
  double* total[kSlots] = {};
  float* strip[kSlots] = {};
  bool per_channel[kSlots] = {};
};

template <typename T>
struct BackwardRows {
  Rows<const T> grad_state, grad_core_input, f, h, e, state, low;
  Factor alpha, beta, state_scale, input_scale;
  const float *norm_weight, *inverse_weight, *rstd;
  bool norm, from_state;
  // g, also in the type of h; those without data are not written.
  Rows<float> g;
  Rows<T> rounded, grad_f, grad_h, grad_e;
  int64_t dim;
};

// s~ of [begin, end) into `out`.
template <typename T>
EFFKERN_INLINE void combine(const T* f, const T* h, const T* low, const Factor& alpha, const Factor& beta,
                            int64_t begin, int64_t end, float* out) {
  with_factor(alpha, [&](auto a) EFFKERN_LAMBDA {
    if (beta.values) {
      with_factor(beta, [&](auto b) EFFKERN_LAMBDA {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA {
          out[v - begin] = a(v) * widen(f[v]) + b(v) * widen(h[v]);
        });
      });
    } else {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { out[v - begin] = a(v) * widen(f[v]); });
    }
  });
  if (low) for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { out[v - begin] += widen(low[v]); });
}

// `scratch` [D] is used with a norm alone.
template <typename T>
EFFKERN_INLINE void forward_row(const ForwardRows<T>& a, int64_t r, float* scratch) {
  const T *f = a.f[r], *h = a.h[r], *e = a.e[r], *low = a.low[r];
  T *s = a.state[r], *x = a.core_input[r];
  const float *w = a.norm_weight, *m = a.embedding;
  float moved[kLanes] = {}, size[kLanes] = {};
  // All that is made of s as it was rounded, of [begin, end); `now` is called once per channel.
  const auto enter = [&](int64_t begin, int64_t end, auto now) EFFKERN_LAMBDA {
    const auto write = [&](auto sum) EFFKERN_LAMBDA {
      if (m) {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(x[v], sum(v) + m[v]); });
      } else {
        for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(x[v], sum(v)); });
      }
    };
    with_factor(a.state_scale, [&](auto c) EFFKERN_LAMBDA {
      if (e) {
        with_factor(a.input_scale, [&](auto k) EFFKERN_LAMBDA {
          write([=](int64_t v) EFFKERN_LAMBDA { return c(v) * now(v) + k(v) * widen(e[v]); });
        });
      } else {
        write([=](int64_t v) EFFKERN_LAMBDA { return c(v) * now(v); });
      }
    });
  };
  const auto compare = [&](int64_t begin, int64_t end, const T* to) EFFKERN_LAMBDA {
    for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA {
      const float now = widen(to[v]), step = now - widen(h[v]);
      moved[l] += step * step;
      size[l] += now * now;
    });
  };
  // From `value` on, of [begin, end): s, and what is made of it.
  const auto leave = [&](int64_t begin, int64_t end, const float* value) EFFKERN_LAMBDA {
    if (x) {
      // In one loop, so that s is rounded and widened in registers.
      enter(begin, end, [=](int64_t v) EFFKERN_LAMBDA {
        store(s[v], value[v - begin]);
        return widen(s[v]);
      });
    } else {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(s[v], value[v - begin]); });
    }
    if (a.change) compare(begin, end, s);
  };

  alignas(64) float block[kBlock];
  if (!s) {
    for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
      if (x) enter(begin, end, [=](int64_t v) EFFKERN_LAMBDA { return widen(f[v]); });
      if (a.change) compare(begin, end, f);
    });
  } else if (a.norm) {
    float squares[kLanes] = {};
    for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
      combine(f, h, low, a.alpha, a.beta, begin, end, scratch + begin);
      for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { squares[l] += scratch[v] * scratch[v]; });
    });
    const float rstd = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(a.dim) + a.eps);
    a.rstd[r] = rstd;
    for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { block[v - begin] = scratch[v] * rstd * w[v]; });
      leave(begin, end, block);
    });
  } else {
    for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
      combine(f, h, low, a.alpha, a.beta, begin, end, block);
      leave(begin, end, block);
    });
  }
  if (a.change) {
    const float distance = sum_lanes(moved);
    a.change[r] = distance == 0.0f ? 0.0f : std::sqrt(distance) / std::sqrt(sum_lanes(size));
  }
}

// Sums product(channel), where somebody asks.
template <class F>
EFFKERN_INLINE void add(const Sums& sums, Slot slot, int64_t begin, int64_t end, const F& product) {
  if (sums.total[slot] == nullptr) return;
  if (sums.per_channel[slot]) {
    float* strip = sums.strip[slot];
    for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { strip[v] += product(v); });
  } else {
    float lanes[kLanes] = {};
    for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { lanes[l] += product(v); });
    *sums.total[slot] += sum_lanes(lanes);
  }
}

// `scratch` [2 D].
template <typename T>
EFFKERN_INLINE void backward_row(const BackwardRows<T>& a, int64_t r, const Sums& sums, float* scratch) {
  const T *gs = a.grad_state[r], *gx = a.grad_core_input[r], *f = a.f[r], *h = a.h[r], *e = a.e[r], *s = a.state[r];
  const T* low = a.low[r];
  const float *w = a.norm_weight, *inverse = a.inverse_weight;
  float *g = a.g ? a.g[r] : scratch, *yh = scratch + a.dim;
  const auto scaled = [&](T* out, const Factor& factor, int64_t begin, int64_t end, const auto* from) EFFKERN_LAMBDA {
    with_factor(factor, [&](auto c) EFFKERN_LAMBDA {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], c(v) * widen(from[v])); });
    });
  };
  // G into the memory of g.
  const auto gather = [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    if (gx) {
      with_factor(a.state_scale, [&](auto c) EFFKERN_LAMBDA {
        if (gs) {
          for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = widen(gs[v]) + c(v) * widen(gx[v]); });
        } else {
          for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = c(v) * widen(gx[v]); });
        }
      });
      add(sums, kStateScale, begin, end, [&](int64_t v) EFFKERN_LAMBDA { return widen(gx[v]) * widen(s[v]); });
      add(sums, kInputScale, begin, end, [&](int64_t v) EFFKERN_LAMBDA { return widen(gx[v]) * widen(e[v]); });
      add(sums, kEmbedding, begin, end, [&](int64_t v) EFFKERN_LAMBDA { return widen(gx[v]); });
      if (a.grad_e) scaled(a.grad_e[r], a.input_scale, begin, end, gx);
    } else {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = widen(gs[v]); });
    }
  };
  const auto leave = [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    if (T* out = a.rounded[r]) for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { store(out[v], g[v]); });
    if (a.grad_f) scaled(a.grad_f[r], a.alpha, begin, end, g);
    if (a.grad_h) scaled(a.grad_h[r], a.beta, begin, end, g);
    add(sums, kAlpha, begin, end, [&](int64_t v) EFFKERN_LAMBDA { return g[v] * widen(f[v]); });
    add(sums, kBeta, begin, end, [&](int64_t v) EFFKERN_LAMBDA { return g[v] * widen(h[v]); });
  };
  if (!a.norm) {
    for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
      gather(begin, end);
      leave(begin, end);
    });
    return;
  }
  const float rstd = a.rstd[r];
  float products[kLanes] = {};
  for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    gather(begin, end);
    if (a.from_state) {
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { yh[v] = widen(s[v]) * inverse[v]; });
    } else {
      combine(f, h, low, a.alpha, a.beta, begin, end, yh + begin);
      for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { yh[v] *= rstd; });
    }
    for_lanes(begin, end, [&](int l, int64_t v) EFFKERN_LAMBDA { products[l] += g[v] * w[v] * yh[v]; });
  });
  const float mean = sum_lanes(products) / static_cast<float>(a.dim);
  for_blocks(a.dim, [&](int64_t begin, int64_t end) EFFKERN_LAMBDA {
    add(sums, kNormWeight, begin, end, [&](int64_t v) EFFKERN_LAMBDA { return g[v] * yh[v]; });
    for_lanes(begin, end, [&](int, int64_t v) EFFKERN_LAMBDA { g[v] = rstd * (g[v] * w[v] - yh[v] * mean); });
    leave(begin, end);
  });
}

// What the rows of a strip have added up joins the totals.
EFFKERN_INLINE void end_strip(const Sums& sums, int64_t dim) {
  for (int slot = 0; slot < kSlots; ++slot) {
    double* total = sums.total[slot];
    float* strip = sums.strip[slot];
    if (total == nullptr || strip == nullptr) continue;
    for_lanes(0, dim, [&](int, int64_t v) EFFKERN_LAMBDA {
      total[v] += strip[v];
      strip[v] = 0.0f;
    });
  }
}

// GCC clones functions, not templates.
namespace {

#define EFFKERN_LOOPS(T)                                                                                       \
  EFFKERN_CLONES void forward_rows(const ForwardRows<T>& a, int64_t begin, int64_t end, float* scratch) {      \
    for (int64_t r = begin; r < end; ++r) forward_row(a, r, scratch);                                          \
  }                                                                                                            \
  EFFKERN_CLONES void backward_rows(const BackwardRows<T>& a, int64_t begin, int64_t end, const Sums& sums,    \
                                    float* scratch) {                                                          \
    for (int64_t strip = begin; strip < end; strip += kStrip) {                                                \
      for (int64_t r = strip; r < std::min(strip + kStrip, end); ++r) backward_row(a, r, sums, scratch);       \
      end_strip(sums, a.dim);                                                                                  \
    }                                                                                                          \
  }
EFFKERN_LOOPS(float)
EFFKERN_LOOPS(BFloat16)
#undef EFFKERN_LOOPS

}  // namespace
}  // namespace loop_step
}  // namespace effkern
