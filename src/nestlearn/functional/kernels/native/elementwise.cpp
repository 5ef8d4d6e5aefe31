// What stands between the matrix products of a block, forward and backward, each in one pass over memory.
//
// The plain_* functions of nestlearn.functional.recomputed say in PyTorch operations what each computes.
#include <new>

#include "linear.h"
#include "threads.h"

namespace {

using Index = std::int64_t;

// Calls work(thread, begin, end) on equal parts of [0, count): always the same ones, so that sums round alike.
template <typename F>
void share(Index count, int threads, F work) {
  const auto part = [&](int i) { work(i, count * i / threads, count * (i + 1) / threads); };
  if (!in_parallel(threads, threads, part)) throw std::bad_alloc();
}

// d_x of y = x r w for g = d_y w.
template <typename T>
void norm_backward(int width, const T* x, T r, const T* g, T* d_x) {
  const T mean = dot(width, g, x) * r * r / width;
  NESTLEARN_APART
  for (int i = 0; i < width; ++i) d_x[i] = r * (g[i] - x[i] * mean);
}

inline double error_function(double x) { return std::erf(x); }

// erf in single precision to a few units in the last place: an odd rational function (as in Eigen), exact beyond 4.
inline float error_function(float x) {
  x = std::min(std::max(x, -4.0f), 4.0f);
  const float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p / q;
}

template <typename T>
void rms_norm(const T* x, const T* w, T* y, Index rows, int width, T eps, int threads) {
  share(rows, threads, [=](int, Index begin, Index end) {
    for (Index row = begin; row < end; ++row) {
      const T* from = x + row * width;
      T* to = y + row * width;
      const T r = inverse_rms(width, from, eps);
      NESTLEARN_APART
      for (int i = 0; i < width; ++i) to[i] = from[i] * r * w[i];
    }
  });
}

// d_w (threads, width), zero before.
template <typename T>
void rms_norm_backward(const T* x, const T* w, const T* d_y, T* d_x, T* d_w, Index rows, int width, T eps,
                       int threads) {
  share(rows, threads, [=](int thread, Index begin, Index end) {
    std::vector<T> g(width);
    T* sum = d_w + Index(thread) * width;
    for (Index row = begin; row < end; ++row) {
      const T *from = x + row * width, *d = d_y + row * width;
      const T r = inverse_rms(width, from, eps);
      NESTLEARN_APART
      for (int i = 0; i < width; ++i) {
        g[i] = d[i] * w[i];
        sum[i] += d[i] * from[i] * r;
      }
      norm_backward(width, from, r, g.data(), d_x + row * width);
    }
  });
}

// z = x r w silu(gate).
template <typename T>
void gated_norm(const T* x, const T* w, const T* gate, T* z, Index rows, int width, T eps, int threads) {
  share(rows, threads, [=](int, Index begin, Index end) {
    for (Index row = begin; row < end; ++row) {
      const T *from = x + row * width, *by = gate + row * width;
      T* to = z + row * width;
      const T r = inverse_rms(width, from, eps);
      NESTLEARN_APART
      for (int i = 0; i < width; ++i) to[i] = from[i] * r * w[i] * by[i] * sigmoid(by[i]);
    }
  });
}

// From d_z, and with z again; d_w as above.
template <typename T>
void gated_norm_backward(const T* x, const T* w, const T* gate, const T* d_z, T* z, T* d_x, T* d_gate, T* d_w,
                         Index rows, int width, T eps, int threads) {
  share(rows, threads, [=](int thread, Index begin, Index end) {
    std::vector<T> g(width);
    T* sum = d_w + Index(thread) * width;
    for (Index row = begin; row < end; ++row) {
      const Index at = row * width;
      const T* from = x + at;
      const T r = inverse_rms(width, from, eps);
      NESTLEARN_APART
      for (int i = 0; i < width; ++i) {
        const T s = sigmoid(gate[at + i]), silu = gate[at + i] * s, unit = from[i] * r, d = d_z[at + i];
        const T y = unit * w[i];
        z[at + i] = y * silu;
        d_gate[at + i] = d * y * silu_slope(s, silu);
        g[i] = d * silu * w[i];
        sum[i] += d * silu * unit;
      }
      norm_backward(width, from, r, g.data(), d_x + at);
    }
  });
}

// h = gelu(u), and d_h becomes d_u.
template <typename T>
void gelu_backward(const T* u, T* h, T* d_h, Index count, int threads) {
  const T half = T(0.70710678118654752440), density = T(0.39894228040143267794);
  share(count, threads, [=](int, Index begin, Index end) {
    NESTLEARN_APART
    for (Index i = begin; i < end; ++i) {
      const T x = u[i], below = T(0.5) * (1 + error_function(x * half));
      h[i] = x * below;
      d_h[i] *= below + x * density * exponential(T(-0.5) * x * x);
    }
  });
}

// Tokens that a task takes at once: threads share a row, and a head of so many tokens stays in a core's cache.
constexpr Index stretch = 128;

// Of one token, channels [0, n) of a row that has `channels`: the sum over taps of weight (taps, channels) and the
// tokens before it.
template <typename T>
void convolve(const T* x, const T* weight, T* y, Index t, int taps, int n, Index channels) {
  const T* last = weight + (taps - 1) * channels;
  if (taps == 4 && t >= 3) {
    const T *x1 = x - channels, *x2 = x1 - channels, *x3 = x2 - channels;
    const T *w1 = last - channels, *w2 = w1 - channels, *w3 = w2 - channels;
    NESTLEARN_APART
    for (int i = 0; i < n; ++i) y[i] = last[i] * x[i] + w1[i] * x1[i] + w2[i] * x2[i] + w3[i] * x3[i];
    return;
  }
  NESTLEARN_APART
  for (int i = 0; i < n; ++i) y[i] = last[i] * x[i];
  for (int delay = 1; delay < taps && delay <= t; ++delay)
    NESTLEARN_APART
    for (int i = 0; i < n; ++i) y[i] += last[i - delay * channels] * x[i - delay * channels];
}

// x (rows, tokens, groups * heads * key) -> silu(convolution) as (groups, rows, heads, tokens, key).
template <typename T>
void convolved_heads(const T* x, const T* weight, T* out, Index rows, Index tokens, int groups, int heads, int key,
                     int taps, int threads) {
  const Index channels = Index(groups) * heads * key;
  share(rows * tokens, threads, [=](int, Index begin, Index end) {
    std::vector<T> y(channels);
    for (Index at = begin; at < end; ++at) {
      const Index row = at / tokens, t = at % tokens;
      convolve(x + at * channels, weight, y.data(), t, taps, int(channels), channels);
      for (int j = 0; j < groups * heads; ++j)
        activate(key, y.data() + j * key, out + (((j / heads * rows + row) * heads + j % heads) * tokens + t) * key);
    }
  });
}

// Of one token's sum with gradients d (taps, n) of its own and the following sums, d_x; and what it adds to d_weight.
template <typename T>
void convolve_backward(const T* x, const T* weight, const T* d, T* d_x, T* d_weight, Index t, int taps, int n,
                       Index channels) {
  const T* w = weight + (taps - 1) * channels;
  if (taps == 4 && t >= 3) {
    const T *x1 = x - channels, *x2 = x1 - channels, *x3 = x2 - channels;
    const T *w1 = w - channels, *w2 = w1 - channels, *w3 = w2 - channels;
    const T *d1 = d + n, *d2 = d1 + n, *d3 = d2 + n;
    T *s3 = d_weight, *s2 = s3 + n, *s1 = s2 + n, *s0 = s1 + n;
    NESTLEARN_APART
    for (int i = 0; i < n; ++i) {
      d_x[i] = w[i] * d[i] + w1[i] * d1[i] + w2[i] * d2[i] + w3[i] * d3[i];
      s0[i] += d[i] * x[i];
      s1[i] += d[i] * x1[i];
      s2[i] += d[i] * x2[i];
      s3[i] += d[i] * x3[i];
    }
    return;
  }
  std::fill(d_x, d_x + n, T(0));
  for (int delay = 0; delay < taps; ++delay) {
    const T *later = d + Index(delay) * n, *by = w - delay * channels;
    NESTLEARN_APART
    for (int i = 0; i < n; ++i) d_x[i] += by[i] * later[i];
    if (delay > t) continue;
    const T* from = x - delay * channels;
    T* sum = d_weight + Index(taps - 1 - delay) * n;
    NESTLEARN_APART
    for (int i = 0; i < n; ++i) sum[i] += d[i] * from[i];
  }
}

// d_weight (threads, taps, channels), zero before.
template <typename T>
void convolved_heads_backward(const T* x, const T* weight, const T* d_out, T* d_x, T* d_weight, Index rows,
                              Index tokens, int groups, int heads, int key, int taps, int threads) {
  const Index channels = Index(groups) * heads * key, pieces = (tokens + stretch - 1) / stretch;
  share(rows * pieces, threads, [=](int thread, Index begin, Index end) {
    // Of one head: the sums and what follows from them, for the tokens of the stretch and those that see its last ones.
    const Index room = (stretch + taps - 1) * key;
    std::vector<T> sums(room), silu(room), d(room), d_w(Index(taps) * key);
    for (Index task = begin; task < end; ++task) {
      const Index row = task / pieces, first = task % pieces * stretch, last = std::min(first + stretch, tokens);
      const Index seen = std::min(last + taps - 1, tokens);
      for (int j = 0; j < groups * heads; ++j) {
        const T* w = weight + Index(j) * key;
        const T* own = x + row * tokens * channels + Index(j) * key;
        for (Index t = first; t < seen; ++t)
          convolve(own + t * channels, w, sums.data() + (t - first) * key, t, taps, key, channels);
        const int count = int((seen - first) * key);
        activate(count, sums.data(), silu.data());
        const T* from = d_out + (((j / heads * rows + row) * heads + j % heads) * tokens + first) * key;
        T *to = d.data(), *s = sums.data(), *h = silu.data();
        NESTLEARN_APART
        for (int i = 0; i < count; ++i) to[i] = from[i] * silu_slope(s[i], h[i]);
        std::fill(d.begin() + count, d.end(), T(0));
        std::fill(d_w.begin(), d_w.end(), T(0));
        T* d_own = d_x + row * tokens * channels + Index(j) * key;
        for (Index t = first; t < last; ++t)
          convolve_backward(own + t * channels, w, d.data() + (t - first) * key, d_own + t * channels, d_w.data(), t,
                            taps, key, channels);
        T* sum = d_weight + Index(thread) * taps * channels + Index(j) * key;
        for (int tap = 0; tap < taps; ++tap) axpy(key, T(1), d_w.data() + Index(tap) * key, sum + tap * channels);
      }
    }
  });
}

}  // namespace

