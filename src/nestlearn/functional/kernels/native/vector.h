// Products of large matrices with few vectors, and the threads that share them.
#pragma once

#include <new>

#include "linear.h"
#include "threads.h"

// ---- products of a matrix and a vector ----

// sums[r] = <row r of a, x>, r < R, rows ld apart.
template <int R, typename T>
inline void dots(int n, const T* a, std::ptrdiff_t ld, const T* x, T* sums) {
  typedef typename Simd<T>::type vec;
  constexpr int w = Simd<T>::width;
  vec acc[R] = {};
  int i = 0;
  for (; i + w <= n; i += w) {
    const vec xi = *reinterpret_cast<const vec*>(x + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] += *reinterpret_cast<const vec*>(a + r * ld + i) * xi;
  }
  T part[R];
#ifdef __AVX2__
  if constexpr (R == 4 && sizeof(T) == 4) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)acc[0], (__m256)acc[1]),
                                        _mm256_hadd_ps((__m256)acc[2], (__m256)acc[3]));
    _mm_storeu_ps((float*)part, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  } else
#endif
    for (int r = 0; r < R; ++r) {
      part[r] = 0;
      for (int j = 0; j < w; ++j) part[r] += acc[r][j];
    }
  for (int r = 0; r < R; ++r) {
    for (int j = i; j < n; ++j) part[r] += a[r * ld + j] * x[j];
    sums[r] = part[r];
  }
}

// y[j] = [y[j] +] <row j of a, x> for `count` rows of length n.
template <typename T>
void times(int count, int n, const T* a, std::ptrdiff_t ld, const T* x, T* y, bool add = false) {
  int j = 0;
  T sums[4];
  for (; j + 4 <= count; j += 4) {
    dots<4>(n, a + j * ld, ld, x, sums);
    for (int r = 0; r < 4; ++r) y[j + r] = add ? y[j + r] + sums[r] : sums[r];
  }
  for (; j < count; ++j) {
    dots<1>(n, a + j * ld, ld, x, sums);
    y[j] = add ? y[j] + sums[0] : sums[0];
  }
}

// y (n) = x A, with A (count x n).
template <typename T>
void times_transposed(int count, int n, const T* a, std::ptrdiff_t ld, const T* x, T* y) {
  gemm<T>(1, n, count, x, count, 1, a, int(ld), y, n);
}

// ---- threads ----

// With fewer pieces of work than this it takes longer to start a thread of our own than to do its part.
constexpr int enough = 64;

template <typename F>
void parallel(int threads, int count, const F& each) {
  if (!in_parallel(threads, count, each, count >= enough)) throw std::bad_alloc();
}

// Rows of a large matrix that one thread takes at once.
constexpr int part = 64;

// y (rows x count) = then(row, column, x A^T), with x (rows x n) and A (count x n).
template <typename T, typename F>
void apply(int threads, int rows, int count, int n, const T* a, const T* x, T* y, const F& then) {
  parallel(threads, (count + part - 1) / part, [&](int piece) {
    const int first = piece * part, last = std::min(count, first + part);
    for (int row = 0; row < rows; ++row) {
      T* to = y + std::ptrdiff_t(row) * count;
      times(last - first, n, a + std::ptrdiff_t(first) * n, n, x + std::ptrdiff_t(row) * n, to + first);
      for (int j = first; j < last; ++j) to[j] = then(row, j, to[j]);
    }
  });
}
