// How kernels over rows of N x D walk a row.
//
// A row is walked in blocks: a block of the float result stays in the first cache while the operands are added one at a
// time, so that there is one loop per operand and not one per combination of operands. Lanes and strips are fixed, so
// that the order of additions depends on neither the clone nor the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/clones.h"
#include "cpu/widen.h"

namespace effkern {

constexpr int kLanes = 32;
constexpr int64_t kBlock = 512;
// Rows that share one partial sum.
constexpr int64_t kStrip = 16;

// Rows of packed channels; without data where an operand is missing. A buffer of a chunk starts at its first row; a
// stride of 0 is one row for all.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0, first = 0;

  explicit operator bool() const { return data != nullptr; }
  T* operator[](int64_t r) const { return data == nullptr ? nullptr : data + (r - first) * stride; }
};

// A factor for all channels, or one per channel.
struct Factor {
  const float* values = nullptr;
  bool per_channel = false;

  bool is_one() const { return !per_channel && *values == 1.0f; }
};

EFFKERN_INLINE void store(float& to, float value) { to = value; }
EFFKERN_INLINE void store(BFloat16& to, float value) { to.bits = to_bfloat16(value); }

// Calls f(lane, index) for [begin, end): full groups of lanes first, then the rest.
template <class F>
EFFKERN_INLINE void for_lanes(int64_t begin, int64_t end, const F& f) {
  int64_t v = begin;
  for (; v + kLanes <= end; v += kLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) f(l, v + l);
  }
  for (int l = 0; v + l < end; ++l) f(l, v + l);
}

template <class F>
EFFKERN_INLINE void for_blocks(int64_t dim, const F& f) {
  for (int64_t begin = 0; begin < dim; begin += kBlock) f(begin, std::min(begin + kBlock, dim));
}

// Halves first, in vectors: one lane after another would take as long as a hundred channels.
EFFKERN_INLINE float sum_lanes(const float* lanes) {
  float sums[kLanes];
  for (int l = 0; l < kLanes; ++l) sums[l] = lanes[l];
#pragma GCC unroll 8
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// Calls f(factor of a channel) with a function that the compiler sees through.
template <class F>
EFFKERN_INLINE void with_factor(const Factor& factor, const F& f) {
  const float* values = factor.values;
  if (factor.per_channel) {
    f([values](int64_t v) EFFKERN_LAMBDA { return values[v]; });
  } else {
    const float value = *values;
    f([value](int64_t) EFFKERN_LAMBDA { return value; });
  }
}

}  // namespace effkern
