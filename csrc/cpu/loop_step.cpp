// effkern::loop_step_fwd and loop_step_bwd for CPU tensors: the step between two loops, forward and backward.
//
//   N tokens, D channels, R columns of A (down) and rows of B (up)
//
// Without a low-rank map each row is read once. With one, a chunk of rows stays in a thread's second-level cache between
// its products and the passes over its rows. Sums over tokens are made per group of rows and added up in order.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/loop_step_operands.h"
#include "cpu/row_chunks.h"

namespace effkern {
namespace loop_step {
namespace {

// Bytes of h in a chunk, which shares a cache of 1 or 2 MiB with what goes with it.
constexpr int64_t kChunkBytes = 1 << 18;
// Elements below which handing a task to another thread costs more than it saves.
constexpr int64_t kGrain = 1 << 15;
// Groups of a backward pass; partial sums of matrices are large.
constexpr int64_t kGroups = 64, kMatrixGroups = 16;

template <typename T>
void forward_chunks(ForwardRows<T> a, const LowRank<T>& l, const Rows<T>& own, int64_t rows) {
  const int64_t dim = a.dim;
  if (l.rank == 0) {
    const int64_t grain = std::max<int64_t>(1, kGrain / dim);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const Buffer<float> scratch(a.norm ? dim : 0);
      forward_rows(a, begin, end, scratch.get());
    });
    return;
  }
  a.low = {a.state.data, dim};
  const int64_t parts = std::min(kChunks, std::max<int64_t>(1, rows * dim / kGrain));
  const Cut chunks(0, rows, std::max(parts, least_chunks<T>(rows, dim, kChunkBytes)));
  torch::stable::parallel_for(0, chunks.parts(), 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(dim);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = chunks.first(c), count = chunks.last(c) - first;
      const auto u = matrix_of(own, first, count, l.rank);
      multiply(u, matrix_of(a.h, first, count, dim), l.down);
      multiply(matrix_of(a.state, first, count, dim), u, l.up);
      forward_rows(a, first, first + count, scratch.get());
    }
  });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_as(
    const Tensor& f, const Tensor& h, const Optional& e, const Factors& factors, bool is_f, bool has_core_input,
    const Optional& down, const Optional& up, const Optional& norm_weight, const Optional& embedding, bool norm,
    double eps, bool return_change) {
  const Shape shape(h);
  const LowRank<T> low(down, up, shape.dim);
  const Weight weight(norm_weight, norm, false, shape.dim);
  const auto numbers = [&](bool wanted) { return empty(h, {wanted ? shape.rows : 0}, ScalarType::Float); };
  const Tensor state = is_f ? empty(h, {0}) : result_like(h);
  const Tensor core_input = has_core_input ? result_like(h) : empty(h, {0});
  const Tensor change = numbers(return_change), rstd = numbers(norm);
  const Tensor own = low.rank > 0 ? empty(h, {shape.rows, low.rank}) : empty(h, {0});
  const ForwardRows<T> rows{stream<const T>(f, shape),
                            stream<const T>(h, shape),
                            stream<const T>(e, shape),
                            {},
                            factors.alpha,
                            factors.beta,
                            factors.state_scale,
                            factors.input_scale,
                            weight.values,
                            vector(embedding, shape.dim),
                            norm,
                            static_cast<float>(eps),
                            is_f ? Rows<T>() : stream<T>(state, shape),
                            has_core_input ? stream<T>(core_input, shape) : Rows<T>(),
                            static_cast<float*>(rstd.data_ptr()),
                            return_change ? static_cast<float*>(change.data_ptr()) : nullptr,
                            shape.dim};
  forward_chunks(rows, low, {static_cast<T*>(own.data_ptr()), low.rank}, shape.rows);
  return {state, core_input, change, rstd, own};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor f, Tensor h, Optional e, Optional alpha, Optional beta, Optional state_scale, Optional input_scale,
    std::vector<double> numbers, Optional down, Optional up, Optional norm_weight, Optional embedding, bool norm,
    double eps, bool return_change) {
  const Factors factors({&alpha, &beta, &state_scale, &input_scale}, numbers, Shape(h).dim);
  const bool has_core_input = e || embedding || state_scale || numbers[2] != 1.0;
  // The state is f itself: there is nothing to write.
  const bool is_f = !alpha && numbers[0] == 1.0 && !factors.beta.values && !down && !norm;
  return (h.scalar_type() == ScalarType::BFloat16 ? forward_as<BFloat16> : forward_as<float>)(
      f, h, e, factors, is_f, has_core_input, down, up, norm_weight, embedding, norm, eps, return_change);
}

