// effkern::label_rank for CPU tensors: log-sum-exp of a row and the rank of its label, one pass over the logits.
//
// A row is walked in blocks that stay in the first-level cache: widen, maximum and rank count, then the exponentials
// against the maximum so far. Lanes are fixed at 32, so that the order of the additions does not depend on the clone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/label_rank_checks.h"
#include "cpu/clones.h"
#include "cpu/fast_exp.h"
#include "cpu/widen.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 32;
constexpr int kBlock = 1024;
constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename T>
struct Args {
  const T* logits;
  int64_t row_stride;
  const int64_t* labels;
  float* loss;
  float* lse;
  float* label_logit;
  int64_t* rank;
  int64_t vocab;
  int64_t ignore_index;
};

// The whole block as float. Behind a row's last logit stands -inf, which adds nothing to any of the three results.
template <typename T>
EFFKERN_INLINE void load_block(const T* logits, int count, float (&z)[kBlock]) {
  for (int i = 0; i < count; ++i) z[i] = effkern::widen(logits[i]);
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int i = count; i < padded; ++i) z[i] = -kInf;
}

template <typename T>
EFFKERN_INLINE void row(const Args<T>& args, int64_t r) {
  const int64_t label = args.labels[r];
  if (label == args.ignore_index) {
    args.loss[r] = args.lse[r] = args.label_logit[r] = 0;
    args.rank[r] = -1;
    return;
  }
  const T* logits = args.logits + r * args.row_stride;
  const bool outside = label < 0 || label >= args.vocab;
  // NaN makes the loss NaN and is exceeded by nothing.
  const float label_logit = outside ? std::numeric_limits<float>::quiet_NaN() : effkern::widen(logits[label]);

  float max = -kInf, origin = 0;
  float sums[kLanes] = {};
  int64_t greater = 0;
  for (int64_t first = 0; first < args.vocab; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, args.vocab - first));
    alignas(64) float z[kBlock];
    load_block(logits + first, count, z);

    float maxima[kLanes];
    int32_t above[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) maxima[lane] = max;
    for (int i = 0; i < count; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) {
        maxima[lane] = z[i + lane] > maxima[lane] ? z[i + lane] : maxima[lane];
        above[lane] += z[i + lane] > label_logit;
      }
    float block_max = max;
    for (int lane = 0; lane < kLanes; ++lane) {
      block_max = std::max(block_max, maxima[lane]);
      greater += above[lane];
    }
    if (block_max > max) {
      const float scale = effkern::fast_exp(max - block_max);
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] *= scale;
      max = block_max;
      origin = max;
    }
    for (int i = 0; i < count; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += effkern::fast_exp(z[i + lane] - origin);
  }

  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  float log_sum = std::log(sum);
  if (max == kInf) {
    // inf - inf has made the sum NaN; the row's is inf, unless a logit is NaN.
    bool has_nan = false;
    for (int64_t i = 0; i < args.vocab; ++i) has_nan |= std::isnan(effkern::widen(logits[i]));
    origin = 0;
    log_sum = has_nan ? std::numeric_limits<float>::quiet_NaN() : kInf;
  }
  args.lse[r] = origin + log_sum;
  args.label_logit[r] = label_logit;
  // Not lse - z_y: around large logits the rounding of lse would stay in the loss.
  args.loss[r] = (origin - label_logit) + log_sum;
  args.rank[r] = outside ? -1 : greater;
}

// GCC clones functions, not templates.
#define EFFKERN_ROWS(T)                                                      \
  EFFKERN_CLONES void rows(const Args<T>& args, int64_t begin, int64_t end) { \
    for (int64_t r = begin; r < end; ++r) row(args, r);                      \
  }
EFFKERN_ROWS(float)
EFFKERN_ROWS(effkern::BFloat16)
EFFKERN_ROWS(effkern::Float16)
#undef EFFKERN_ROWS

template <typename T>
void run(const Tensor& logits, const Tensor& labels, const effkern::LabelRankOutputs& out, int64_t ignore_index,
         int64_t vocab) {
  const Args<T> args{static_cast<const T*>(logits.const_data_ptr()),
                     logits.stride(0),
                     labels.const_data_ptr<int64_t>(),
                     out.loss.mutable_data_ptr<float>(),
                     out.lse.mutable_data_ptr<float>(),
                     out.label_logit.mutable_data_ptr<float>(),
                     out.rank.mutable_data_ptr<int64_t>(),
                     vocab,
                     ignore_index};
  // A task shorter than about 10 microseconds costs more to hand out than it saves.
  const int64_t grain = std::max<int64_t>(1, 32768 / vocab);
  torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> label_rank(const Tensor& logits, const Tensor& labels, int64_t ignore_index,
                                                      int64_t vocab_valid) {
  effkern::check_label_rank(logits, labels, vocab_valid);
  const effkern::LabelRankOutputs out(logits, labels);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      run<float>(logits, labels, out, ignore_index, vocab_valid);
      break;
    case ScalarType::BFloat16:
      run<effkern::BFloat16>(logits, labels, out, ignore_index, vocab_valid);
      break;
    default:
      run<effkern::Float16>(logits, labels, out, ignore_index, vocab_valid);
  }
  return {out.loss, out.lse, out.label_logit, out.rank};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, library) { library.impl("label_rank", TORCH_BOX(&label_rank)); }
