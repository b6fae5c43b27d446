// effkern::kmeans_merge for CPU tensors: the m best scores of each row so far, with one tile of products more.
//
// score = product - half norm. For m = 1 each lane keeps its own best and where it was; for more a lane that beats the
// worst of the list is put in its place, which becomes rare after the first tiles. NaN beats nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/rows.h"

namespace effkern {
namespace kmeans {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kInf = std::numeric_limits<float>::infinity();

// The first of the largest scores of a row: `at`, or -1.
EFFKERN_INLINE void merge_one(const float* products, const float* half, int32_t count, int64_t first, float& best,
                              int64_t& label) {
  float values[kLanes];
  int32_t places[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    values[l] = -kInf;
    places[l] = -1;
  }
  int32_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float score = products[c + l] - half[c + l];
      const bool better = score > values[l];
      values[l] = better ? score : values[l];
      places[l] = better ? c + l : places[l];
    }
  for (int l = 0; c + l < count; ++l) {
    const float score = products[c + l] - half[c + l];
    if (score > values[l]) {
      values[l] = score;
      places[l] = c + l;
    }
  }
  float value = -kInf;
  int32_t place = -1;
  for (int l = 0; l < kLanes; ++l)
    if (values[l] > value || (values[l] == value && places[l] < place && places[l] >= 0)) {
      value = values[l];
      place = places[l];
    }
  // Earlier tiles have the lower indices: what is equal stays.
  if (place >= 0 && value > best) {
    best = value;
    label = first + place;
  }
}

// Into a falling list, behind what is equal.
EFFKERN_INLINE void insert(float score, int64_t label, int64_t m, float* best, int64_t* labels) {
  int64_t j = m - 1;
  for (; j > 0 && best[j - 1] < score; --j) {
    best[j] = best[j - 1];
    labels[j] = labels[j - 1];
  }
  best[j] = score;
  labels[j] = label;
}

EFFKERN_INLINE void merge_many(const float* products, const float* half, int32_t count, int64_t first, int64_t m,
                               float* best, int64_t* labels) {
  float scores[kLanes];
  for (int32_t c = 0; c < count; c += kLanes) {
    const int width = std::min<int32_t>(kLanes, count - c);
    for (int l = 0; l < kLanes; ++l) scores[l] = -kInf;
    if (width == kLanes) {
      for (int l = 0; l < kLanes; ++l) scores[l] = products[c + l] - half[c + l];
    } else {
      for (int l = 0; l < width; ++l) scores[l] = products[c + l] - half[c + l];
    }
    const float worst = best[m - 1];
    int32_t better = 0;
    for (int l = 0; l < kLanes; ++l) better |= scores[l] > worst;
    if (!better) continue;
    for (int l = 0; l < width; ++l)
      if (scores[l] > best[m - 1]) insert(scores[l], first + c + l, m, best, labels);
  }
}

EFFKERN_CLONES void merge_rows(const float* products, int64_t stride, const float* half, int32_t count, int64_t first,
                               int64_t m, float* best, int64_t* labels, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (m == 1) {
      merge_one(products + r * stride, half, count, first, best[r], labels[r]);
    } else {
      merge_many(products + r * stride, half, count, first, m, best + r * m, labels + r * m);
    }
  }
}

void merge(const Tensor& products, const Tensor& half_norms, int64_t first, Tensor best, Tensor labels) {
  STD_TORCH_CHECK(products.dim() == 2 && products.scalar_type() == ScalarType::Float &&
                      (products.size(1) <= 1 || products.stride(1) == 1) &&
                      products.size(1) <= std::numeric_limits<int32_t>::max(),
                  "kmeans_merge: products must be float32 [R, C] with stride 1");
  const int64_t rows = products.size(0), count = products.size(1);
  STD_TORCH_CHECK(half_norms.dim() == 1 && half_norms.size(0) == count && half_norms.is_contiguous() &&
                      half_norms.scalar_type() == ScalarType::Float,
                  "kmeans_merge: half_norms must be contiguous float32 [", count, "]");
  STD_TORCH_CHECK(best.dim() == 2 && labels.dim() == 2 && best.size(0) == rows && labels.size(0) == rows &&
                      best.size(1) == labels.size(1) && best.size(1) >= 1 && best.is_contiguous() &&
                      labels.is_contiguous() && best.scalar_type() == ScalarType::Float &&
                      labels.scalar_type() == ScalarType::Long,
                  "kmeans_merge: best and labels must be contiguous float32 and int64 [", rows, ", m]");
  const float* from = static_cast<const float*>(products.const_data_ptr());
  const float* half = static_cast<const float*>(half_norms.const_data_ptr());
  float* to = static_cast<float*>(best.data_ptr());
  int64_t* to_labels = static_cast<int64_t*>(labels.data_ptr());
  const int64_t m = best.size(1), stride = products.stride(0);
  // A task shorter than about 10 microseconds costs more to hand out than it saves.
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(count, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    merge_rows(from, stride, half, static_cast<int32_t>(count), first, m, to, to_labels, begin, end);
  });
}

}  // namespace
}  // namespace kmeans
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) { m.impl("kmeans_merge", TORCH_BOX(&effkern::kmeans::merge)); }