#define NESTLEARN_EXPORT(T, suffix)                                                                           \
  extern "C" std::int32_t rms_norm_##suffix(const T* x, const T* w, T* y, Index rows, int width, double eps,  \
      int threads) {                                                                                          \
    return status([&] { rms_norm<T>(x, w, y, rows, width, T(eps), threads); });                               \
  }                                                                                                           \
  extern "C" std::int32_t rms_norm_backward_##suffix(const T* x, const T* w, const T* d_y, T* d_x, T* d_w,    \
      Index rows, int width, double eps, int threads) {                                                       \
    return status([&] { rms_norm_backward<T>(x, w, d_y, d_x, d_w, rows, width, T(eps), threads); });          \
  }                                                                                                           \
  extern "C" std::int32_t gated_norm_##suffix(const T* x, const T* w, const T* gate, T* z, Index rows,        \
      int width, double eps, int threads) {                                                                   \
    return status([&] { gated_norm<T>(x, w, gate, z, rows, width, T(eps), threads); });                       \
  }                                                                                                           \
  extern "C" std::int32_t gated_norm_backward_##suffix(const T* x, const T* w, const T* gate, const T* d_z,   \
      T* z, T* d_x, T* d_gate, T* d_w, Index rows, int width, double eps, int threads) {                      \
    return status([&] { gated_norm_backward<T>(x, w, gate, d_z, z, d_x, d_gate, d_w, rows, width, T(eps),     \
        threads); });                                                                                         \
  }                                                                                                           \
  extern "C" std::int32_t gelu_backward_##suffix(const T* u, T* h, T* d_h, Index count, int threads) {        \
    return status([&] { gelu_backward<T>(u, h, d_h, count, threads); });                                      \
  }                                                                                                           \
  extern "C" std::int32_t convolved_heads_##suffix(const T* x, const T* weight, T* out, Index rows,           \
      Index tokens, int groups, int heads, int key, int taps, int threads) {                                  \
    return status([&] { convolved_heads<T>(x, weight, out, rows, tokens, groups, heads, key, taps,            \
        threads); });                                                                                         \
  }                                                                                                           \
  extern "C" std::int32_t convolved_heads_backward_##suffix(const T* x, const T* weight, const T* d_out,      \
      T* d_x, T* d_weight, Index rows, Index tokens, int groups, int heads, int key, int taps, int threads) { \
    return status([&] { convolved_heads_backward<T>(x, weight, d_out, d_x, d_weight, rows, tokens, groups,    \
        heads, key, taps, threads); });                                                                       \
  }

NESTLEARN_EXPORT(float, float)
NESTLEARN_EXPORT(double, double)
