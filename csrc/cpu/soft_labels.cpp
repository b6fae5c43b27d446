// effkern::soft_label_rows for CPU tensors: the entries of each row by rank, by draws, or both.
//
// One vector pass makes the exponentials of a row in float64 and their sums by block; the rest looks at few entries:
// the head is kept in a list that a rising threshold bounds, and a draw finds its block, then its entry.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 16;
constexpr int kBlock = 256;
constexpr float kInf = std::numeric_limits<float>::infinity();
enum Method : int64_t { kTopK, kSampled, kStratified };

// exp(x) for x <= 0, relative error below 3e-16; 0 below -708, where the result would be subnormal.
// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, and exp(r) by its series up to r^13.
EFFKERN_INLINE double exp64(double x) {
  const double shift = 6755399441055744.0 + 1023.0;
  const double bounded = x < -708.0 ? -708.0 : x;
  const double rounded = bounded * 1.4426950408889634 + shift;
  const double n = rounded - shift;
  // ln 2 in two parts: the first has so few bits that n * part is exact.
  double r = bounded - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits <<= 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -708.0 ? 0.0 : p * scale;
}

struct Args {
  const float* logits;
  int64_t row_stride;
  const int64_t* positions;
  int32_t* ids;
  float* logprobs;
  float* tail;
  float* lse;
  int64_t vocab;
  int64_t slots;
  Method method;
  int64_t k;
  int64_t draws;
  double inv_temperature;
  uint64_t seed;
};

struct Scratch {
  std::vector<double> exps;
  // Sum of the exponentials of each block, then of all blocks up to it.
  std::vector<double> sums;
  std::vector<double> prefix;
  std::vector<double> uniforms;
  std::vector<std::pair<float, int32_t>> head;
  std::vector<std::pair<int32_t, int64_t>> drawn;
};

EFFKERN_INLINE double block_sum(const double* exps, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += exps[i + lane];
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (; i < count; ++i) sum += exps[i];
  return sum;
}

// Largest logit of a row; NaN where there is one.
EFFKERN_INLINE float row_max(const float* z, int64_t count) {
  float lanes[kLanes];
  int32_t nan[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = -kInf;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = z[i + lane] > lanes[lane] ? z[i + lane] : lanes[lane];
      nan[lane] |= z[i + lane] != z[i + lane];
    }
  for (; i < count; ++i) {
    lanes[0] = z[i] > lanes[0] ? z[i] : lanes[0];
    nan[0] |= z[i] != z[i];
  }
  for (int lane = 1; lane < kLanes; ++lane) {
    lanes[0] = std::max(lanes[0], lanes[lane]);
    nan[0] |= nan[lane];
  }
  return nan[0] ? std::numeric_limits<float>::quiet_NaN() : lanes[0];
}

// Writes the exponentials of the row and their sums by block; returns the largest logit.
EFFKERN_CLONES float exponentials(const float* z, int64_t vocab, double inv_temperature, double* exps, double* sums) {
  const float max = row_max(z, vocab);
  if (!std::isfinite(max)) return max;
  // The difference first: it is exact and never positive, whatever the temperature makes of it.
  const double top = max;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, vocab - first);
    for (int64_t i = first; i < first + count; ++i) exps[i] = exp64((z[i] - top) * inv_temperature);
    sums[first / kBlock] = block_sum(exps + first, count);
  }
  return max;
}

