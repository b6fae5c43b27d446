// effkern::laurel_forward_chunks_ and laurel_backward_chunks_: the LAuReL residual, one chunk of rows per thread at a time.
//
//   N tokens, D channels, S columns of A (down), R rows of B (up), P look-ahead products of earlier layers
//
// A chunk stays in a thread's second-level cache between its products and the passes over its rows. How rows are cut
// does not depend on the number of threads. Sums over tokens are made per group of chunks and added up in order.
#include <torch/csrc/stable/library.h>

#include <type_traits>
#include <utility>

#include "cpu/group_sums.h"
#include "cpu/laurel_operands.h"
#include "cpu/row_chunks.h"

namespace effkern {
namespace laurel {
namespace {

// Bytes of x in a chunk. They share 1 or 2 MiB of cache with those of y, or of g and the like, and the matrices. The
// library's bfloat16 products of the forward pass take 20 microseconds a call, whatever their size.
template <typename T>
constexpr int64_t kForwardBytes = std::is_same_v<T, float> ? 1 << 19 : 1 << 20;
template <typename T>
constexpr int64_t kBackwardBytes = std::is_same_v<T, float> ? 1 << 19 : 1 << 18;
// Elements below which handing a task to another thread costs more than it saves: 10 microseconds, and those calls.
template <typename T>
constexpr int64_t kGrain = std::is_same_v<T, float> ? 1 << 15 : 3 << 16;
constexpr int64_t kNarrowGrain = 1 << 15;
// Groups of a backward pass.
constexpr int64_t kGroups = 16, kNarrowGroups = 64;

template <typename T>
void forward_chunks(ForwardRows<T> a, const LowRank<T>& l, Rows<T> own, int64_t rows) {
  const int64_t grain = l.columns + l.rank > 0 ? kGrain<T> : kNarrowGrain;
  const int64_t parts = std::min(kChunks, std::max<int64_t>(1, rows * a.dim / grain));
  const Cut chunks(0, rows, std::max(parts, least_chunks<T>(rows, a.dim, kForwardBytes<T>)));
  if (l.rank > 0) a.low_rank = {a.y.data, a.y.stride};
  torch::stable::parallel_for(0, chunks.parts(), 1, [&](int64_t begin, int64_t end) {
    Small<T> s(l, chunks.step);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = chunks.first(c), count = chunks.last(c) - first;
      if (l.columns > 0) multiply(matrix_of(own, first, count, l.columns), matrix_of(a.x, first, count, a.dim), l.down);
      if (l.rank > 0) {
        const Rows<const T> known{own.data, own.stride};
        multiply(matrix_of(a.y, first, count, a.dim), scaled(l, join(l, known, first, count, s), s), l.up);
      }
      forward_rows(a, first, first + count);
    }
  });
}

template <typename T>
struct BackwardProblem {
  BackwardRows<T> rows;
  LowRank<T> low;
  Rows<const T> x, own, grad_own;
  Rows<T> grad_past;
  int64_t num_rows;
  bool own_products;

  bool reaches_down() const { return low.columns > 0 && (grad_own || low.own > 0); }
};

// Where a group of chunks adds up its sums over tokens.
struct Sums {
  float *down, *up, *gram, *norm_weight;
  double* others;
};

// Where the sums of all groups are written. That of `down` is float or bfloat16.
struct Results {
  void* down = nullptr;
  bool down_is_float = true;
  float *up = nullptr, *gram = nullptr, *norm_weight = nullptr;
  double* others = nullptr;
  int64_t others_stride = 0;
};

template <typename T>
struct BackwardScratch {
  Small<T> small;
  Buffer<float> g, q, low, weighted, norm_weight;
  Buffer<T> rounded, grad_u, part;
  Products<T> products;

