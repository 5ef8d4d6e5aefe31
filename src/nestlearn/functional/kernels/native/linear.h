// Small matrix products and elementwise functions on tiles that lie in a core's cache.
// All matrices are row-major. A product is vectorised over the columns of its right factor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __AVX__
#include <immintrin.h>
#endif

template <typename T>
struct Simd {
  typedef T type __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));
  static constexpr int width = 32 / sizeof(T);
};

// What of a product is needed: all; only the lower triangle of the result; or the left factor is triangular.
enum class Shape { Full, OutLower, LeftLower, LeftUpper };

template <typename T, int MR>
inline void micro(int k, const T* a, std::ptrdiff_t a_row, std::ptrdiff_t a_col, const T* b, int ldb, T* c, int ldc,
                  T alpha, bool add) {
  typedef typename Simd<T>::type vec;
  constexpr int w = Simd<T>::width;
  vec acc[MR][2];
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = vec{};
  for (int p = 0; p < k; ++p) {
    const vec b0 = *reinterpret_cast<const vec*>(b + std::ptrdiff_t(p) * ldb);
    const vec b1 = *reinterpret_cast<const vec*>(b + std::ptrdiff_t(p) * ldb + w);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const T x = a[i * a_row + p * a_col];
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

// C (m x n) = [C +] alpha A B, with A(i, p) = a[i * a_row + p * a_col] (m x k) and B (k x n) with row stride ldb.
// For OutLower, entries above the diagonal may be written or not.
template <typename T>
void gemm(int m, int n, int k, const T* a, std::ptrdiff_t a_row, std::ptrdiff_t a_col, const T* b, int ldb, T* c,
          int ldc, T alpha = 1, bool add = false, Shape shape = Shape::Full) {
  constexpr int nr = 2 * Simd<T>::width;
  constexpr int mr = 6;
  for (int i = 0; i < m; i += mr) {
    const int rows = std::min(mr, m - i);
    int columns = n, first = 0, last = k;
    if (shape == Shape::OutLower) columns = std::min(n, (i + rows + nr - 1) / nr * nr);
    if (shape == Shape::LeftLower) last = std::min(k, i + rows);
    if (shape == Shape::LeftUpper) first = std::min(k, i);
    const T* ai = a + i * a_row + first * a_col;
    const T* bi = b + std::ptrdiff_t(first) * ldb;
    T* ci = c + std::ptrdiff_t(i) * ldc;
    const int depth = last - first;
    int j = 0;
    for (; j + nr <= columns; j += nr) {
      switch (rows) {
        case 6: micro<T, 6>(depth, ai, a_row, a_col, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 5: micro<T, 5>(depth, ai, a_row, a_col, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 4: micro<T, 4>(depth, ai, a_row, a_col, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 3: micro<T, 3>(depth, ai, a_row, a_col, bi + j, ldb, ci + j, ldc, alpha, add); break;
        case 2: micro<T, 2>(depth, ai, a_row, a_col, bi + j, ldb, ci + j, ldc, alpha, add); break;
        default: micro<T, 1>(depth, ai, a_row, a_col, bi + j, ldb, ci + j, ldc, alpha, add);
      }
    }
    for (; j < columns; ++j) {
      for (int r = 0; r < rows; ++r) {
        T sum = 0;
        for (int p = 0; p < depth; ++p) sum += ai[r * a_row + p * a_col] * bi[std::ptrdiff_t(p) * ldb + j];
        T& out = ci[std::ptrdiff_t(r) * ldc + j];
        out = add ? out + alpha * sum : alpha * sum;
      }
    }
  }
}

#ifdef __AVX__
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
  vec acc = {};
  int i = 0;
  for (; i + w <= n; i += w) acc += *reinterpret_cast<const vec*>(a + i) * *reinterpret_cast<const vec*>(b + i);
  T sum = 0;
  for (int j = 0; j < w; ++j) sum += acc[j];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
inline void axpy(int n, T alpha, const T* x, T* y) {
  for (int i = 0; i < n; ++i) y[i] += alpha * x[i];
}

// (I + A) X = R in place, A (c x c) strictly lower with row stride lda, R (c x n).
template <typename T>
void solve_lower(int c, int n, const T* a, int lda, T* r, int ldr) {
  constexpr int block = 16;
  for (int b = 0; b < c; b += block) {
    const int end = std::min(c, b + block);
    if (b) gemm<T>(end - b, n, b, a + std::ptrdiff_t(b) * lda, lda, 1, r, ldr, r + std::ptrdiff_t(b) * ldr, ldr, -1, true);
    for (int t = b + 1; t < end; ++t)
      for (int s = b; s < t; ++s)
        axpy(n, -a[std::ptrdiff_t(t) * lda + s], r + std::ptrdiff_t(s) * ldr, r + std::ptrdiff_t(t) * ldr);
  }
}

// (I + A)^T X = R in place.
template <typename T>
void solve_lower_transposed(int c, int n, const T* a, int lda, T* r, int ldr) {
  constexpr int block = 16;
  for (int b = (c - 1) / block * block; b >= 0; b -= block) {
    const int end = std::min(c, b + block);
    if (end < c)
      gemm<T>(end - b, n, c - end, a + std::ptrdiff_t(end) * lda + b, 1, lda, r + std::ptrdiff_t(end) * ldr, ldr,
              r + std::ptrdiff_t(b) * ldr, ldr, -1, true);
    for (int t = end - 2; t >= b; --t)
      for (int s = t + 1; s < end; ++s)
        axpy(n, -a[std::ptrdiff_t(s) * lda + t], r + std::ptrdiff_t(s) * ldr, r + std::ptrdiff_t(t) * ldr);
  }
}

inline double exponential(double x) { return std::exp(x); }

// exp in single precision to about one unit in the last place, without branches, so that loops over it vectorise.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);  // in this order NaN stays NaN
  const float n = std::nearbyintf(x * 1.44269504088896341f);
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}

// log(sigmoid(x)) without overflow.
template <typename T>
inline T log_sigmoid(T x) {
  return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x)));
}
