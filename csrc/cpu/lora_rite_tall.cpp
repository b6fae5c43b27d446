// effkern::lora_rite_gram and lora_rite_update_ for CPU tensors: what runs over the rows of all factors.
//
// A task is a range of rows of one factor and goes tile by tile: every operand of a tile is read from memory once, all
// products (the vendor's) find it in the second cache. Products are float32, their sums over tiles float64; tasks are
// added up in order. Where a factor has no full rank, all is float64.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/lora_rite.h"

namespace effkern {
namespace lora_rite {
namespace {

// Mean square below which float32 products lose digits to underflow.
constexpr double kLeastSquare = 1e-28;

// GCC clones functions, not templates.
EFFKERN_CLONES void widen_row(const float* x, int64_t size, double* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = x[i];
}

EFFKERN_CLONES void round_row(const double* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = static_cast<float>(x[i]);
}

EFFKERN_CLONES void add_row(const float* x, int64_t size, double* sum) {
  for (int64_t i = 0; i < size; ++i) sum[i] += x[i];
}

// Only a bound on a condition number is made of it: float32 lanes will do.
EFFKERN_CLONES double square_row(const float* x, int64_t size) {
  constexpr int kLanes = 32;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
  for (int l = 0; i + l < size; ++l) lanes[l] += x[i + l] * x[i + l];
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

// Calls f(pointer into x, pointer into a packed tile, size) for the pieces of a tile that are packed in both.
template <class F>
void for_pieces(const Tall& x, int64_t row, int64_t rows, const F& f) {
  if (!x.wide) return f(x.from(row), int64_t{0}, rows * x.rank);
  for (int64_t k = 0; k < x.rank; ++k) f(x.from(row) + k * x.rows, k * rows, rows);
}

// Rows of the tall matrix itself.
Tile<float> tile_at(const Tall& x, int64_t row) { return {x.from(row), x.wide ? x.rows : x.rank, x.wide}; }

// A packed tile in the layout of x.
template <typename T>
Tile<T> packed(const Tall& x, int64_t rows, T* data) {
  return {data, x.wide ? rows : x.rank, x.wide};
}

template <typename T>
Tile<T> strip(const Tile<T>& x, int64_t row) {
  return {x.data + (x.wide ? row : row * x.stride), x.stride, x.wide};
}

// sum += y^T z. Short sums in float32: over many rows they would cost more digits than rounding the inputs does.
void add_cross(int64_t rows, int64_t rank, const Tile<float>& y, const Tile<float>& z, float* product, double* sum) {
  const int64_t step = strip_rows(rank);
  for (int64_t row = 0; row < rows; row += step) {
    cross(std::min(step, rows - row), rank, strip(y, row), strip(z, row), product);
    add_row(product, rank * rank, sum);
  }
}

void widen(const Tall& x, int64_t row, int64_t rows, double* tile) {
  for_pieces(x, row, rows, [&](const float* from, int64_t at, int64_t size) { widen_row(from, size, tile + at); });
}

// 64 bytes of alignment for every tile of every thread: the library's bits may depend on it.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : memory_(size + 64 / sizeof(T)),
        start_(memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64 / sizeof(T)) {}
  T* get() const { return start_; }

 private:
  std::vector<T> memory_;
  T* start_;
};

std::vector<float> rounded(const double* x, int64_t size) { return {x, x + size}; }

// total += (X W)^T (X W) over the task's rows, for W = `by`.
void add_whitened(const Tall& x, const Task& task, const float* by, const Tile<float>& y, float* product,
                  double* total) {
  const int64_t tile = tile_rows(x.rank);
  for (int64_t row = task.begin; row < task.end; row += tile) {
    const int64_t rows = std::min(tile, task.end - row);
    // By rows in both layouts: its Gram matrix is faster.
    times(rows, x.rank, 1.0f, tile_at(x, row), by, 0.0f, y);
    add_cross(rows, x.rank, y, y, product, total);
  }
}

template <typename T>
T magnitude(const T* x, int64_t count) {
  T largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

// The same for products so small that float32 loses digits of them: W is scaled by a power of two, the sum back.
void add_whitened_scaled(const Tall& x, const Task& task, const double* w, const Tile<float>& y, float* product,
                         double* total) {
  const int64_t tile = tile_rows(x.rank), square = x.rank * x.rank;
  float largest = 0;
  for (int64_t row = task.begin; row < task.end; row += tile)
    for_pieces(x, row, std::min(tile, task.end - row), [&](const float* from, int64_t, int64_t size) {
      largest = std::max(largest, magnitude(from, size));
    });
  const double top = magnitude(w, square);
  int of_x = 0, of_w = 0;
  std::frexp(largest, &of_x), std::frexp(top, &of_w);
  // W itself stays a normal float32.
  const int shift = std::clamp(-of_x, -100, 120) - of_w;
  std::vector<float> by(square);
  for (int64_t i = 0; i < square; ++i) by[i] = static_cast<float>(std::ldexp(w[i], shift));
  std::fill_n(total, square, 0.0);
  add_whitened(x, task, by.data(), y, product, total);
  for (int64_t i = 0; i < square; ++i) total[i] = std::ldexp(total[i], -2 * shift);
}

Tensor gram(std::vector<Tensor> tensors, std::vector<bool> wide, std::optional<Tensor> whiten) {
  const std::vector<Tall> xs = talls(tensors, wide);
  const std::vector<Task> tasks = tasks_of(xs);
  const int64_t rank = xs[0].rank, square = rank * rank, count = static_cast<int64_t>(xs.size());
  const int64_t num_tasks = static_cast<int64_t>(tasks.size()), tile = tile_rows(rank);
  const double* w = whiten ? doubles(*whiten, count * square) : nullptr;
  const Tensor result = torch::stable::new_empty(tensors[0], {count, rank, rank}, ScalarType::Double);
  double* out = static_cast<double*>(result.data_ptr());
  std::vector<double> partial(num_tasks * square);
  lapack::parallel_for(num_tasks, [&](int64_t first, int64_t last) {
    Scratch<float> memory(w ? tile * rank : 0), product(square);
    Scratch<double> wide_y(w ? 0 : tile * rank), wide_sum(square);
    const Tile<float> y{memory.get(), rank, false};
    for (int64_t t = first; t < last; ++t) {
      const Task& task = tasks[t];
      const Tall& x = xs[task.factor];
      double* total = partial.data() + t * square;
      if (w) {
        const double* by = w + task.factor * square;
        add_whitened(x, task, rounded(by, square).data(), y, product.get(), total);
        if (trace(total, rank) < kLeastSquare * rank * (task.end - task.begin))
          add_whitened_scaled(x, task, by, y, product.get(), total);
        continue;
      }
      for (int64_t row = task.begin; row < task.end; row += tile) {
        const int64_t rows = std::min(tile, task.end - row);
        widen(x, row, rows, wide_y.get());
        const Tile<double> all = packed(x, rows, wide_y.get());
        cross(rows, rank, all, all, wide_sum.get());
        for (int64_t i = 0; i < square; ++i) total[i] += wide_sum.get()[i];
      }
    }
  });
  std::fill_n(out, count * square, 0.0);
  for (int64_t t = 0; t < num_tasks; ++t)
    for (int64_t i = 0; i < square; ++i) out[tasks[t].factor * square + i] += partial[t * square + i];
  return result;
}

// What a task adds to: y^T y, y^T u and |X|^2.
struct Sums {
  double *gram, *cross, *size;
};

struct Matrices {
  const double *carry, *take, *apply, *whiten;
  double shrink;
};

struct Operands {
  Tall x, m, g;
};

struct FloatMatrices {
  std::vector<float> carry, take, apply, whiten;
  float shrink;

  FloatMatrices(const Matrices& w, int64_t square)
      : carry(rounded(w.carry, square)),
        take(rounded(w.take, square)),
        apply(rounded(w.apply, square)),
        whiten(rounded(w.whiten, square)),
        shrink(static_cast<float>(w.shrink)) {}
};

void add_size(const Tall& x, int64_t row, int64_t rows, double* size) {
  for_pieces(x, row, rows, [&](const float* from, int64_t, int64_t count) { *size += square_row(from, count); });
}

struct Memory {
  Scratch<float> moment, y, u, product;
  Memory(int64_t tile, int64_t rank) : moment(tile * rank), y(tile * rank), u(tile * rank), product(rank * rank) {}
};

void update_task(const Operands& of, const Task& task, const FloatMatrices& w, int64_t tile, const Memory& memory,
                 const Sums& sums) {
  const Tall &x = of.x, &m = of.m;
  const int64_t rank = x.rank;
  for (int64_t row = task.begin; row < task.end; row += tile) {
    const int64_t rows = std::min(tile, task.end - row);
    const Tile<float> own = tile_at(x, row), moment = packed(x, rows, memory.moment.get());
    const Tile<float> y{memory.y.get(), rank, false}, u{memory.u.get(), rank, false};
    times(rows, rank, 1.0f, tile_at(m, row), w.carry.data(), 0.0f, moment);
    times(rows, rank, 1.0f, tile_at(of.g, row), w.take.data(), 1.0f, moment);
    times(rows, rank, 1.0f, own, w.whiten.data(), 0.0f, u);
    times(rows, rank, -1.0f, moment, w.apply.data(), w.shrink, own);
    times(rows, rank, 1.0f, own, w.whiten.data(), 0.0f, y);
    add_cross(rows, rank, y, y, memory.product.get(), sums.gram);
    add_cross(rows, rank, y, u, memory.product.get(), sums.cross);
    for_pieces(m, row, rows, [&](float* to, int64_t at, int64_t size) { std::copy_n(moment.data + at, size, to); });
    add_size(x, row, rows, sums.size);
  }
}

// The same in float64, with y and u = X itself.
void update_task_exact(const Operands& of, const Task& task, const Matrices& w, int64_t tile, const Sums& sums) {
  const Tall &x = of.x, &m = of.m;
  const int64_t rank = x.rank, square = rank * rank;
  Scratch<double> memory(4 * tile * rank), product(square);
  for (int64_t row = task.begin; row < task.end; row += tile) {
    const int64_t rows = std::min(tile, task.end - row);
    double* next = memory.get();
    Tile<double> tiles[4];
    for (Tile<double>& t : tiles) t = packed(x, rows, next), next += tile * rank;
    const auto& [given, moment, before, after] = tiles;
    widen(m, row, rows, given.data);
    times(rows, rank, 1.0, given, w.carry, 0.0, moment);
    widen(of.g, row, rows, given.data);
    times(rows, rank, 1.0, given, w.take, 1.0, moment);
    for_pieces(m, row, rows, [&, &moment = moment](float* to, int64_t at, int64_t size) {
      round_row(moment.data + at, size, to);
    });
    widen(m, row, rows, moment.data);
    widen(x, row, rows, before.data);
    std::copy_n(before.data, rows * rank, after.data);
    times(rows, rank, -1.0, moment, w.apply, w.shrink, after);
    for_pieces(x, row, rows, [&, &after = after](float* to, int64_t at, int64_t size) {
      round_row(after.data + at, size, to);
    });
    widen(x, row, rows, after.data);
    cross(rows, rank, after, after, product.get());
    for (int64_t i = 0; i < square; ++i) sums.gram[i] += product.get()[i];
    cross(rows, rank, after, before, product.get());
    for (int64_t i = 0; i < square; ++i) sums.cross[i] += product.get()[i];
    add_size(x, row, rows, sums.size);
  }
}

std::tuple<Tensor, Tensor, Tensor> update_(std::vector<Tensor> factors, std::vector<Tensor> moments,
                                           std::vector<Tensor> grads, std::vector<bool> wide, Tensor gate, Tensor carry,
                                           Tensor take, Tensor apply, Tensor shrink, Tensor whiten, Tensor exact) {
  const std::vector<Tall> xs = talls(factors, wide), ms = talls(moments, wide), gs = talls(grads, wide);
  const int64_t count = static_cast<int64_t>(xs.size()), rank = xs[0].rank, square = rank * rank;
  check(ms.size() == xs.size() && gs.size() == xs.size(), "factors, moments and grads must be of one length");
  for (int64_t f = 0; f < count; ++f)
    check(ms[f].rows == xs[f].rows && gs[f].rows == xs[f].rows && ms[f].rank == rank && gs[f].rank == rank,
          "moments and grads must have the shapes of their factors");
  check(exact.scalar_type() == ScalarType::Int && exact.is_contiguous() && exact.numel() == count,
        "exact must be int32 [F]");
  const double* numbers[] = {doubles(carry, count * square), doubles(take, count * square),
                             doubles(apply, count * square), doubles(whiten, count * square)};
  const double* keeps = doubles(shrink, count);
  const int32_t* flags = static_cast<const int32_t*>(exact.const_data_ptr());
  const Tensor grams = torch::stable::new_empty(whiten, {count, rank, rank});
  const Tensor crosses = torch::stable::new_empty(whiten, {count, rank, rank});
  const Tensor sizes = torch::stable::new_empty(whiten, {count});
  double* const to[] = {static_cast<double*>(grams.data_ptr()), static_cast<double*>(crosses.data_ptr())};
  double* const size = static_cast<double*>(sizes.data_ptr());
  std::fill_n(to[0], count * square, 0.0);
  std::fill_n(to[1], count * square, 0.0);
  std::fill_n(size, count, 0.0);
  if (!std::isfinite(*doubles(gate, 1))) return {grams, crosses, sizes};

  const std::vector<Task> tasks = tasks_of(xs);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size()), tile = tile_rows(rank), slot = 2 * square + 1;
  std::vector<double> partial(num_tasks * slot);
  lapack::parallel_for(num_tasks, [&](int64_t first, int64_t last) {
    const Memory memory(tile, rank);
    for (int64_t t = first; t < last; ++t) {
      const int64_t f = tasks[t].factor, at = f * square;
      const Matrices w{numbers[0] + at, numbers[1] + at, numbers[2] + at, numbers[3] + at, keeps[f]};
      const Operands of{xs[f], ms[f], gs[f]};
      double* const own = partial.data() + t * slot;
      const Sums sums{own, own + square, own + 2 * square};
      if (flags[f]) update_task_exact(of, tasks[t], w, tile, sums);
      else update_task(of, tasks[t], FloatMatrices(w, square), tile, memory, sums);
    }
  });
  for (int64_t t = 0; t < num_tasks; ++t) {
    const int64_t f = tasks[t].factor;
    const double* sums = partial.data() + t * slot;
    for (int64_t k = 0; k < 2; ++k)
      for (int64_t i = 0; i < square; ++i) to[k][f * square + i] += sums[k * square + i];
    size[f] += sums[2 * square];
  }
  return {grams, crosses, sizes};
}

}  // namespace
}  // namespace lora_rite
}  // namespace effkern

STABLE_TORCH_LIBRARY_IMPL(effkern, CPU, m) {
  m.impl("lora_rite_gram", TORCH_BOX(&effkern::lora_rite::gram));
  m.impl("lora_rite_update_", TORCH_BOX(&effkern::lora_rite::update_));
}