  BackwardScratch(const BackwardProblem<T>& p, int64_t rows)
      : small(p.low, rows),
        g((p.low.rank > 0 || p.reaches_down() ? rows : 1) * p.low.dim),
        q(rows * p.low.rank),
        low(std::is_same_v<T, float> || !p.reaches_down() ? 0 : rows * p.low.dim),
        weighted(p.low.gram.values ? rows * p.low.rank : 0),
        norm_weight(p.low.dim),
        rounded(p.low.rank > 0 ? rows * p.low.dim : 0),
        grad_u(rows * p.low.columns),
        part(std::is_same_v<T, float> ? 0 : std::max({p.low.rank, p.low.columns, rows}) * p.low.dim),
        products{p.own_products, part.get()} {}
};

// g, and what follows from it per element, of a chunk; returns g as an operand of products.
template <typename T>
Rows<const T> backward_pass(const BackwardProblem<T>& p, int64_t first, int64_t last, const Sums& sums,
                            BackwardScratch<T>& s, BackwardRows<T>& a) {
  const int64_t dim = p.low.dim;
  const bool unit = a.alpha.is_one(), as_matrix = p.low.rank > 0;
  Rows<const T> matrix;
  if constexpr (std::is_same_v<T, float>) {
    a.g = as_matrix ? Rows<float>{s.g.get(), dim, first} : Rows<float>{s.g.get(), 0, 0};
    if (unit) a.g = std::exchange(a.grad_branch, {});
    matrix = {a.g.data, a.g.stride, a.g.first};
  } else {
    // Its gradient is rounded once, after the product is added.
    const bool kept = p.reaches_down();
    a.g = kept ? Rows<float>{s.g.get(), dim, first} : Rows<float>{s.g.get(), 0, 0};
    if (kept) a.grad_x = {};
    if (as_matrix) a.rounded = unit ? std::exchange(a.grad_branch, {}) : Rows<T>{s.rounded.get(), dim, first};
    matrix = {a.rounded.data, a.rounded.stride, a.rounded.first};
  }
  for (int64_t r = first; r < last; r += kStrip) {
    // Two levels, so that the float sums stay short.
    if (sums.norm_weight) std::fill_n(s.norm_weight.get(), dim, 0.0f);
    backward_rows(a, r, std::min(r + kStrip, last), s.norm_weight.get(), sums.others);
    if (sums.norm_weight)
      for (int64_t v = 0; v < dim; ++v) sums.norm_weight[v] += s.norm_weight.get()[v];
  }
  return matrix;
}

// From q = g B^T the gradient of x A, [C, S], and that of past.
template <typename T>
Matrix<const T> small_grads(const BackwardProblem<T>& p, int64_t first, int64_t count, const Matrix<const T>& raw,
                            float* grad_gram, BackwardScratch<T>& s) {
  const LowRank<T>& l = p.low;
  const int64_t rank = l.rank;
  const float* gram = l.gram.values;
  if (l.rank == 0) return matrix_of(p.grad_own, first, count, l.columns);
  if constexpr (std::is_same_v<T, float>) {
    if (!gram && !l.past && !p.grad_own && l.own == l.columns) return {s.q.get(), count, rank, rank};
  }
  for (int64_t n = 0; n < count; ++n) {
    const T* sent = p.grad_own[first + n];
    const float *row = s.q.get() + n * rank, *wide = s.small.wide.get() + n * rank, *product = s.small.product.get() + n * rank;
    float factor = 1.0f, of_square = 0.0f;
    if (gram) {
      factor = inverse_rms(l.gram, wide, product);
      for (int64_t j = 0; j < rank; ++j) of_square += row[j] * wide[j];
      of_square *= factor * factor * factor * -0.5f / static_cast<float>(l.dim);
      for (int64_t j = 0; j < rank; ++j) s.weighted.get()[n * rank + j] = of_square * wide[j];
    }
    T *grad_u = s.grad_u.get() + n * l.columns, *grad_past = p.grad_past[first + n];
    for (int64_t j = 0; j < rank; ++j) {
      float value = factor * row[j];
      if (gram) value += 2.0f * of_square * product[j];
      if (j < l.own) {
        store(grad_u[j], sent ? value + widen(sent[j]) : value);
      } else if (grad_past) {
        store(grad_past[j - l.own], value);
      }
    }
    for (int64_t j = l.own; j < l.columns; ++j) store(grad_u[j], sent ? widen(sent[j]) : 0.0f);
  }
  if (gram) {
    const Matrix<const float> wide{s.small.wide.get(), raw.rows, rank, rank};
    add_product({grad_gram, rank, rank, rank}, wide.t(), {s.weighted.get(), raw.rows, rank, rank});
  }
  return {s.grad_u.get(), count, l.columns, l.columns};
}

template <typename T>
void backward_chunk(const BackwardProblem<T>& p, int64_t first, int64_t last, const Sums& sums,
                    BackwardScratch<T>& s) {
  const LowRank<T>& l = p.low;
  const int64_t count = last - first;
  BackwardRows<T> a = p.rows;
  const Rows<const T> g = backward_pass(p, first, last, sums, s, a);
  Matrix<const T> raw{};
  if (l.rank > 0) {
    const Matrix<const T> g_matrix = matrix_of(g, first, count, l.dim);
    raw = join(l, p.own, first, count, s.small);
    s.products.nt(s.q.get(), g_matrix, l.up);
    s.products.add_tn(sums.up, scaled(l, raw, s.small), g_matrix);
  }
  if (l.rank == 0 && !p.reaches_down()) return;
  const Matrix<const T> grad_u = small_grads(p, first, count, raw, sums.gram, s);
  if (!p.reaches_down()) return;
  s.products.add_tn(sums.down, matrix_of(p.x, first, count, l.dim), grad_u);
  if constexpr (std::is_same_v<T, float>) {
    add_product(matrix_of(p.rows.grad_x, first, count, l.dim), grad_u, l.down.t());
  } else {
    s.products.nt(s.low.get(), grad_u, l.down);
    grad_x_rows({a.g.data, a.g.stride, a.g.first}, a.beta, {s.low.get(), l.dim, first}, p.rows.grad_x, l.dim, first,
                last);
  }
}

template <typename T>
void backward_chunks(const BackwardProblem<T>& p, const Results& results) {
  const LowRank<T>& l = p.low;
  const int64_t dim = l.dim, matrices = l.columns + l.rank;
  // Partial sums cost as much as the rows they are for if there are too many.
  const int64_t most = matrices ? std::min(kGroups, p.num_rows / (2 * matrices)) : kNarrowGroups;
  const Cut groups(0, p.num_rows, std::max<int64_t>(1, std::min(most, p.num_rows * dim / kNarrowGrain)));
  const int64_t of_down = dim * l.columns, of_up = dim * l.rank;
  const int64_t of_gram = results.gram ? l.rank * l.rank : 0, of_norm = results.norm_weight ? dim : 0;
  const int64_t columns = p.rows.sum_per_channel ? dim : 1, others = static_cast<int64_t>(p.rows.others.size());
  const int64_t size = of_down + of_up + of_gram + of_norm, parts = groups.parts();
  const Buffer<float> partial(parts * size);
  std::vector<double> partial_others(parts * others * columns);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t most_chunks = least_chunks<T>(groups.step, dim, kBackwardBytes<T>);
    BackwardScratch<T> scratch(p, Cut(0, groups.step, most_chunks).step);
    for (int64_t i = begin; i < end; ++i) {
      float* at = partial.get() + i * size;
      std::fill_n(at, size, 0.0f);
      const Sums sums{at, at + of_down, of_gram ? at + of_down + of_up : nullptr,
                      of_norm ? at + of_down + of_up + of_gram : nullptr,
                      partial_others.data() + i * others * columns};
      const Cut chunks(groups.first(i), groups.last(i), most_chunks);
      for (int64_t c = 0; c < chunks.parts(); ++c)
        backward_chunk(p, chunks.first(c), chunks.last(c), sums, scratch);
    }
  });
  GroupSums total(partial.get(), parts, size);
  if (results.down_is_float) {
    total.next(static_cast<float*>(results.down), of_down);
  } else {
    total.next(static_cast<BFloat16*>(results.down), of_down);
  }
  total.next(results.up, of_up);
  total.next(results.gram, of_gram);
  total.next(results.norm_weight, of_norm);
  total.write();
  for (int64_t j = 0; j < others; ++j) {
    double* to = results.others + j * results.others_stride;
    std::fill_n(to, columns, 0.0);
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t v = 0; v < columns; ++v) to[v] += partial_others[(i * others + j) * columns + v];
  }
}

