// Small matrix products and elementwise functions on tiles that lie in a core's cache.
// All matrices are row-major. A product is vectorised over the columns of its right factor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// No number that the loop after this writes is read at another index.
#ifdef __clang__
#define NESTLEARN_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define NESTLEARN_APART _Pragma("GCC ivdep")
#endif

template <typename T>
struct Simd {
  typedef T type __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  static constexpr int width = 32 / sizeof(T);
};

// What of a product is needed: all; only the lower triangle of the result; or the left factor is triangular.
enum class Shape { Full, OutLower, LeftLower, LeftUpper };

// MR rows of C by two vectors. A lies row by row, with `a_step` from row to row, or else column by column.
template <typename T, int MR, bool ROWS>
inline void micro(int k, const T* a, std::ptrdiff_t a_step, const T* b, int ldb, T* c, int ldc, T alpha, bool add) {
  typedef typename Simd<T>::type vec;
  constexpr int w = Simd<T>::width;
  vec acc[MR][2];
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = vec{};
#pragma GCC unroll 4
  for (int p = 0; p < k; ++p) {
    const vec b0 = *reinterpret_cast<const vec*>(b + std::ptrdiff_t(p) * ldb);
    const vec b1 = *reinterpret_cast<const vec*>(b + std::ptrdiff_t(p) * ldb + w);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const T x = ROWS ? a[i * a_step + p] : a[p * a_step + i];
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
  for (int i = 0; i < MR; ++i) {
    vec* out = reinterpret_cast<vec*>(c + std::ptrdiff_t(i) * ldc);
    vec* out1 = reinterpret_cast<vec*>(c + std::ptrdiff_t(i) * ldc + w);
    if (add) {
      *out += alpha * acc[i][0];
      *out1 += alpha * acc[i][1];
    } else {
      *out = alpha * acc[i][0];
      *out1 = alpha * acc[i][1];
    }
  }
}

template <typename T, bool ROWS>
void product(int m, int n, int k, const T* a, std::ptrdiff_t a_step, const T* b, int ldb, T* c, int ldc, T alpha,
             bool add, Shape shape) {
  constexpr int nr = 2 * Simd<T>::width;
  constexpr int mr = 6;
  for (int i = 0; i < m; i += mr) {
    const int rows = std::min(mr, m - i);
    int columns = n, first = 0, last = k;
    if (shape == Shape::OutLower) columns = std::min(n, (i + rows + nr - 1) / nr * nr);
    if (shape == Shape::LeftLower) last = std::min(k, i + rows);
    if (shape == Shape::LeftUpper) first = std::min(k, i);
    const T* ai = a + (ROWS ? i * a_step + first : first * a_step + i);
    const T* bi = b + std::ptrdiff_t(first) * ldb;
    T* ci = c + std::ptrdiff_t(i) * ldc;
    const int depth = last - first;
    int j = 0;
    for (; j + nr <= columns; j += nr) {
      switch (rows) {
        case 6: micro<T, 6, ROWS>(depth, ai, a_step, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 5: micro<T, 5, ROWS>(depth, ai, a_step, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 4: micro<T, 4, ROWS>(depth, ai, a_step, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 3: micro<T, 3, ROWS>(depth, ai, a_step, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 2: micro<T, 2, ROWS>(depth, ai, a_step, bi + j, ldb, ci + j, ldc, alpha, add); break;
        default: micro<T, 1, ROWS>(depth, ai, a_step, bi + j, ldb, ci + j, ldc, alpha, add);
      }
    }
    for (; j < columns; ++j) {
      for (int r = 0; r < rows; ++r) {
        T sum = 0;
        for (int p = 0; p < depth; ++p)
          sum += ai[ROWS ? r * a_step + p : p * a_step + r] * bi[std::ptrdiff_t(p) * ldb + j];
        T& out = ci[std::ptrdiff_t(r) * ldc + j];
        out = add ? out + alpha * sum : alpha * sum;
      }
    }
  }
}

// C (m x n) = [C +] alpha A B, with A(i, p) = a[i * a_row + p * a_col] (m x k), one of the two strides 1, and B (k x n)
// with row stride ldb.
// For OutLower, entries above the diagonal may be written or not.
template <typename T>
void gemm(int m, int n, int k, const T* a, std::ptrdiff_t a_row, std::ptrdiff_t a_col, const T* b, int ldb, T* c,
          int ldc, T alpha = 1, bool add = false, Shape shape = Shape::Full) {
  if (a_col == 1)
    product<T, true>(m, n, k, a, a_row, b, ldb, c, ldc, alpha, add, shape);
  else
    product<T, false>(m, n, k, a, a_col, b, ldb, c, ldc, alpha, add, shape);
}

#ifdef __AVX2__
// An 8 x 8 block of single precision, in registers.
inline void transpose_block(const float* from, std::ptrdiff_t ld_from, float* to, std::ptrdiff_t ld_to) {
  __m256 r[8], u[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * ld_from);
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    u[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(u[i], u[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(u[i], u[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(u[i + 1], u[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

template <typename T>
inline void transpose_block(const T* from, std::ptrdiff_t ld_from, T* to, std::ptrdiff_t ld_to) {
  for (int x = 0; x < 8; ++x)
    for (int y = 0; y < 8; ++y) to[y * ld_to + x] = from[x * ld_from + y];
}

// Rows and columns exchanged: (rows x columns) -> (columns x rows).
template <typename T>
void transpose(int rows, int columns, const T* from, int ld_from, T* to, int ld_to) {
  const int whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int i = 0; i < whole_rows; i += 8)
    for (int j = 0; j < whole_columns; j += 8)
      transpose_block(from + std::ptrdiff_t(i) * ld_from + j, ld_from, to + std::ptrdiff_t(j) * ld_to + i, ld_to);
  for (int x = 0; x < rows; ++x)
    for (int y = x < whole_rows ? whole_columns : 0; y < columns; ++y)
      to[std::ptrdiff_t(y) * ld_to + x] = from[std::ptrdiff_t(x) * ld_from + y];
}

template <typename T>
inline T dot(int n, const T* a, const T* b) {
  typedef typename Simd<T>::type vec;
  constexpr int w = Simd<T>::width;
  vec part[4] = {};  // one sum would wait for itself
  int i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int k = 0; k < 4; ++k)
      part[k] += *reinterpret_cast<const vec*>(a + i + k * w) * *reinterpret_cast<const vec*>(b + i + k * w);
  for (; i + w <= n; i += w) part[0] += *reinterpret_cast<const vec*>(a + i) * *reinterpret_cast<const vec*>(b + i);
  const vec acc = (part[0] + part[1]) + (part[2] + part[3]);
  T sum = 0;
  for (int j = 0; j < w; ++j) sum += acc[j];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
inline void scale_row(int n, T alpha, const T* __restrict x, T* __restrict y) {
  for (int i = 0; i < n; ++i) y[i] = alpha * x[i];
}

// 1 / sqrt(mean(x^2) + eps)
template <typename T>
inline T inverse_rms(int n, const T* x, T eps) {
  return T(1) / std::sqrt(dot(n, x, x) / n + eps);
}

template <typename T>
inline void axpy(int n, T alpha, const T* __restrict x, T* __restrict y) {
  for (int i = 0; i < n; ++i) y[i] += alpha * x[i];
}

// (I + A) X = R in place for a block of BLOCK rows, A(t, s) = a[t * a_row + s * a_col]: strip by strip of columns, each
// in registers. Down: A is strictly lower; otherwise its mirror image, and the last row is known first.
template <typename T, int BLOCK, bool DOWN>
inline void solve_block(int n, const T* a, std::ptrdiff_t a_row, std::ptrdiff_t a_col, T* r, int ldr) {
  typedef typename Simd<T>::type vec;
  constexpr int w = Simd<T>::width;
  int j = 0;
  for (; j + w <= n; j += w) {
    vec x[BLOCK];
    for (int t = 0; t < BLOCK; ++t) x[t] = *reinterpret_cast<const vec*>(r + std::ptrdiff_t(t) * ldr + j);
#pragma GCC unroll 16
    for (int k = 0; k < BLOCK - 1; ++k) {
      const int s = DOWN ? k : BLOCK - 1 - k;
#pragma GCC unroll 16
      for (int i = 1; i < BLOCK - k; ++i) {
        const int t = DOWN ? s + i : s - i;
        x[t] -= a[t * a_row + s * a_col] * x[s];
      }
    }
    for (int t = 0; t < BLOCK; ++t) *reinterpret_cast<vec*>(r + std::ptrdiff_t(t) * ldr + j) = x[t];
  }
  for (; j < n; ++j)
    for (int k = 0; k < BLOCK - 1; ++k) {
      const int s = DOWN ? k : BLOCK - 1 - k;
      for (int i = 1; i < BLOCK - k; ++i) {
        const int t = DOWN ? s + i : s - i;
        r[std::ptrdiff_t(t) * ldr + j] -= a[t * a_row + s * a_col] * r[std::ptrdiff_t(s) * ldr + j];
      }
    }
}

// (I + A) X = R in place, A (c x c) strictly lower with row stride lda, R (c x n).
template <typename T>
void solve_lower(int c, int n, const T* a, int lda, T* r, int ldr) {
  constexpr int block = 12;
  for (int b = 0; b < c; b += block) {
    const int end = std::min(c, b + block);
    if (b) gemm<T>(end - b, n, b, a + std::ptrdiff_t(b) * lda, lda, 1, r, ldr, r + std::ptrdiff_t(b) * ldr, ldr, -1,
                   true);
    if (end - b == block) {
      solve_block<T, block, true>(n, a + std::ptrdiff_t(b) * lda + b, lda, 1, r + std::ptrdiff_t(b) * ldr, ldr);
      continue;
    }
    for (int t = b + 1; t < end; ++t)
      for (int s = b; s < t; ++s)
        axpy(n, -a[std::ptrdiff_t(t) * lda + s], r + std::ptrdiff_t(s) * ldr, r + std::ptrdiff_t(t) * ldr);
  }
}

// (I + A)^T X = R in place.
template <typename T>
void solve_lower_transposed(int c, int n, const T* a, int lda, T* r, int ldr) {
  constexpr int block = 12;
  for (int b = (c - 1) / block * block; b >= 0; b -= block) {
    const int end = std::min(c, b + block);
    if (end < c)
      gemm<T>(end - b, n, c - end, a + std::ptrdiff_t(end) * lda + b, 1, lda, r + std::ptrdiff_t(end) * ldr, ldr,
              r + std::ptrdiff_t(b) * ldr, ldr, -1, true);
    if (end - b == block) {
      solve_block<T, block, false>(n, a + std::ptrdiff_t(b) * lda + b, 1, lda, r + std::ptrdiff_t(b) * ldr, ldr);
      continue;
    }
    for (int t = end - 2; t >= b; --t)
      for (int s = t + 1; s < end; ++s)
        axpy(n, -a[std::ptrdiff_t(s) * lda + t], r + std::ptrdiff_t(s) * ldr, r + std::ptrdiff_t(t) * ldr);
  }
}

inline double exponential(double x) { return std::exp(x); }

// exp(r) for |r| at most log(2) / 2, in single precision; V is a number or a vector of them.
template <typename V>
inline V small_exponential(V r) {
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp in single precision to about one unit in the last place, without branches, so that loops over it vectorise.
inline float exponential(float x) {
  x = std::min(std::max(x, -88.0f), 89.0f);  // beyond are 0 and infinity; in this order NaN stays NaN
  const float n = std::nearbyintf(x * 1.44269504088896341f);
  const float p = small_exponential(x - n * 0.693359375f - n * -2.12194440e-4f);
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

#ifdef __AVX2__
// The same for eight numbers; the compiler makes twelve instructions of the scalar clamp, these are two.
inline __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-88.0f), x));
  const __m256 n = _mm256_round_ps(x * 1.44269504088896341f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 p = small_exponential(x - n * 0.693359375f - n * -2.12194440e-4f);
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127)), 23);
  return p * _mm256_castsi256_ps(bits);
}
#endif

// h = silu(z), and z becomes sigmoid(z), which with h gives the slope of silu.
template <typename T>
inline void activate(int count, T* __restrict z, T* __restrict h) {
  int i = 0;
#ifdef __AVX2__
  if constexpr (std::is_same_v<T, float>)
    for (; i + 8 <= count; i += 8) {
      const __m256 x = _mm256_loadu_ps(z + i), s = 1.0f / (1.0f + exponential(-x));
      _mm256_storeu_ps(h + i, x * s);
      _mm256_storeu_ps(z + i, s);
    }
#endif
  for (; i < count; ++i) {
    const T s = sigmoid(z[i]);
    h[i] = z[i] * s;
    z[i] = s;
  }
}

template <typename T>
inline T silu_slope(T s, T h) {
  return s + h * (1 - s);
}

// log(sigmoid(x)) without overflow.
template <typename T>
inline T log_sigmoid(T x) {
  return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x)));
}
