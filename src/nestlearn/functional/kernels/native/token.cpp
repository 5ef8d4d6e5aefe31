// One token of a mixer whose heads hold two-layer memories, without gradients; the state is overwritten.
//
// It computes what nestlearn.layers.*._token and nestlearn.memory.token compute, under the same names. For one token
// there is nothing to solve and no decay inside a chunk, so each memory is read and written in one or two passes.
#include "gates.h"
#include "vector.h"

struct Token {
  // Sizes: rows, heads, memories, those read for k, v, gates (and q), the first of the narrow ones and the one after
  // them, width of a head, of a hidden layer, of a narrow one, of the model, streams, gates whose logits are given,
  // taps of the convolution.
  std::int32_t rows, heads, memories, projections, narrow_first, narrow_stop, key, hidden, narrow, dim, streams, logits;
  std::int32_t taps;
  std::int32_t rule;  // 0 dgd, 1 gd, 2 delta
  std::int32_t read;  // 0 token, 1 previous, 2 chunk
  std::int32_t negative_eigenvalues, own_targets, main_residual, adaptive_query, to_initial;
  std::int32_t has_retain, has_momentum, threads, wide, chunk, projection_chunk;
  double bound, largest_gate, eps;
  const double* scales;               // (memories), the fraction of its error that each writes
  std::int64_t* position;             // (rows)
  const void* readouts[6];            // gate, its bias, retain, its bias, momentum, its bias: (heads, key), (heads)
  const void *base[2], *base_narrow[2];  // inner, outer (heads, M, ...); of the narrow memories apart, or null
  void* state[6];                     // running, snapshot, momentum: inner, outer each, (rows, heads, M, ...)
  // The streams and the logits behind them side by side (rows, streams * dim + logits * heads), and what the heads read
  // (rows, dim). Or the layer's input and output, (rows, dim) both, and the slow weights between.
  const void* inputs;
  void* out;
  const void *projection, *convolution, *gates;  // (streams * dim, dim), (taps, streams * dim), (logits * heads, dim);
  void* tail;                                    // (rows, taps - 1, streams * dim); projection null: streams are given
  const void *norm, *gate, *output;              // (key), (dim, dim), (dim, dim)
};

namespace {

// ---- the memories of one row and head ----

template <typename T>
struct Matrix {
  T* data;
  std::ptrdiff_t ld;
};

template <typename T>
class Head {
 public:
  Head(const Token& w, const T* u, int row, int head, T* out)
      : w(w), u(u), row(row), head(head), n(row * w.heads + head), M(w.memories), K(w.key), out(out),
        rule{w.negative_eigenvalues != 0, w.rule != 1, w.has_momentum != 0, w.largest_gate} {}

  void run() {
    // What the streams hold, and room for all whole memories.
    thread_local std::vector<T> room;
    const std::ptrdiff_t widest = std::max(K, w.hidden);
    room.resize(std::ptrdiff_t(M) * 2 * w.hidden * K + 14 * widest);
    T* next = room.data();
    const auto take = [&](std::ptrdiff_t count) { return (next += count) - count; };
    T *k = take(K), *v = take(K), *q = take(K), *rate = take(K), *retention = take(K);
    z = take(2 * widest);
    h = take(2 * widest);
    error = take(K), image = take(widest);
    scratch = take(2 * widest);

    for (int m = 0; m < M; ++m)
      for (int outer = 0; outer < 2; ++outer) whole[m][outer] = sum(m, outer, next);
    if (w.own_targets) {
      T* made[] = {k, v, rate, retention, q};
      for (int p = 0; p < w.projections; ++p) {
        const T* x = stream(p == 0 ? 1 : p == 1 ? 2 : p == 4 ? 0 : 3);
        std::copy(x, x + K, made[p]);
        read(whole[p][0], whole[p][1], width(p), x, made[p], true);
      }
      if (!w.adaptive_query) std::copy(stream(0), stream(0) + K, q);
    } else {
      for (int i = 0; i < 3; ++i) std::copy(stream(i), stream(i) + K, i == 0 ? q : i == 1 ? k : v);
    }
    for (T* x : {k, v, q}) normalize(x);
    const T gate_logit = logit(0, rate), retain_logit = w.has_retain ? logit(1, retention) : T(0);
    gate = T(w.largest_gate) * sigmoid(gate_logit);
    retain = w.has_retain ? sigmoid(retain_logit) : T(1);
    momentum = w.has_momentum ? sigmoid(logit(2, rate)) : T(0);
    inner_strength = strength(k, K);

    const int main = M - 1;
    if (w.read == 1) read_main(q);
    if (w.read == 2) read(whole[main][0], whole[main][1], width(main), q, out, false);
    for (int m = 0; m < M; ++m) write(m, k, v);
    if (w.read == 0) read_main(q);
    if (w.main_residual)
      for (int i = 0; i < K; ++i) out[i] += q[i];
    for (int m = 0; m < M; ++m)
      if ((w.position[row] + 1) % (m == main ? w.chunk : w.projection_chunk) == 0) snapshot(m);
  }