// Of a norm or sums: what comes together.
void check(bool holds, const char* rule) { STD_TORCH_CHECK(holds, "laurel: ", rule); }

template <typename T>
void forward_as(const Tensor& branch, const Tensor& x, const Optional& down, const Optional& up, const Optional& past,
                const Optional& gram, double low_rank_eps, const std::vector<Tensor>& addends, const Tensor& alpha,
                const Tensor& beta, const Optional& coefficients, const Optional& norm_weight, double norm_eps,
                const Tensor& y, const Optional& own, const Optional& normed, const Optional& rstd) {
  const Shape shape{x.size(0), x.size(1)};
  check(normed.has_value() == norm_weight.has_value() && normed.has_value() == rstd.has_value() &&
            own.has_value() == down.has_value(),
        "norm_weight, normed and rstd come together, and so do down and own");
  const LowRank<T> low(down, up, past, gram, low_rank_eps, shape);
  const ForwardRows<T> rows{wide<const T>(branch, shape),
                            wide<const T>(x, shape),
                            {},
                            wide<const T>(addends, shape),
                            factor(alpha, shape.dim),
                            factor(beta, shape.dim),
                            factors(coefficients, addends.size(), shape.dim),
                            vector(norm_weight, shape.dim),
                            static_cast<float>(norm_eps),
                            wide<T>(y, shape),
                            wide<T>(normed, shape),
                            vector(rstd, shape.rows),
                            shape.dim};
  forward_chunks(rows, low, own ? low.template narrow<T>(*own, shape, low.columns) : Rows<T>(), shape.rows);
}

