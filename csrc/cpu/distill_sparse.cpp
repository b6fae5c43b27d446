// The row pass of a sparse teacher and of none, with and without gradient.
#include "distill_sparse.h"

#include <algorithm>

#include "distill_chunk.h"

namespace effkern {
namespace {

template <bool Grad>
EFFKERN_INLINE void run_rows(const DistillChunk& c, int64_t begin, int64_t end) {
  Scratch scratch(c.vocab, false, c.options.temperature != 1.0f, false);
  std::vector<Kept> kept;
  kept.reserve(c.kept);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = load_index(c.labels, c.long_labels, n);
    RowStats stats = {};
    if (label != c.ignore_index) {
      float* z = c.logits + n * c.logits_stride;
      kept.clear();
      for (int64_t k = n * c.kept; k < (n + 1) * c.kept; ++k) {
        const int64_t id = load_index(c.ids, c.long_ids, k);
        if (id >= 0 && id < c.vocab) kept.push_back({id, 0.0, c.logprobs[k], 0.0, 0.0, 0.0});
      }
      std::sort(kept.begin(), kept.end(), [](const Kept& a, const Kept& b) { return a.id < b.id; });
      finish_logits(z, c.bias, c.vocab, c.options);
      stats = sparse_row<Grad>({z, c.vocab, label, c.scale[n], c.omega[n], &kept}, c.options, scratch);
    }
    store_row<Grad>(c, n, label != c.ignore_index, stats, scratch.exp_q.data());
  }
}

}  // namespace

EFFKERN_CLONES void sparse_eval(const DistillChunk& c, int64_t begin, int64_t end) { run_rows<false>(c, begin, end); }
EFFKERN_CLONES void sparse_grad(const DistillChunk& c, int64_t begin, int64_t end) { run_rows<true>(c, begin, end); }

}  // namespace effkern