 private:
  int width(int m) const { return m >= w.narrow_first && m < w.narrow_stop ? w.narrow : w.hidden; }
  // Of the memory m of this row and head; running, snapshot and momentum are padded to the widest.
  Matrix<T> of(int i, int m) const {
    const std::ptrdiff_t size = std::ptrdiff_t(w.hidden) * K, ld = i % 2 ? w.hidden : K;
    return {w.state[i] ? static_cast<T*>(w.state[i]) + (std::ptrdiff_t(n) * M + m) * size : nullptr, ld};
  }
  Matrix<const T> base(int m, int outer) const {
    const int apart = w.narrow_stop - w.narrow_first;
    const bool narrow = m >= w.narrow_first && m < w.narrow_stop;
    const int count = narrow ? apart : M - apart;
    const int place = narrow ? m - w.narrow_first : m < w.narrow_first ? m : m - apart;
    const T* all = static_cast<const T*>(narrow ? w.base_narrow[outer] : w.base[outer]);
    return {all + (std::ptrdiff_t(head) * count + place) * width(m) * K, outer ? width(m) : K};
  }
  const T* stream(int i) const { return u + std::ptrdiff_t(i) * w.dim + head * K; }

  // The whole memory at the snapshot, in `next` where it is a sum.
  Matrix<const T> sum(int m, int outer, T*& next) const {
    const Matrix<T> change = of(2 + outer, m);
    if (!w.to_initial) return {change.data, change.ld};
    const Matrix<const T> fixed = base(m, outer);
    const int count = outer ? K : width(m), length = outer ? width(m) : K;
    T* to = next;
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < length; ++j) to[i * length + j] = change.data[i * change.ld + j] + fixed.data[i * fixed.ld +
                                                                                                        j];
    next += count * length;
    return {to, length};
  }

  static T silu(T x) { return x * sigmoid(x); }

  // y = [y +] W1 silu(W2 x).
  void read(Matrix<const T> inner, Matrix<const T> outer, int hidden, const T* x, T* y, bool add) const {
    times(hidden, K, inner.data, inner.ld, x, z);
    for (int i = 0; i < hidden; ++i) h[i] = silu(z[i]);
    times(K, hidden, outer.data, outer.ld, h, y, add);
  }
  // The same of base + running of the main memory.
  void read_main(const T* q) const {
    const int m = M - 1, hidden = width(m);
    const Matrix<T> inner = of(0, m), outer = of(1, m);
    times(hidden, K, inner.data, inner.ld, q, z);
    if (w.to_initial) times(hidden, K, base(m, 0).data, base(m, 0).ld, q, z, true);
    for (int i = 0; i < hidden; ++i) h[i] = silu(z[i]);
    times(K, hidden, outer.data, outer.ld, h, out);
    if (w.to_initial) times(K, hidden, base(m, 1).data, base(m, 1).ld, h, out, true);
  }

  void normalize(T* x) const {
    const T inverse = 1 / std::sqrt(dot(K, x, x) + T(1e-12));
    for (int i = 0; i < K; ++i) x[i] *= inverse;
  }
  T logit(int i, const T* x) const {
    const T bias = static_cast<const T*>(w.readouts[2 * i + 1])[head];
    if (w.own_targets) return dot(K, x, static_cast<const T*>(w.readouts[2 * i]) + head * K) + bias;
    return u[std::ptrdiff_t(w.streams) * w.dim + i * w.heads + head] + bias;
  }
  Strength<T> strength(const T* key, int length) const {
    return ::strength<T>(rule, gate, retain, momentum, dot(length, key, key), T(1));
  }

