// Vectors with one problem per lane, and products of matrices of such vectors. Included once for each instruction set,
// hence no guard; the file that includes it names EFFKERN_LANES_NAMESPACE, EFFKERN_LANES_TARGET, EFFKERN_LANES_BYTES and
// EFFKERN_LANES_ROWS. Every function carries the target, as vectors wider than the target's own are taken apart before
// anything is inlined.
namespace effkern {
namespace looped {
namespace EFFKERN_LANES_NAMESPACE {

#define LANES_INLINE EFFKERN_LANES_TARGET inline __attribute__((always_inline))

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(EFFKERN_LANES_BYTES)));
  typedef float loose __attribute__((vector_size(EFFKERN_LANES_BYTES), may_alias, aligned(4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(EFFKERN_LANES_BYTES)));
  typedef double loose __attribute__((vector_size(EFFKERN_LANES_BYTES), may_alias, aligned(8)));
};

template <typename T>
using V = typename Vector<T>::type;
template <typename T>
constexpr int kLanes = EFFKERN_LANES_BYTES / static_cast<int>(sizeof(T));

// Element (i, j) at data[i * row + j * column].
template <typename E>
struct Grid {
  E* data;
  int64_t row, column;

  operator Grid<const E>() const { return {data, row, column}; }
};
template <typename E>
LANES_INLINE Grid<const E> grid(const E* data, int64_t row, int64_t column) {
  return {data, row, column};
}

// out[R][C] (+)= scale a b; `a` holds vectors, or numbers that all lanes share.
template <int R, int C, typename T, typename E>
LANES_INLINE void tile(const E* a, int64_t a_row, int64_t a_depth, const V<T>* b, int64_t b_depth, int64_t b_column,
                       int64_t depth, V<T>* out, int64_t out_row, int64_t out_column, T scale, bool add) {
  V<T> sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = V<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    V<T> right[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) right[c] = b[k * b_depth + c * b_column];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] += a[r * a_row + k * a_depth] * right[c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      V<T>& to = out[r * out_row + c * out_column];
      to = add ? to + scale * sums[r][c] : scale * sums[r][c];
    }
}

// R rows of a product from column `first`: C columns at a time, then two, then one.
template <int R, int C, typename T, typename E>
LANES_INLINE void strip(Grid<const E> a, Grid<const V<T>> b, int64_t r, int64_t first, int64_t columns, int64_t depth,
                        Grid<V<T>> out, T scale, bool add) {
  const E* left = a.data + r * a.row;
  V<T>* to = out.data + r * out.row;
  int64_t c = first;
  for (; c + C <= columns; c += C)
    tile<R, C, T>(left, a.row, a.column, b.data + c * b.column, b.row, b.column, depth, to + c * out.column, out.row,
                  out.column, scale, add);
  for (; c + 2 <= columns; c += 2)
    tile<R, 2, T>(left, a.row, a.column, b.data + c * b.column, b.row, b.column, depth, to + c * out.column, out.row,
                  out.column, scale, add);
  for (; c < columns; ++c)
    tile<R, 1, T>(left, a.row, a.column, b.data + c * b.column, b.row, b.column, depth, to + c * out.column, out.row,
                  out.column, scale, add);
}

// out [rows, columns] (+)= scale a [rows, depth] b [depth, columns]. `upper`: of a symmetric result at least the part
// on and above the diagonal.
template <typename T, typename E>
EFFKERN_LANES_TARGET void multiply(Grid<const E> a, Grid<const V<T>> b, int64_t rows, int64_t depth, int64_t columns,
                                   Grid<V<T>> out, T scale, bool add, bool upper = false) {
  constexpr int kRows = EFFKERN_LANES_ROWS, kColumns = 4;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    strip<kRows, kColumns, T>(a, b, r, upper ? r : 0, columns, depth, out, scale, add);
  for (; r < rows; ++r) strip<1, kColumns, T>(a, b, r, upper ? r : 0, columns, depth, out, scale, add);
}

// out [rows] (+)= scale a [rows, depth] b [depth]: more rows at a time, so that sums do not wait for each other.
template <typename T, typename E>
EFFKERN_LANES_TARGET void multiply(Grid<const E> a, const V<T>* b, int64_t rows, int64_t depth, V<T>* out, T scale,
                                   bool add) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    tile<8, 1, T>(a.data + r * a.row, a.row, a.column, b, 1, 0, depth, out + r, 1, 0, scale, add);
  for (; r + 4 <= rows; r += 4)
    tile<4, 1, T>(a.data + r * a.row, a.row, a.column, b, 1, 0, depth, out + r, 1, 0, scale, add);
  for (; r < rows; ++r)
    tile<1, 1, T>(a.data + r * a.row, a.row, a.column, b, 1, 0, depth, out + r, 1, 0, scale, add);
}

template <typename T>
LANES_INLINE T sum(V<T> x) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += x[l];
  return total;
}

// Every other number of both, of the lower and of the upper halves.
template <typename T>
LANES_INLINE V<T> zip_low(V<T> a, V<T> b) {
  if constexpr (kLanes<T> == 16) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (kLanes<T> == 8) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (kLanes<T> == 4) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <typename T>
LANES_INLINE V<T> zip_high(V<T> a, V<T> b) {
  if constexpr (kLanes<T> == 16) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (kLanes<T> == 8) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (kLanes<T> == 4) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// A square of vectors: interleaving the two halves once for each bit of an index turns it over.
template <typename T>
LANES_INLINE void transpose(V<T> (&x)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes<T>; bit *= 2) {
    V<T> y[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      y[2 * i] = zip_low<T>(x[i], x[i + kHalf]);
      y[2 * i + 1] = zip_high<T>(x[i], x[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) x[i] = y[i];
  }
}

// `count` numbers of each of `problems` problems, `stride` apart, to one vector per number; other lanes are 0.
template <typename T>
EFFKERN_LANES_TARGET void pack(const T* from, int64_t stride, int64_t problems, int64_t count, V<T>* to) {
  constexpr int kN = kLanes<T>;
  using Loose = typename Vector<T>::loose;
  int64_t e = 0;
  for (; e + kN <= count; e += kN) {
    V<T> x[kN];
    for (int p = 0; p < kN; ++p)
      x[p] = p < problems ? static_cast<V<T>>(*reinterpret_cast<const Loose*>(from + p * stride + e)) : V<T>{};
    transpose<T>(x);
    for (int i = 0; i < kN; ++i) to[e + i] = x[i];
  }
  for (; e < count; ++e) {
    V<T> x{};
    for (int p = 0; p < problems; ++p) x[p] = from[p * stride + e];
    to[e] = x;
  }
}

// The way back; lanes without a problem are left out.
template <typename T>
EFFKERN_LANES_TARGET void unpack(const V<T>* from, T* to, int64_t stride, int64_t problems, int64_t count) {
  constexpr int kN = kLanes<T>;
  using Loose = typename Vector<T>::loose;
  int64_t e = 0;
  for (; e + kN <= count; e += kN) {
    V<T> x[kN];
    for (int i = 0; i < kN; ++i) x[i] = from[e + i];
    transpose<T>(x);
    for (int p = 0; p < problems; ++p) *reinterpret_cast<Loose*>(to + p * stride + e) = x[p];
  }
  for (; e < count; ++e)
    for (int p = 0; p < problems; ++p) to[p * stride + e] = from[e][p];
}

}  // namespace EFFKERN_LANES_NAMESPACE
}  // namespace looped
}  // namespace effkern