bool before(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

// The k largest logits in falling order, the lower id first among equals.
EFFKERN_CLONES void find_head(const float* z, int64_t vocab, int64_t k, std::vector<std::pair<float, int32_t>>& head) {
  const size_t room = static_cast<size_t>(2 * k + kBlock);
  head.clear();
  head.reserve(room + kBlock);
  // Only once k entries are known may a later equal one be left out: it has the higher id.
  float threshold = -kInf;
  bool full = false;
  for (int64_t first = 0; first < vocab; first += kBlock) {
    const int64_t count = std::min<int64_t>(kBlock, vocab - first);
    if (full && !(row_max(z + first, count) > threshold)) continue;
    for (int64_t i = first; i < first + count; ++i)
      if (!full || z[i] > threshold) head.emplace_back(z[i], static_cast<int32_t>(i));
    if (head.size() >= room || (!full && head.size() >= static_cast<size_t>(k))) {
      std::nth_element(head.begin(), head.begin() + (k - 1), head.end(), before);
      head.resize(k);
      threshold = head[k - 1].first;
      full = true;
    }
  }
  const size_t keep = std::min<size_t>(k, head.size());
  std::partial_sort(head.begin(), head.begin() + keep, head.end(), before);
  head.resize(keep);
}

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

void sorted_uniforms(uint64_t seed, int64_t position, int64_t draws, std::vector<double>& out) {
  const uint64_t start = mix(mix(seed) + static_cast<uint64_t>(position));
  out.resize(draws);
  for (int64_t j = 0; j < draws; ++j)
    out[j] = static_cast<double>(mix(start + static_cast<uint64_t>(j + 1) * 0x9E3779B97F4A7C15ull) >> 11) * 0x1p-53;
  std::sort(out.begin(), out.end());
}

// Writes the ids drawn in proportion to the exponentials, rising, with log(scale * count / draws); returns their number.
int64_t draw(const Args& args, int64_t r, Scratch& s, double scale, int32_t* ids, float* logprobs) {
  const int64_t blocks = static_cast<int64_t>(s.sums.size());
  s.prefix.resize(blocks);
  double mass = 0;
  for (int64_t b = 0; b < blocks; ++b) s.prefix[b] = mass += s.sums[b];
  if (!(mass > 0 && std::isfinite(mass))) return 0;
  sorted_uniforms(args.seed, args.positions[r], args.draws, s.uniforms);

  s.drawn.clear();
  int64_t j = 0;
  const auto take_below = [&](double bound, int64_t id) {
    int64_t count = 0;
    while (j < args.draws && s.uniforms[j] * mass < bound) ++j, ++count;
    if (count == 0) return;
    if (!s.drawn.empty() && s.drawn.back().first == id) {
      s.drawn.back().second += count;
    } else {
      s.drawn.emplace_back(static_cast<int32_t>(id), count);
    }
  };
  for (int64_t block = 0; j < args.draws; ++block) {
    while (block + 1 < blocks && s.prefix[block] <= s.uniforms[j] * mass) ++block;
    const int64_t end = std::min<int64_t>(args.vocab, (block + 1) * kBlock);
    double upto = block == 0 ? 0.0 : s.prefix[block - 1];
    int64_t last = -1;
    for (int64_t i = block * kBlock; i < end && j < args.draws; ++i) {
      if (s.exps[i] == 0) continue;
      last = i;
      take_below(upto += s.exps[i], i);
    }
    // Added one by one, the entries may come to a little less than the sum of the block.
    take_below(s.prefix[block], last);
  }
  for (size_t i = 0; i < s.drawn.size(); ++i) {
    ids[i] = s.drawn[i].first;
    logprobs[i] = static_cast<float>(std::log(scale * (static_cast<double>(s.drawn[i].second) / args.draws)));
  }
  return static_cast<int64_t>(s.drawn.size());
}

// Clears the exponentials of `ids`; returns the sum of the others.
double outside(Scratch& s, int64_t vocab, const int32_t* ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0) continue;
    s.exps[ids[i]] = 0;
    s.sums[ids[i] / kBlock] = -1;
  }
  double rest = 0;
  for (size_t b = 0; b < s.sums.size(); ++b) {
    const int64_t first = static_cast<int64_t>(b) * kBlock;
    if (s.sums[b] < 0) s.sums[b] = block_sum(s.exps.data() + first, std::min<int64_t>(kBlock, vocab - first));
    rest += s.sums[b];
  }
  return rest;
}