template <typename T>
struct BackwardProblem {
  BackwardRows<T> rows;
  LowRank<T> low;
  Rows<const T> own;
  int64_t num_rows;
  bool of_h, of_down, of_up, own_products;

  bool products() const { return low.rank > 0 && (of_h || of_down || of_up); }
  bool recomputes_low() const { return low.rank > 0 && rows.norm && !rows.from_state; }
};

template <typename T>
struct Scratch {
  Buffer<float> rows, strips, g, q, wide;
  Buffer<T> rounded, grad_u, low, part;
  Products<T> products;

  Scratch(const BackwardProblem<T>& p, int64_t count, int64_t strip_size)
      : rows(2 * p.rows.dim),
        strips(strip_size),
        g(std::is_same_v<T, float> || !p.products() ? 0 : count * p.rows.dim),
        q(p.products() ? count * p.low.rank : 0),
        wide(std::is_same_v<T, float> || !p.products() ? 0 : count * p.rows.dim),
        rounded(p.products() ? count * p.rows.dim : 0),
        grad_u(std::is_same_v<T, float> || !p.products() ? 0 : count * p.low.rank),
        low(p.recomputes_low() ? count * p.rows.dim : 0),
        part(std::is_same_v<T, float> || !p.products() ? 0 : std::max(p.low.rank, count) * p.rows.dim),
        products{p.own_products, part.get()} {
    std::fill_n(strips.get(), strip_size, 0.0f);
  }
};

// One chunk of rows; `grad_down` and `grad_up` are added to.
template <typename T>
void backward_chunk(const BackwardProblem<T>& p, int64_t first, int64_t last, const Sums& sums, float* grad_down,
                    float* grad_up, Scratch<T>& s) {
  const LowRank<T>& l = p.low;
  const int64_t count = last - first, dim = p.rows.dim;
  BackwardRows<T> a = p.rows;
  const auto u = matrix_of(p.own, first, count, l.rank);
  if (p.recomputes_low()) {
    multiply(Matrix<T>{s.low.get(), count, dim, dim}, u, l.up);
    a.low = {s.low.get(), dim, first};
  }
  if (!p.products()) return backward_rows(a, first, last, sums, s.rows.get());
  const bool shared = a.grad_f && a.alpha.is_one();
  const Rows<T> g = shared ? a.grad_f : Rows<T>{s.rounded.get(), dim, first};
  if (!shared) a.rounded = g;
  const Rows<T> grad_h = a.grad_h;
  if constexpr (std::is_same_v<T, float>) {
    if (!a.beta.values) a.grad_h = {};
  } else {
    // Rounded once, with the product added.
    a.g = {s.g.get(), dim, first};
    a.grad_h = {};
  }
  backward_rows(a, first, last, sums, s.rows.get());
  const Matrix<const T> g_matrix = matrix_of(Rows<const T>{g.data, g.stride, g.first}, first, count, dim);
  if (p.of_up) s.products.add_tn(grad_up, u, g_matrix);
  if (!p.of_h && !p.of_down) return;
  s.products.nt(s.q.get(), g_matrix, l.up);
  Matrix<const T> grad_u;
  if constexpr (std::is_same_v<T, float>) {
    grad_u = {s.q.get(), count, l.rank, l.rank};
  } else {
    for (int64_t i = 0; i < count * l.rank; ++i) store(s.grad_u.get()[i], s.q.get()[i]);
    grad_u = {s.grad_u.get(), count, l.rank, l.rank};
  }
  if (p.of_down) s.products.add_tn(grad_down, matrix_of(a.h, first, count, dim), grad_u);
  if (!p.of_h) return;
  if constexpr (std::is_same_v<T, float>) {
    const auto out = matrix_of(grad_h, first, count, dim);
    a.beta.values ? add_product(out, grad_u, l.down.t()) : multiply(out, grad_u, l.down.t());
  } else {
    const float zero = 0.0f;
    s.products.nt(s.wide.get(), grad_u, l.down);
    grad_x_rows({a.g.data, a.g.stride, a.g.first}, a.beta.values ? a.beta : Factor{&zero, false},
                {s.wide.get(), dim, first}, grad_h, dim, first, last);
  }
}

// Where the sums of the wanted slots lie in memory of `size` numbers, all of a kind.
struct Layout {
  int64_t offset[kSlots] = {}, width[kSlots] = {}, size = 0;
};

