// What stands between the matrix products of a block, forward and backward, each in one pass over memory.
//
// The plain_* functions of nestlearn.functional.recomputed say in PyTorch operations what each computes.
#include <new>

#include "linear.h"
#include "threads.h"

// No number that the loop after this writes is read at another index.
#ifdef __clang__
#define NESTLEARN_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define NESTLEARN_APART _Pragma("GCC ivdep")
#endif

namespace {

using Index = std::int64_t;

// Calls work(thread, begin, end) on equal parts of [0, count): always the same ones, so that sums round alike.
template <typename F>
void share(Index count, int threads, F work) {
  if (!in_threads(threads, [&](int i) { work(i, count * i / threads, count * (i + 1) / threads); })) throw std::bad_alloc();
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

// Tokens after which the rows of a task end, so that threads can share one row.
constexpr Index stretch = 128;

// Of one token, channels [0, n): the sum over taps of weight (taps, channels) and the tokens before it.
template <typename T>
void convolve(const T* x, const T* weight, T* y, Index t, int taps, int channels) {
  const T* last = weight + Index(taps - 1) * channels;
  if (taps == 4 && t >= 3) {
    const T *x1 = x - channels, *x2 = x1 - channels, *x3 = x2 - channels;
    const T *w1 = last - channels, *w2 = w1 - channels, *w3 = w2 - channels;
    NESTLEARN_APART
    for (int i = 0; i < channels; ++i) y[i] = last[i] * x[i] + w1[i] * x1[i] + w2[i] * x2[i] + w3[i] * x3[i];
    return;
  }
  NESTLEARN_APART
  for (int i = 0; i < channels; ++i) y[i] = last[i] * x[i];
  for (int delay = 1; delay < taps && delay <= t; ++delay)
    NESTLEARN_APART
    for (int i = 0; i < channels; ++i) y[i] += last[i - Index(delay) * channels] * x[i - Index(delay) * channels];
}

// x (rows, tokens, groups * heads * key) -> silu(convolution) as (groups, rows, heads, tokens, key).
template <typename T>
void convolved_heads(const T* x, const T* weight, T* out, Index rows, Index tokens, int groups, int heads, int key,
                     int taps, int threads) {
  const int channels = groups * heads * key;
  share(rows * tokens, threads, [=](int, Index begin, Index end) {
    std::vector<T> y(channels);
    for (Index at = begin; at < end; ++at) {
      const Index row = at / tokens, t = at % tokens;
      convolve(x + at * channels, weight, y.data(), t, taps, channels);
      for (int j = 0; j < groups * heads; ++j) {
        T* to = out + (((j / heads * rows + row) * heads + j % heads) * tokens + t) * key;
        const T* from = y.data() + j * key;
        NESTLEARN_APART
        for (int i = 0; i < key; ++i) to[i] = from[i] * sigmoid(from[i]);
      }
    }
  });
}

// d_weight (threads, taps, channels), zero before.
template <typename T>
void convolved_heads_backward(const T* x, const T* weight, const T* d_out, T* d_x, T* d_weight, Index rows,
                              Index tokens, int groups, int heads, int key, int taps, int threads) {
  const int channels = groups * heads * key;
  const Index pieces = (tokens + stretch - 1) / stretch;
  share(rows * pieces, threads, [=](int thread, Index begin, Index end) {
    std::vector<T> ring(Index(taps) * channels), y(channels);  // the gradients of the last sums, and one sum
    T* sum = d_weight + Index(thread) * taps * channels;
    for (Index task = begin; task < end; ++task) {
      const Index row = task / pieces, first = task % pieces * stretch, last = std::min(first + stretch, tokens);
      // The sums of later tokens reach back into this stretch; their part of d_weight belongs to the next one.
      for (Index t = first; t < last + taps - 1; ++t) {
        T* d_y = ring.data() + t % taps * channels;
        if (t < tokens) {
          const T* here = x + (row * tokens + t) * channels;
          convolve(here, weight, y.data(), t, taps, channels);
          for (int j = 0; j < groups * heads; ++j) {
            const T* from = d_out + (((j / heads * rows + row) * heads + j % heads) * tokens + t) * key;
            const T* at = y.data() + j * key;
            T* to = d_y + j * key;
            NESTLEARN_APART
            for (int i = 0; i < key; ++i) {
              const T s = sigmoid(at[i]);
              to[i] = from[i] * silu_slope(s, at[i] * s);
            }
          }
          for (int delay = 0; t < last && delay < taps && delay <= t; ++delay) {
            T* to = sum + Index(taps - 1 - delay) * channels;
            const T* from = here - Index(delay) * channels;
            NESTLEARN_APART
            for (int i = 0; i < channels; ++i) to[i] += d_y[i] * from[i];
          }
        } else {
          std::fill(d_y, d_y + channels, T(0));
        }
        const Index done = t - taps + 1;
        if (done < first) continue;
        T* to = d_x + (row * tokens + done) * channels;
        for (int delay = 0; delay < taps; ++delay) {
          const T *d = ring.data() + (done + delay) % taps * channels, *w = weight + Index(taps - 1 - delay) * channels;
          if (delay == 0)
            NESTLEARN_APART
            for (int i = 0; i < channels; ++i) to[i] = d[i] * w[i];
          else
            NESTLEARN_APART
            for (int i = 0; i < channels; ++i) to[i] += d[i] * w[i];
        }
      }
    }
  });
}

}  // namespace

#define NESTLEARN_EXPORT(T, suffix)                                                                                                        \
  extern "C" std::int32_t rms_norm_##suffix(const T* x, const T* w, T* y, Index rows, int width, double eps, int threads) {                \
    return status([&] { rms_norm<T>(x, w, y, rows, width, T(eps), threads); });                                                            \
  }                                                                                                                                        \
  extern "C" std::int32_t rms_norm_backward_##suffix(const T* x, const T* w, const T* d_y, T* d_x, T* d_w, Index rows,                     \
                                             int width, double eps, int threads) {                                                         \
    return status([&] { rms_norm_backward<T>(x, w, d_y, d_x, d_w, rows, width, T(eps), threads); });                                       \
  }                                                                                                                                        \
  extern "C" std::int32_t gated_norm_##suffix(const T* x, const T* w, const T* gate, T* z, Index rows, int width, double eps,              \
                                      int threads) {                                                                                       \
    return status([&] { gated_norm<T>(x, w, gate, z, rows, width, T(eps), threads); });                                                    \
  }                                                                                                                                        \
  extern "C" std::int32_t gated_norm_backward_##suffix(const T* x, const T* w, const T* gate, const T* d_z, T* z, T* d_x,                  \
                                               T* d_gate, T* d_w, Index rows, int width, double eps, int threads) {                        \
    return status([&] { gated_norm_backward<T>(x, w, gate, d_z, z, d_x, d_gate, d_w, rows, width, T(eps), threads); });                    \
  }                                                                                                                                        \
  extern "C" std::int32_t gelu_backward_##suffix(const T* u, T* h, T* d_h, Index count, int threads) {                                     \
    return status([&] { gelu_backward<T>(u, h, d_h, count, threads); });                                                                   \
  }                                                                                                                                        \
  extern "C" std::int32_t convolved_heads_##suffix(const T* x, const T* weight, T* out, Index rows, Index tokens, int groups,              \
                                           int heads, int key, int taps, int threads) {                                                    \
    return status([&] { convolved_heads<T>(x, weight, out, rows, tokens, groups, heads, key, taps, threads); });                           \
  }                                                                                                                                        \
  extern "C" std::int32_t convolved_heads_backward_##suffix(const T* x, const T* weight, const T* d_out, T* d_x, T* d_weight,              \
                                                    Index rows, Index tokens, int groups, int heads, int key,                              \
                                                    int taps, int threads) {                                                               \
    return status([&] { convolved_heads_backward<T>(x, weight, d_out, d_x, d_weight, rows, tokens, groups, heads, key, taps, threads); }); \
  }

NESTLEARN_EXPORT(float, float)
NESTLEARN_EXPORT(double, double)
