// Forward and backward of a group of problems, one per lane. Included once for each instruction set, after looped_lanes.h.
namespace effkern {
namespace looped {
namespace EFFKERN_LANES_NAMESPACE {

// Examples that are turned into lanes at a time where all of them are not needed at once.
constexpr int64_t kChunk = 16;

// Hands out vectors of a buffer; without one it only counts.
template <typename T>
struct Arena {
  V<T>* base;
  int64_t used = 0;

  EFFKERN_LANES_TARGET V<T>* take(int64_t count) {
    V<T>* at = base == nullptr ? nullptr : base + used;
    used += count;
    return at;
  }
};

// The recurrence of a group: s <- s + e T r, r <- r - e G T r from s = 0, r = h, with T = A_l^T for factors, else 1. The
// residual r = h - G s has a recurrence of its own because it gets small: a difference would leave its digits behind.
// A state is s, K vectors, and r, K more.
template <typename T>
struct Recurrence {
  int64_t k;
  V<T> *query, *g, *h, *c, *predictions, *change;
  // All but dual: S and b, which factors takes for G and h.
  V<T> *gram, *moment, *rows, *targets;
  // Dual: X and X A.
  V<T> *x, *mapped;

  EFFKERN_LANES_TARGET Recurrence(Arena<T>& arena, const Problem<T>& p) {
    const int64_t d = p.dim, n = p.examples, m = p.queries;
    k = p.state();
    query = arena.take(m * d);
    predictions = arena.take(m);
    const bool dual = p.form == Form::kDual, factors = p.form == Form::kFactors;
    gram = arena.take(dual ? 0 : d * d);
    moment = arena.take(dual ? 0 : d);
    rows = arena.take(dual ? 0 : kChunk * d);
    targets = arena.take(dual ? 0 : kChunk);
    x = arena.take(dual ? n * d : 0);
    mapped = arena.take(dual ? n * d : 0);
    g = factors ? gram : arena.take(k * k);
    h = factors ? moment : arena.take(k);
    c = dual ? arena.take(m * n) : query;
    change = arena.take(factors ? k : 0);
  }
};

template <typename T>
EFFKERN_LANES_TARGET void pack_rows(const Problem<T>& p, int64_t first, int64_t problems, int64_t row, int64_t count,
                                    const Recurrence<T>& s) {
  const int64_t n = p.examples, d = p.dim;
  pack<T>(p.x + (first * n + row) * d, n * d, problems, count * d, s.rows);
  pack<T>(p.y + first * n + row, n, problems, count, s.targets);
}

template <typename T>
EFFKERN_LANES_TARGET void prepare_dual(const Problem<T>& p, int64_t first, int64_t problems, const Recurrence<T>& s) {
  const int64_t n = p.examples, d = p.dim;
  const T mean = T(1) / static_cast<T>(n);
  pack<T>(p.x + first * n * d, n * d, problems, n * d, s.x);
  // (X A)^T = A^T X^T, as numbers that the lanes share stand on the left.
  multiply<T>(grid(p.a, 1, d), grid<V<T>>(s.x, 1, d), d, d, n, {s.mapped, 1, d}, T(1), false);
  multiply<T>(grid<V<T>>(s.x, d, 1), grid<V<T>>(s.mapped, 1, d), n, d, n, {s.g, n, 1}, mean, false);
  multiply<T>(grid<V<T>>(s.query, d, 1), grid<V<T>>(s.mapped, 1, d), p.queries, d, n, {s.c, n, 1}, T(1), false);
  pack<T>(p.y + first * n, n, problems, n, s.h);
  for (int64_t i = 0; i < n; ++i) s.h[i] *= mean;
}

template <typename T>
EFFKERN_LANES_TARGET void prepare_moments(const Problem<T>& p, int64_t first, int64_t problems,
                                          const Recurrence<T>& s) {
  const int64_t n = p.examples, d = p.dim;
  const T mean = T(1) / static_cast<T>(n);
  for (int64_t row = 0; row < n; row += kChunk) {
    const int64_t count = std::min(kChunk, n - row);
    pack_rows(p, first, problems, row, count, s);
    multiply<T>(grid<V<T>>(s.rows, 1, d), grid<V<T>>(s.rows, d, 1), d, count, d, {s.gram, d, 1}, mean, row > 0, true);
    multiply<T>(grid<V<T>>(s.rows, 1, d), s.targets, d, count, s.moment, mean, row > 0);
  }
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < i; ++j) s.gram[i * d + j] = s.gram[j * d + i];
  if (p.form == Form::kFactors) return;
  multiply<T>(grid(p.a, 1, d), grid<V<T>>(s.gram, d, 1), d, d, d, {s.g, d, 1}, T(1), false);
  multiply<T>(grid(p.a, 1, d), s.moment, d, d, s.h, T(1), false);
}

template <typename T>
EFFKERN_LANES_TARGET void prepare(const Problem<T>& p, int64_t first, int64_t problems, const Recurrence<T>& s) {
  pack<T>(p.query + first * p.queries * p.dim, p.queries * p.dim, problems, p.queries * p.dim, s.query);
  if (p.form == Form::kDual) {
    prepare_dual(p, first, problems, s);
  } else {
    prepare_moments(p, first, problems, s);
  }
}

// The state before the first loop.
template <typename T>
EFFKERN_LANES_TARGET void start(const Recurrence<T>& s, V<T>* state) {
  for (int64_t i = 0; i < s.k; ++i) {
    state[i] = V<T>{};
    state[s.k + i] = s.h[i];
  }
}

// The state after `loop`.
template <typename T>
EFFKERN_LANES_TARGET void advance(const Problem<T>& p, const Recurrence<T>& s, int64_t loop, const V<T>* from,
                                  V<T>* to) {
  const int64_t k = s.k;
  const T step = p.step(loop);
  const V<T>* change = from + k;
  if (p.form == Form::kFactors) {
    multiply<T>(grid(p.a + loop * p.a_stride, 1, k), from + k, k, k, s.change, T(1), false);
    change = s.change;
  }
  multiply<T>(grid<V<T>>(s.g, k, 1), change, k, k, to + k, -step, false);
  for (int64_t i = 0; i < k; ++i) {
    to[i] = from[i] + step * change[i];
    to[k + i] += from[k + i];
  }
}

template <typename T>
EFFKERN_LANES_TARGET void clear(V<T>* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = V<T>{};
}

template <typename T>
EFFKERN_LANES_TARGET void copy(const V<T>* from, V<T>* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <typename T>
struct ForwardWork {
  Recurrence<T> s;
  V<T> *now, *next;

  EFFKERN_LANES_TARGET ForwardWork(Arena<T>& arena, const Problem<T>& p)
      : s(arena, p), now(arena.take(2 * s.k)), next(arena.take(2 * s.k)) {}
};

template <typename T>
EFFKERN_LANES_TARGET void forward_group(const Problem<T>& p, int64_t first, int64_t problems, ForwardWork<T>& w,
                                        T* predictions) {
  const Recurrence<T>& s = w.s;
  prepare(p, first, problems, s);
  start(s, w.now);
  for (int64_t loop = 0; loop < p.loops; ++loop) {
    advance<T>(p, s, loop, w.now, w.next);
    std::swap(w.now, w.next);
    if (!p.predicts(loop)) continue;
    multiply<T>(grid<V<T>>(s.c, s.k, 1), w.now, p.queries, s.k, s.predictions, T(1), false);
    unpack<T>(s.predictions, predictions + p.prediction(loop, first), p.queries, problems, p.queries);
  }
}

template <typename T>
struct BackwardWork {
  Recurrence<T> s;
  // Of one segment of loops: states before and after, and what reaches the residuals.
  V<T> *states, *sent;
  V<T> *checkpoints, *costate, *turned;
  V<T> *grad_g, *grad_h, *grad_c, *grad_moment, *grad_gram;
  // Per task: sums over its problems, lane by lane.
  V<T> *grad_a, *grad_steps;
  // Problems as rows, padded to whole groups, for sums over lanes of outer products.
  V<T> *residual_rows, *costate_rows;
  // Dual: of X A and X; the others: of rows and targets.
  V<T> *grad_mapped, *grad_x, *grad_y;

  EFFKERN_LANES_TARGET BackwardWork(Arena<T>& arena, const Problem<T>& p) : s(arena, p) {
    const int64_t k = s.k, d = p.dim, n = p.examples, segment = std::min(p.loops, kSegment);
    const bool dual = p.form == Form::kDual, factors = p.form == Form::kFactors;
    states = arena.take((segment + 1) * 2 * k);
    sent = arena.take(segment * k);
    checkpoints = arena.take((p.loops + kSegment - 1) / kSegment * 2 * k);
    costate = arena.take(k);
    turned = arena.take(k);
    grad_g = arena.take(k * k);
    grad_h = arena.take(k);
    grad_c = arena.take(p.queries * k);
    grad_gram = p.form == Form::kPrimal ? arena.take(d * d) : grad_g;
    grad_moment = p.form == Form::kPrimal ? arena.take(d) : grad_h;
    grad_a = arena.take(factors ? 0 : d * d);
    grad_steps = arena.take(p.loops);
    residual_rows = arena.take(factors ? padded(d) : 0);
    costate_rows = arena.take(factors ? padded(d) : 0);
    grad_mapped = arena.take(dual ? n * d : 0);
    grad_x = arena.take(dual ? n * d : kChunk * d);
    grad_y = arena.take(dual ? 0 : kChunk);
  }
};

// From states[0] through the loops [first, last).
template <typename T>
EFFKERN_LANES_TARGET void run_segment(const Problem<T>& p, BackwardWork<T>& w, int64_t first, int64_t last) {
  const int64_t size = 2 * w.s.k;
  for (int64_t i = 0; i < last - first; ++i)
    advance<T>(p, w.s, first + i, w.states + i * size, w.states + (i + 1) * size);
}

// to [D, padded D] += step * sum over problems of residual costate^T.
template <typename T>
EFFKERN_LANES_TARGET void add_outer(const BackwardWork<T>& w, const V<T>* residual, int64_t problems, T step, T* to) {
  const int64_t k = w.s.k, width = padded(k), vectors = width / kLanes<T>;
  T *left = reinterpret_cast<T*>(w.residual_rows), *right = reinterpret_cast<T*>(w.costate_rows);
  unpack<T>(residual, left, width, problems, k);
  unpack<T>(w.costate, right, width, problems, k);
  multiply<T>(grid<T>(left, 1, width), grid<V<T>>(w.costate_rows, vectors, 1), k, problems, vectors,
              {reinterpret_cast<V<T>*>(to), vectors, 1}, step, true);
}

// Loops [first, last) backwards; `added`: there are sums from later loops.
template <typename T>
EFFKERN_LANES_TARGET void reverse_segment(const Problem<T>& p, const Gradients<T>& grads, int64_t group,
                                          int64_t problems, BackwardWork<T>& w, int64_t first, int64_t last,
                                          bool added) {
  const Recurrence<T>& s = w.s;
  const int64_t k = s.k, m = p.queries, count = last - first;
  for (int64_t i = count - 1; i >= 0; --i) {
    const int64_t loop = first + i;
    const V<T>*before = w.states + i * 2 * k, *residual = before + k, *after = before + 2 * k;
    V<T>* sent = w.sent + i * k;
    const T step = p.step(loop);
    if (p.predicts(loop)) {
      pack<T>(grads.predictions + p.prediction(loop, group), m, problems, m, s.predictions);
      multiply<T>(grid<V<T>>(s.c, 1, k), s.predictions, k, m, w.costate, T(1), true);
      if (grads.x != nullptr || p.form == Form::kDual)
        multiply<T>(grid<V<T>>(s.predictions, 1, 0), grid<V<T>>(after, 0, 1), m, 1, k, {w.grad_c, k, 1}, T(1), true);
    }
    V<T> of_step{};
    if (p.form == Form::kFactors) {
      const T* a = p.a + loop * p.a_stride;
      multiply<T>(grid(a, k, 1), w.costate, k, k, w.turned, T(1), false);
      if (grads.a != nullptr)
        add_outer(w, residual, problems, step, grads.a + (p.a_stride > 0 ? loop * k * padded(k) : 0));
      for (int64_t j = 0; j < k; ++j) {
        of_step += residual[j] * w.turned[j];
        sent[j] = step * w.turned[j];
      }
      multiply<T>(grid<V<T>>(s.g, k, 1), sent, k, k, w.costate, T(-1), true);
    } else {
      multiply<T>(grid<V<T>>(s.g, 1, k), w.costate, k, k, w.turned, T(1), false);
      for (int64_t j = 0; j < k; ++j) {
        of_step += residual[j] * w.costate[j];
        sent[j] = step * w.costate[j];
        w.costate[j] -= step * w.turned[j];
      }
    }
    w.grad_steps[loop] += of_step;
  }
  if (grads.x == nullptr && (grads.a == nullptr || p.form == Form::kFactors)) return;
  multiply<T>(grid<V<T>>(w.sent, 1, k), grid<V<T>>(w.states, 2 * k, 1), k, count, k, {w.grad_g, k, 1}, T(-1), added);
  for (int64_t j = 0; j < k; ++j) {
    V<T> total = added ? w.grad_h[j] : V<T>{};
    for (int64_t i = 0; i < count; ++i) total += w.sent[i * k + j];
    w.grad_h[j] = total;
  }
}

template <typename T>
EFFKERN_LANES_TARGET void finish_dual(const Problem<T>& p, const Gradients<T>& grads, int64_t first, int64_t problems,
                                      BackwardWork<T>& w) {
  const Recurrence<T>& s = w.s;
  const int64_t n = p.examples, d = p.dim, m = p.queries;
  const T mean = T(1) / static_cast<T>(n);
  multiply<T>(grid<V<T>>(w.grad_g, 1, n), grid<V<T>>(s.x, d, 1), n, n, d, {w.grad_mapped, d, 1}, mean, false);
  multiply<T>(grid<V<T>>(w.grad_c, 1, n), grid<V<T>>(s.query, d, 1), n, m, d, {w.grad_mapped, d, 1}, T(1), true);
  if (grads.a != nullptr)
    multiply<T>(grid<V<T>>(s.x, 1, d), grid<V<T>>(w.grad_mapped, d, 1), d, n, d, {w.grad_a, d, 1}, T(1), true);
  if (grads.x == nullptr) return;
  multiply<T>(grid<V<T>>(w.grad_g, n, 1), grid<V<T>>(s.mapped, d, 1), n, n, d, {w.grad_x, d, 1}, mean, false);
  // (dY A^T)^T = A dY^T.
  multiply<T>(grid(p.a, d, 1), grid<V<T>>(w.grad_mapped, 1, d), d, d, n, {w.grad_x, 1, d}, T(1), true);
  unpack<T>(w.grad_x, grads.x + first * n * d, n * d, problems, n * d);
  for (int64_t i = 0; i < n; ++i) w.grad_h[i] *= mean;
  unpack<T>(w.grad_h, grads.y + first * n, n, problems, n);
  // The queries are not needed any more.
  multiply<T>(grid<V<T>>(w.grad_c, n, 1), grid<V<T>>(s.mapped, d, 1), m, n, d, {s.query, d, 1}, T(1), false);
  unpack<T>(s.query, grads.query + first * m * d, m * d, problems, m * d);
}

template <typename T>
EFFKERN_LANES_TARGET void finish_moments(const Problem<T>& p, const Gradients<T>& grads, int64_t first,
                                         int64_t problems, BackwardWork<T>& w) {
  const Recurrence<T>& s = w.s;
  const int64_t n = p.examples, d = p.dim, m = p.queries;
  const T mean = T(1) / static_cast<T>(n);
  if (p.form == Form::kPrimal) {
    if (grads.a != nullptr) {
      multiply<T>(grid<V<T>>(s.gram, d, 1), grid<V<T>>(w.grad_g, 1, d), d, d, d, {w.grad_a, d, 1}, T(1), true);
      multiply<T>(grid<V<T>>(s.moment, 1, 0), grid<V<T>>(w.grad_h, 0, 1), d, 1, d, {w.grad_a, d, 1}, T(1), true);
    }
    if (grads.x == nullptr) return;
    multiply<T>(grid(p.a, d, 1), grid<V<T>>(w.grad_g, d, 1), d, d, d, {w.grad_gram, d, 1}, T(1), false);
    multiply<T>(grid(p.a, d, 1), w.grad_h, d, d, w.grad_moment, T(1), false);
  }
  if (grads.x == nullptr) return;
  for (int64_t i = 0; i < d; ++i) {
    w.grad_moment[i] *= mean;
    for (int64_t j = 0; j <= i; ++j) {
      const V<T> both = mean * (w.grad_gram[i * d + j] + w.grad_gram[j * d + i]);
      w.grad_gram[i * d + j] = w.grad_gram[j * d + i] = both;
    }
  }
  for (int64_t row = 0; row < n; row += kChunk) {
    const int64_t count = std::min(kChunk, n - row);
    pack_rows(p, first, problems, row, count, s);
    multiply<T>(grid<V<T>>(s.rows, d, 1), grid<V<T>>(w.grad_gram, d, 1), count, d, d, {w.grad_x, d, 1}, T(1), false);
    multiply<T>(grid<V<T>>(s.targets, 1, 0), grid<V<T>>(w.grad_moment, 0, 1), count, 1, d, {w.grad_x, d, 1}, T(1),
                true);
    multiply<T>(grid<V<T>>(s.rows, d, 1), w.grad_moment, count, d, w.grad_y, T(1), false);
    unpack<T>(w.grad_x, grads.x + (first * n + row) * d, n * d, problems, count * d);
    unpack<T>(w.grad_y, grads.y + first * n + row, n, problems, count);
  }
  unpack<T>(w.grad_c, grads.query + first * m * d, m * d, problems, m * d);
}

template <typename T>
EFFKERN_LANES_TARGET void backward_group(const Problem<T>& p, const Gradients<T>& grads, int64_t first,
                                         int64_t problems, BackwardWork<T>& w) {
  const int64_t k = w.s.k, size = 2 * k, segments = (p.loops + kSegment - 1) / kSegment;
  prepare(p, first, problems, w.s);
  start(w.s, w.states);
  for (int64_t i = 0; i < segments; ++i) {
    if (i > 0) copy<T>(w.states + kSegment * size, w.states, size);
    copy<T>(w.states, w.checkpoints + i * size, size);
    run_segment(p, w, i * kSegment, std::min((i + 1) * kSegment, p.loops));
  }
  clear<T>(w.costate, k);
  clear<T>(w.grad_c, p.queries * k);
  for (int64_t i = segments - 1; i >= 0; --i) {
    const int64_t begin = i * kSegment, end = std::min(begin + kSegment, p.loops);
    // The states of the last segment are there.
    if (i + 1 < segments) {
      copy<T>(w.checkpoints + i * size, w.states, size);
      run_segment(p, w, begin, end);
    }
    reverse_segment(p, grads, first, problems, w, begin, end, i + 1 < segments);
  }
  if (p.form == Form::kDual) {
    if (grads.x != nullptr || grads.a != nullptr) finish_dual(p, grads, first, problems, w);
  } else {
    finish_moments(p, grads, first, problems, w);
  }
}

// Problems [begin, end); `memory` holds as many bytes as forward_bytes says.
template <typename T>
EFFKERN_LANES_TARGET void forward_problems(const Problem<T>& p, int64_t begin, int64_t end, void* memory,
                                           T* predictions) {
  Arena<T> arena{static_cast<V<T>*>(memory)};
  ForwardWork<T> work(arena, p);
  for (int64_t first = begin; first < end; first += kLanes<T>)
    forward_group(p, first, std::min<int64_t>(kLanes<T>, end - first), work, predictions);
}

// The same backwards: a task. Its sums over problems go to grads.a [loops or 1, D, padded D] and grads.steps [L].
template <typename T>
EFFKERN_LANES_TARGET void backward_problems(const Problem<T>& p, int64_t begin, int64_t end, void* memory,
                                            const Gradients<T>& grads) {
  Arena<T> arena{static_cast<V<T>*>(memory)};
  BackwardWork<T> work(arena, p);
  const int64_t d = p.dim;
  const bool of_matrix = grads.a != nullptr && p.form != Form::kFactors;
  clear<T>(work.grad_steps, p.loops);
  if (of_matrix) clear<T>(work.grad_a, d * d);
  if (p.form == Form::kFactors) clear<T>(work.costate_rows, padded(d));
  for (int64_t first = begin; first < end; first += kLanes<T>)
    backward_group(p, grads, first, std::min<int64_t>(kLanes<T>, end - first), work);
  if (of_matrix)
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) grads.a[i * padded(d) + j] = sum<T>(work.grad_a[i * d + j]);
  if (grads.steps != nullptr)
    for (int64_t loop = 0; loop < p.loops; ++loop) grads.steps[loop] = sum<T>(work.grad_steps[loop]);
}

template <typename T>
EFFKERN_LANES_TARGET int64_t work_bytes(const Problem<T>& p, bool backward) {
  Arena<T> arena{nullptr};
  if (backward) {
    BackwardWork<T> work(arena, p);
  } else {
    ForwardWork<T> work(arena, p);
  }
  return arena.used * static_cast<int64_t>(sizeof(V<T>));
}

template <typename T>
constexpr Kernels<T> kKernels{forward_problems<T>, backward_problems<T>, work_bytes<T>};

}  // namespace EFFKERN_LANES_NAMESPACE
}  // namespace looped
}  // namespace effkern