template <typename T>
void backward_chunks(const BackwardProblem<T>& p, const Layout& layout, float* const (&results)[kSlots],
                     float* grad_down, float* grad_up) {
  const int64_t dim = p.rows.dim, matrix = p.low.rank * dim;
  // Partial sums cost as much as the rows they are for if there are too many.
  const int64_t most = p.products() ? std::min(kMatrixGroups, p.num_rows / (4 * p.low.rank)) : kGroups;
  const Cut groups(0, p.num_rows, std::max<int64_t>(1, std::min(most, p.num_rows * dim / kGrain)));
  const int64_t parts = groups.parts(), of_down = p.of_down ? matrix : 0, of_up = p.of_up ? matrix : 0;
  std::vector<double> totals(parts * layout.size);
  // The first group adds to the results themselves.
  const Buffer<float> partial(std::max<int64_t>(0, parts - 1) * (of_down + of_up));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const bool chunked = p.products() || p.recomputes_low();
    const int64_t most_chunks = chunked ? least_chunks<T>(groups.step, dim, kChunkBytes) : 1;
    Scratch<T> scratch(p, Cut(0, groups.step, most_chunks).step, layout.size);
    for (int64_t i = begin; i < end; ++i) {
      Sums sums;
      for (int slot = 0; slot < kSlots; ++slot) {
        if (layout.width[slot] == 0) continue;
        sums.total[slot] = totals.data() + i * layout.size + layout.offset[slot];
        sums.per_channel[slot] = layout.width[slot] > 1 || slot == kEmbedding || slot == kNormWeight;
        if (sums.per_channel[slot]) sums.strip[slot] = scratch.strips.get() + layout.offset[slot];
      }
      float *down = grad_down, *up = grad_up;
      if (i > 0) {
        down = partial.get() + (i - 1) * (of_down + of_up);
        up = down + of_down;
        std::fill_n(down, of_down + of_up, 0.0f);
      } else {
        std::fill_n(down, of_down, 0.0f);
        std::fill_n(up, of_up, 0.0f);
      }
      const Cut chunks(groups.first(i), groups.last(i), most_chunks);
      for (int64_t c = 0; c < chunks.parts(); ++c)
        backward_chunk(p, chunks.first(c), chunks.last(c), sums, down, up, scratch);
    }
  });
  const auto join = [&](float* to, int64_t offset, int64_t count) {
    torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = 1; i < parts; ++i) {
        const float* from = partial.get() + (i - 1) * (of_down + of_up) + offset;
        for (int64_t v = begin; v < end; ++v) to[v] += from[v];
      }
    });
  };
  if (parts == 0) {
    std::fill_n(grad_down, of_down, 0.0f);
    std::fill_n(grad_up, of_up, 0.0f);
  }
  join(grad_down, 0, of_down);
  join(grad_up, of_down, of_up);
  for (int slot = 0; slot < kSlots; ++slot) {
    const int64_t width = layout.width[slot];
    for (int64_t v = 0; v < width; ++v) {
      double total = 0.0;
      for (int64_t i = 0; i < parts; ++i) total += totals[i * layout.size + layout.offset[slot] + v];
      results[slot][v] = static_cast<float>(total);
    }
  }
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Grads backward_as(const Tensor& like, const Optional& grad_state, const Optional& grad_core_input, const Optional& f,
                  const Optional& h, const Optional& e, const Optional& state, const Optional& rstd,
                  const Optional& own, const Factors& factors, const Optional& down, const Optional& up,
                  const Optional& norm_weight, bool norm, bool from_state, int64_t wanted) {
  const auto asked = [&](Wanted what) { return (wanted >> what & 1) != 0; };
  const Shape shape(like);
  const int64_t dim = shape.dim;
  const LowRank<T> low(down, up, dim);
  const Weight weight(norm_weight, norm, norm && from_state, dim);
  check(!norm || rstd, "a norm needs rstd");
  check(!norm || (from_state ? state.has_value() : f && (h || !factors.beta.values)),
        "a norm needs state, or f and h");
  check(!asked(kOfAlpha) || f, "alpha's gradient needs f");
  check(!asked(kOfBeta) || h, "beta's gradient needs h");
  check(low.rank == 0 || !asked(kOfDown) || h, "down's gradient needs h");
  const bool needs_own = asked(kOfUp) || (norm && !from_state);
  check(low.rank == 0 || !needs_own || own, "up's gradient and a norm need own");
  check(grad_core_input || (!asked(kOfE) && !asked(kOfStateScale) && !asked(kOfInputScale) && !asked(kOfEmbedding)),
        "what x alone reads gets its gradient from grad_core_input");
  check(!asked(kOfStateScale) || state, "state_scale's gradient needs state");
  check(!asked(kOfInputScale) || e, "input_scale's gradient needs e");

  const auto wide = [&](Wanted what) { return asked(what) ? torch::stable::empty_like(like) : empty(like, {0}); };
  const auto narrow = [&](Wanted what, int64_t size) {
    return empty(like, {asked(what) ? size : 0}, ScalarType::Float);
  };
  const auto width = [&](const Factor& factor) { return factor.per_channel ? dim : int64_t{1}; };
  const Tensor grad_f = wide(kOfF), grad_h = wide(kOfH), grad_e = wide(kOfE);
  const Tensor small[kSlots] = {narrow(kOfAlpha, width(factors.alpha)),
                                narrow(kOfBeta, width(factors.beta)),
                                narrow(kOfStateScale, width(factors.state_scale)),
                                narrow(kOfInputScale, width(factors.input_scale)),
                                narrow(kOfEmbedding, dim),
                                narrow(kOfWeight, dim)};
  const auto of_matrix = [&](Wanted what, int64_t rows, int64_t columns) {
    return asked(what) ? empty(like, {rows, columns}, ScalarType::Float) : empty(like, {0}, ScalarType::Float);
  };
  const Tensor grad_down = of_matrix(kOfDown, dim, low.rank), grad_up = of_matrix(kOfUp, low.rank, dim);

  const auto out = [&](Wanted what, const Tensor& x) { return asked(what) ? stream<T>(x, shape) : Rows<T>(); };
  const Rows<const T> own_rows{own ? static_cast<const T*>(own->const_data_ptr()) : nullptr, low.rank};
  check(!own_rows || (own->numel() == shape.rows * low.rank && own->scalar_type() == type_of<T>()),
        "own must be [N, R] of h's dtype");
  // A term that is absent passes nothing on.
  const bool of_h = asked(kOfH) && (factors.beta.values || low.rank > 0);
  check(!asked(kOfH) || of_h, "h gets a gradient by beta or down alone");
  const BackwardProblem<T> p{{stream<const T>(grad_state, shape),
                              stream<const T>(grad_core_input, shape),
                              stream<const T>(f, shape),
                              stream<const T>(h, shape),
                              stream<const T>(e, shape),
                              stream<const T>(state, shape),
                              {},
                              factors.alpha,
                              factors.beta,
                              factors.state_scale,
                              factors.input_scale,
                              weight.values,
                              weight.inverse.get(),
                              vector(rstd, shape.rows),
                              norm,
                              from_state,
                              {},
                              {},
                              out(kOfF, grad_f),
                              out(kOfH, grad_h),
                              out(kOfE, grad_e),
                              dim},
                             low,
                             own_rows,
                             shape.rows,
                             of_h,
                             low.rank > 0 && asked(kOfDown),
                             low.rank > 0 && asked(kOfUp),
                             std::is_same_v<T, BFloat16> && low.rank > 0 && own_products()};
  Layout layout;
  float* results[kSlots];
  for (int slot = 0; slot < kSlots; ++slot) {
    layout.offset[slot] = layout.size;
    layout.width[slot] = small[slot].numel();
    layout.size += layout.width[slot];
    results[slot] = static_cast<float*>(small[slot].data_ptr());
  }
  backward_chunks(p, layout, results, static_cast<float*>(grad_down.data_ptr()),
                  static_cast<float*>(grad_up.data_ptr()));
  return {grad_f,
          grad_h,
          grad_e,
          small[kAlpha],
          small[kBeta],
          small[kStateScale],
          small[kInputScale],
          grad_down,
          grad_up,
          small[kNormWeight],
          small[kEmbedding]};
}

Grads backward(Optional grad_state, Optional grad_core_input, Optional f, Optional h, Optional e, Optional state,
               Optional rstd, Optional own, Optional alpha, Optional beta, Optional state_scale, Optional input_scale,
               std::vector<double> numbers, Optional down, Optional up, Optional norm_weight, bool norm,
               bool from_state, int64_t wanted) {
  check(grad_state || grad_core_input, "grad_state or grad_core_input must be there");
  const Tensor& like = grad_state ? *grad_state : *grad_core_input;
  const Factors factors({&alpha, &beta, &state_scale, &input_scale}, numbers, Shape(like).dim);
  return (like.scalar_type() == ScalarType::BFloat16 ? backward_as<BFloat16> : backward_as<float>)(
      like, grad_state, grad_core_input, f, h, e, state, rstd, own, factors, down, up, norm_weight, norm, from_state,
      wanted);
}

}  // namespace
}  // namespace loop_step
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("loop_step_fwd", TORCH_BOX(&effkern::loop_step::forward));
  m.impl("loop_step_bwd", TORCH_BOX(&effkern::loop_step::backward));
}