  // What the token writes into one memory (Eq. 84-90).
  void write(int m, const T* k, const T* v) {
    const int hidden = width(m);
    const Matrix<const T> inner = whole[m][0], outer = whole[m][1];
    T *z_v = z + hidden, *difference = h + hidden;
    times(hidden, K, inner.data, inner.ld, k, z);
    if (w.own_targets) times(hidden, K, inner.data, inner.ld, v, z_v);
    for (int i = 0; i < hidden; ++i) {
      h[i] = silu(z[i]);
      difference[i] = w.own_targets ? h[i] - silu(z_v[i]) : h[i];
    }
    const bool residual = m < M - 1 || w.main_residual;
    for (int i = 0; i < K; ++i) error[i] = residual ? k[i] - v[i] : -v[i];
    times(K, hidden, outer.data, outer.ld, difference, error, true);
    times_transposed(K, hidden, outer.data, outer.ld, error, image);
    for (int i = 0; i < hidden; ++i) {
      image[i] *= silu_slope(sigmoid(z[i]), h[i]);
    }
    T on_error = 1, on_image = 1;
    if (w.bound > 0) {
      const T square = T(w.bound * w.bound);
      on_error = std::sqrt(square / std::max(dot(K, error, error), square));
      on_image = std::sqrt(square / std::max(on_error * on_error * dot(hidden, image, image), square));
    }
    const Strength<T> outer_strength = strength(h, hidden);
    const T scale = -T(w.scales[m]) * on_error;
    put(m, 0, hidden, K, k, image, scale * on_image * inner_strength.write, inner_strength.erase);
    put(m, 1, K, hidden, h, error, scale * outer_strength.write, outer_strength.erase);
  }

  // M <- retain M - erase ((M - R) x) x^T + S and S <- momentum S + factor v x^T, one row of the map after the other;
  // without momentum S is the write alone.
  void put(int m, int outer, int count, int length, const T* x, const T* v, T factor, T erase) {
    const Matrix<T> memory = of(outer, m), reference = of(2 + outer, m), sum = of(4 + outer, m);
    T *old = scratch, *old_reference = scratch + std::max(K, w.hidden);
    for (int j = 0; j < count; j += 4) {
      const int rows = std::min(4, count - j);
      if (rule.erases) times(rows, length, memory.data + j * memory.ld, memory.ld, x, old);
      if (w.rule == 2) times(rows, length, reference.data + j * reference.ld, reference.ld, x, old_reference);
      for (int r = 0; r < rows; ++r) {
        T change = factor * v[j + r];
        T* row_of = memory.data + (j + r) * memory.ld;
        const T erased = !rule.erases ? T(0) : erase * (w.rule == 2 ? old[r] - old_reference[r] : old[r]);
        if (sum.data) {
          T* s = sum.data + (j + r) * sum.ld;
          for (int i = 0; i < length; ++i) {
            s[i] = momentum * s[i] + change * x[i];
            row_of[i] = retain * row_of[i] - erased * x[i] + s[i];
          }
        } else {
          change -= erased;
          for (int i = 0; i < length; ++i) row_of[i] = retain * row_of[i] + change * x[i];
        }
      }
    }
  }

  void snapshot(int m) const {
    const std::ptrdiff_t size = std::ptrdiff_t(w.hidden) * K;
    for (int i = 0; i < 2; ++i) std::copy(of(i, m).data, of(i, m).data + size, of(2 + i, m).data);
  }

  static constexpr int most = 6;
  const Token& w;
  const T* u;
  const int row, head, n, M, K;
  T* out;
  const GateRule rule;
  Matrix<const T> whole[most][2];
  T *z, *h, *error, *image, *scratch;
  T gate, retain, momentum;
  Strength<T> inner_strength;
};

// ---- the layer around them ----