template <typename T>
void backward_as(const Optional& grad_y, const Optional& grad_normed, const Optional& grad_own, const Tensor& x,
                 const Optional& y, const Optional& branch, const Optional& own, const Optional& rstd,
                 const Optional& down, const Optional& up, const Optional& past, const Optional& gram,
                 double low_rank_eps, const std::vector<Tensor>& addends, const Tensor& alpha, const Tensor& beta,
                 const Optional& coefficients, const Optional& norm_weight, const Tensor& grad_branch,
                 const Tensor& grad_x, const std::vector<Tensor>& grad_addends, const Optional& sums,
                 const Optional& grad_norm_weight, const Optional& grad_down, const Optional& grad_up,
                 const Optional& grad_gram, const Optional& grad_past) {
  const Shape shape{x.size(0), x.size(1)};
  check(!grad_normed || (y && rstd && norm_weight && grad_norm_weight),
        "grad_normed needs y, rstd, norm_weight and grad_norm_weight");
  check(own.has_value() == down.has_value() && grad_down.has_value() == down.has_value() &&
            grad_up.has_value() == up.has_value() && grad_gram.has_value() == gram.has_value() &&
            grad_past.has_value() == past.has_value() && (down || !grad_own),
        "down, up, past and gram come with own and with their gradients");
  BackwardProblem<T> p{{wide<const T>(grad_y, shape),
                        wide<const T>(grad_normed, shape),
                        wide<const T>(y, shape),
                        vector(rstd, shape.rows),
                        vector(norm_weight, shape.dim),
                        factor(alpha, shape.dim),
                        factor(beta, shape.dim),
                        factors(coefficients, grad_addends.size(), shape.dim),
                        {},
                        {},
                        wide<T>(grad_branch, shape),
                        wide<T>(grad_x, shape),
                        wide<T>(grad_addends, shape),
                        {},
                        false,
                        shape.dim},
                       LowRank<T>(down, up, past, gram, low_rank_eps, shape),
                       wide<const T>(x, shape),
                       {},
                       {},
                       {},
                       shape.rows,
                       std::is_same_v<T, BFloat16> && own_products()};
  if (own) p.own = p.low.template narrow<const T>(*own, shape, p.low.columns);
  if (grad_own) p.grad_own = p.low.template narrow<const T>(*grad_own, shape, p.low.columns);
  if (grad_past) p.grad_past = p.low.template narrow<T>(*grad_past, shape, p.low.rank - p.low.own);
  Results results;
  if (sums) {
    check(sums->scalar_type() == ScalarType::Double && sums->dim() == 2 &&
              sums->size(0) == 2 + static_cast<int64_t>(addends.size()) &&
              (sums->size(1) == 1 || sums->size(1) == shape.dim) && packed(*sums, 1),
          "sums must be float64 [2 + addends, 1] or [2 + addends, D]");
    p.rows.others = wide<const T>(addends, shape);
    p.rows.others.insert(p.rows.others.begin(), {branch ? wide<const T>(branch, shape) : p.rows.y, p.x});
    p.rows.sum_per_channel = sums->size(1) > 1;
    results.others = static_cast<double*>(sums->data_ptr());
    results.others_stride = sums->stride(0);
  }
  results.norm_weight = vector(grad_norm_weight, shape.dim);
  if (grad_down) {
    results.down_is_float = grad_down->scalar_type() == ScalarType::Float;
    check((results.down_is_float || grad_down->scalar_type() == ScalarType::BFloat16) && grad_down->dim() == 2 &&
              grad_down->size(0) == shape.dim && grad_down->size(1) == p.low.columns && grad_down->is_contiguous(),
          "grad_down must be contiguous float32 or bfloat16 [D, S]");
    results.down = grad_down->data_ptr();
  }
  results.up = packed_matrix(grad_up, p.low.rank, shape.dim);
  results.gram = packed_matrix(grad_gram, p.low.rank, p.low.rank);
  backward_chunks(p, results);
}