void row(const Args& args, int64_t r, Scratch& s) {
  const float* z = args.logits + r * args.row_stride;
  int32_t* ids = args.ids + r * args.slots;
  float* logprobs = args.logprobs + r * args.slots;
  std::fill_n(ids, args.slots, -1);
  std::fill_n(logprobs, args.slots, -kInf);
  s.exps.resize(args.vocab);
  s.sums.resize((args.vocab + kBlock - 1) / kBlock);
  const float max = exponentials(z, args.vocab, args.inv_temperature, s.exps.data(), s.sums.data());
  if (!std::isfinite(max)) {
    args.lse[r] = max;
    args.tail[r] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  double total = 0;
  for (double sum : s.sums) total += sum;
  const double lse = max * args.inv_temperature + std::log(total);
  args.lse[r] = static_cast<float>(lse);

  int64_t head = 0;
  if (args.method != kSampled) {
    find_head(z, args.vocab, std::min(args.k, args.vocab), s.head);
    head = static_cast<int64_t>(s.head.size());
    for (int64_t i = 0; i < head; ++i) {
      if (s.head[i].first == -kInf) continue;
      ids[i] = s.head[i].second;
      logprobs[i] = static_cast<float>(s.head[i].first * args.inv_temperature - lse);
    }
    const double tail = outside(s, args.vocab, ids, head) / total;
    args.tail[r] = static_cast<float>(tail);
    if (args.method == kStratified) draw(args, r, s, tail, ids + head, logprobs + head);
  } else {
    const int64_t found = draw(args, r, s, 1.0, ids, logprobs);
    args.tail[r] = static_cast<float>(outside(s, args.vocab, ids, found) / total);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_label_rows(const Tensor& logits, const Tensor& positions,
                                                           int64_t method, int64_t k, int64_t draws,
                                                           double temperature, int64_t seed) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && logits.size(1) >= 1 &&
                      logits.size(1) <= std::numeric_limits<int32_t>::max(),
                  "soft_labels: logits must be float32 [N, V] with 1 <= V < 2^31");
  STD_TORCH_CHECK(logits.stride(1) == 1 || logits.size(1) == 1, "soft_labels: logits must have stride 1 along V");
  STD_TORCH_CHECK(positions.dim() == 1 && positions.size(0) == logits.size(0) &&
                      positions.scalar_type() == ScalarType::Long && positions.is_contiguous(),
                  "soft_labels: positions must be int64, contiguous, one per row of logits");
  STD_TORCH_CHECK(method >= kTopK && method <= kStratified && temperature > 0 && (method == kSampled || k >= 1) &&
                      (method == kTopK || draws >= 1),
                  "soft_labels: method, k, draws or temperature is out of range");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const int64_t slots = (method == kSampled ? 0 : std::min(k, vocab)) + (method == kTopK ? 0 : std::min(draws, vocab));
  Tensor ids = torch::stable::new_empty(logits, {rows, slots}, ScalarType::Int);
  Tensor logprobs = torch::stable::new_empty(logits, {rows, slots}, ScalarType::Float);
  Tensor tail = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const Args args{logits.const_data_ptr<float>(),
                  logits.stride(0),
                  positions.const_data_ptr<int64_t>(),
                  ids.mutable_data_ptr<int32_t>(),
                  logprobs.mutable_data_ptr<float>(),
                  tail.mutable_data_ptr<float>(),
                  lse.mutable_data_ptr<float>(),
                  vocab,
                  slots,
                  static_cast<Method>(method),
                  k,
                  draws,
                  1.0 / temperature,
                  static_cast<uint64_t>(seed)};
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / vocab), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t r = begin; r < end; ++r) row(args, r, scratch);
  });
  return {ids, logprobs, tail, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, library) { library.impl("soft_label_rows", TORCH_BOX(&soft_label_rows)); }