template <typename T>
void heads(const Token& w, const T* u, T* o) {
  const std::ptrdiff_t width = std::ptrdiff_t(w.streams) * w.dim + std::ptrdiff_t(w.logits) * w.heads;
  parallel(w.threads, w.rows * w.heads, [&](int n) {
    Head<T>(w, u + (n / w.heads) * width, n / w.heads, n % w.heads, o + std::ptrdiff_t(n) * w.key).run();
  });
  const std::int64_t period = std::max(w.chunk, w.projection_chunk);
  for (int row = 0; row < w.rows; ++row) w.position[row] = (w.position[row] + 1) % period;
}

// Channel j of the convolution: its taps over the tail and over u, the tail moved on.
template <typename T>
void convolve(const Token& w, std::ptrdiff_t channels, int row, int first, int last, T* u) {
  const T* taps = static_cast<const T*>(w.convolution);
  T* tail = static_cast<T*>(w.tail) + row * (w.taps - 1) * channels;
  for (int j = first; j < last; ++j) {
    const T x = u[j];
    T y = 0;
    for (int d = 0; d < w.taps - 1; ++d) {
      y += tail[d * channels + j] * taps[d * channels + j];
      tail[d * channels + j] = d < w.taps - 2 ? tail[(d + 1) * channels + j] : x;
    }
    y += x * taps[(w.taps - 1) * channels + j];
    u[j] = y * sigmoid(y);
  }
}

template <typename T>
void layer(const Token& w) {
  const T* x = static_cast<const T*>(w.inputs);
  const std::ptrdiff_t D = w.dim, channels = D * w.streams, inputs = channels + std::ptrdiff_t(w.logits) * w.heads;
  thread_local std::vector<T> room;
  room.resize(w.rows * (inputs + 2 * D));
  T *u = room.data(), *g = u + w.rows * inputs, *o = g + w.rows * D;
  // Streams, gates' logits and the readout's gate: several maps of the same input.
  struct Map {
    const void* weight;
    std::ptrdiff_t count, stride;
    T* to;
  };
  const Map maps[] = {{w.projection, channels, inputs, u},
                      {w.gates, inputs - channels, inputs, u + channels},
                      {w.gate, D, D, g}};
  int pieces[4] = {};
  for (int i = 0; i < 3; ++i) pieces[i + 1] = pieces[i] + int((maps[i].count + part - 1) / part);
  parallel(w.threads, pieces[3], [&](int piece) {
    const int which = piece < pieces[1] ? 0 : piece < pieces[2] ? 1 : 2;
    const Map& map = maps[which];
    const int first = (piece - pieces[which]) * part, last = int(std::min<std::ptrdiff_t>(map.count, first + part));
    const T* weight = static_cast<const T*>(map.weight) + first * D;
    for (int row = 0; row < w.rows; ++row) {
      T* y = map.to + row * map.stride;
      times(last - first, w.dim, weight, D, x + row * D, y + first);
      if (which == 0) convolve(w, channels, row, first, last, y);
      for (int j = first; which == 2 && j < last; ++j) y[j] *= sigmoid(y[j]);
    }
  });
  heads(w, u, o);
  // The readout.
  const T* norm = static_cast<const T*>(w.norm);
  for (int n = 0; n < w.rows * w.heads; ++n) {
    T *on = o + std::ptrdiff_t(n) * w.key, *gn = g + std::ptrdiff_t(n) * w.key;
    const T inverse = inverse_rms(w.key, on, T(w.eps));
    for (int i = 0; i < w.key; ++i) on[i] *= norm[i] * inverse * gn[i];
  }
  apply(w.threads, w.rows, w.dim, w.dim, static_cast<const T*>(w.output), o, static_cast<T*>(w.out),
        [](int, int, T y) { return y; });
}

template <typename T>
void run(const Token& w) {
  if (w.projection)
    layer<T>(w);
  else
    heads<T>(w, static_cast<const T*>(w.inputs), static_cast<T*>(w.out));
}

}  // namespace

extern "C" {

std::int32_t nestlearn_token_size() { return sizeof(Token); }

std::int32_t nestlearn_token(const Token* w) {
  return status([&] {
    if (w->wide)
      run<double>(*w);
    else
      run<float>(*w);
  });
}
}