bool is_bfloat16(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check(x.dim() == 2 && x.size(1) > 0 && (type == ScalarType::Float || type == ScalarType::BFloat16),
        "x must be [N, D], float32 or bfloat16");
  return type == ScalarType::BFloat16;
}

void forward(Tensor branch, Tensor x, Optional down, Optional up, Optional past, Optional gram, double low_rank_eps,
             std::vector<Tensor> addends, Tensor alpha, Tensor beta, Optional coefficients, Optional norm_weight,
             double norm_eps, Tensor y, Optional own, Optional normed, Optional rstd) {
  (is_bfloat16(x) ? forward_as<BFloat16> : forward_as<float>)(branch, x, down, up, past, gram, low_rank_eps, addends,
                                                              alpha, beta, coefficients, norm_weight, norm_eps, y, own,
                                                              normed, rstd);
}

void backward(Optional grad_y, Optional grad_normed, Optional grad_own, Tensor x, Optional y, Optional branch,
              Optional own, Optional rstd, Optional down, Optional up, Optional past, Optional gram,
              double low_rank_eps, std::vector<Tensor> addends, Tensor alpha, Tensor beta, Optional coefficients,
              Optional norm_weight, Tensor grad_branch, Tensor grad_x, std::vector<Tensor> grad_addends, Optional sums,
              Optional grad_norm_weight, Optional grad_down, Optional grad_up, Optional grad_gram,
              Optional grad_past) {
  (is_bfloat16(x) ? backward_as<BFloat16> : backward_as<float>)(
      grad_y, grad_normed, grad_own, x, y, branch, own, rstd, down, up, past, gram, low_rank_eps, addends, alpha, beta,
      coefficients, norm_weight, grad_branch, grad_x, grad_addends, sums, grad_norm_weight, grad_down, grad_up,
      grad_gram, grad_past);
}

}  // namespace
}  // namespace laurel
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("laurel_forward_chunks_", TORCH_BOX(&effkern::laurel::forward));
  m.impl("laurel_backward_chunks_", TORCH_BOX(&effkern::laurel::backward));
}
