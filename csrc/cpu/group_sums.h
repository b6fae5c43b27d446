// Sums that groups of rows made each for itself, added up in the groups' order into the results.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/rows.h"

namespace effkern {

// One part of the sums and where it goes.
struct SumResult {
  void* to;
  bool is_float;
  int64_t offset, count;
};

// [begin, end) of one part, from `parts` arrays of `size`.
EFFKERN_CLONES static void add_groups(const float* partial, int64_t parts, int64_t size, const SumResult& r,
                                      int64_t begin, int64_t end) {
  float sums[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    std::fill_n(sums, count, 0.0f);
    for (int64_t i = 0; i < parts; ++i) {
      const float* from = partial + i * size + at;
#pragma GCC ivdep
      for (int64_t v = 0; v < count; ++v) sums[v] += from[v];
    }
    if (r.is_float) {
      std::copy_n(sums, count, static_cast<float*>(r.to) + at - r.offset);
    } else {
      for (int64_t v = 0; v < count; ++v) store(static_cast<BFloat16*>(r.to)[at - r.offset + v], sums[v]);
    }
  }
}

class GroupSums {
 public:
  // `partial` holds `size` sums for each of `parts` groups.
  GroupSums(const float* partial, int64_t parts, int64_t size) : partial_(partial), parts_(parts), size_(size) {}

  // The next `count` sums of a group go to `to`, which may be missing.
  template <typename To>
  void next(To* to, int64_t count) {
    if (to != nullptr) results_.push_back({to, std::is_same_v<To, float>, offset_, count});
    offset_ += count;
  }

  // All in one task per thread: waking a thread takes as long as adding up 2^17 sums.
  void write() const {
    torch::stable::parallel_for(0, size_, kGrain, [&](int64_t begin, int64_t end) {
      for (const SumResult& r : results_)
        add_groups(partial_, parts_, size_, r, std::max(begin, r.offset), std::min(end, r.offset + r.count));
    });
  }

 private:
  static constexpr int64_t kGrain = 1 << 17;
  std::vector<SumResult> results_;
  const float* partial_;
  int64_t parts_, size_, offset_ = 0;
};

}  // namespace effkern
