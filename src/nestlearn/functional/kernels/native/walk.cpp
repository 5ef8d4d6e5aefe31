// The walk of two-layer memories over the chunks of a sequence, forward and backward, one row and head a task.
//
// It computes what nestlearn.memory.mlp_chunk and nestlearn.layers.projections compute, in the same order and under the
// same names, but tile by tile: what a memory needs of a chunk stays in a core's cache. Only the memories at the start
// of each segment are kept for the backward pass; everything else is computed again there.
#include "gates.h"
#include "threads.h"

struct Walk {
  // Sizes: rows and heads (N = rows * heads), memories, those read for k, v, gates (and q), the first of the narrow
  // ones and the one after them, key, hidden and value width, longest segment, segments, places.
  std::int32_t rows, heads, memories, projections, narrow_first, narrow_stop, key, hidden, value, chunk, segments,
      places;
  std::int32_t rule;  // 0 dgd, 1 gd, 2 delta
  std::int32_t read;  // 0 token, 1 previous, 2 chunk
  std::int32_t negative_eigenvalues, own_targets, main_residual, adaptive_query, to_initial;
  std::int32_t has_retain, has_momentum, detach_every, keep, threads, wide;
  std::int32_t reads_only;  // all segments read the snapshot that is given, and nothing is written
  double bound, largest_gate;
  const double* scales;
  const std::int32_t* widths;         // of each memory's hidden layer, at most `hidden`
  const std::int32_t* starts;
  const std::int32_t* stops;
  const std::uint8_t* active;         // (rows, places) or null
  const std::uint8_t* reset;          // (segments, rows)
  const std::uint8_t* completes;      // (2, segments, rows): of the main memory, of the others
  // Inputs; memories (N or heads, M, ...) are padded with zeros to `hidden`. streams (3 or 4, N, places, key): q, k, v
  // and the gates' input.
  const void *streams, *logits;       // logits (1 to 3, N, places) where they are given
  const void *readouts[6];            // gate, its bias, retain, its bias, momentum, its bias: (heads, key), (heads)
  const void *base[2], *base_narrow[2];  // inner, outer (heads, M, ...); of the narrow memories apart, or null
  const void *state[6];               // running, snapshot, momentum: inner, outer each
  // Outputs, and the memories at each segment's start (segments, N, ...).
  void *out, *after[6], *saved[4];
  // Backward.
  const void *d_out, *d_after[6];
  void *d_streams, *d_logits, *d_readouts[6], *d_base[2], *d_base_narrow[2], *d_state[6];  // d_base*: (N, ...)
  // What the projections' memories made of each token, (5, N, places, key): q, k, v, rate, retention. Null: not wanted.
  void* made;
  const void* d_made;
};

namespace {

template <typename T>
struct Tiles {
  std::vector<T> s, s_values;  // sigmoid of the hidden layer's input, for keys and values
  std::vector<T> h, difference, error, back, image, inner, outer, inner_values, outer_values;
  std::vector<T> products, factor;  // of the outer map, (c x ld)
  std::vector<T> change_inner_t, change_outer_t, h_t;
  std::vector<T> error_square, image_square, h_square, inner_coefficient, outer_coefficient, on_error, on_image;
  std::vector<Strength<T>> strengths;
};

// A memory at its snapshot with the part that does not change, and its maps transposed.
template <typename T>
struct Whole {
  std::vector<T> inner, outer, inner_t, outer_t;
};

template <typename T>
class Task {
 public:
  explicit Task(const Walk& w)
      : w(w), M(w.memories), P(w.own_targets ? w.projections : 0), K(w.key),
        V(w.value), pad((w.chunk + 15) / 16 * 16), H(w.hidden), inner_size(std::ptrdiff_t(H) * K),
        outer_size(std::ptrdiff_t(V) * H), decays(w.chunk, pad) {
    units.assign(M + 1, 0);
    same.assign(M, 0);
    for (int m = 0; m < M; ++m) units[m + 1] = units[m] + w.widths[m];
    even = units[M] == M * w.hidden;
    rule = GateRule{w.negative_eigenvalues != 0, w.rule != 1, w.has_momentum != 0, w.largest_gate};
    const int c = w.chunk;
    const int widest = std::max(K, std::max(H, V));
    for (auto* v : {&keys, &values, &queries, &d_keys, &d_values, &d_queries}) v->assign(std::ptrdiff_t(c) * K, 0);
    keys_t.assign(std::ptrdiff_t(K) * pad, 0);
    for (auto* v : {&key_norm, &value_norm, &query_norm, &key_square, &gate_logit, &retain_logit, &momentum_logit})
      v->assign(c, 0);
    for (auto* v : {&d_gate, &d_retain, &d_momentum, &d_log_retain, &d_log_momentum, &d_inner_erase, &d_inner_write,
                    &d_outer_erase})
      v->assign(c, 0);
    inner_strengths.resize(c);
    inner_products.assign(std::ptrdiff_t(c) * pad, 0);
    inner_factor.assign(std::ptrdiff_t(c) * pad, 0);
    d_inner_factor.assign(std::ptrdiff_t(c) * pad, 0);
    for (auto* v : {&t.s, &t.s_values, &t.h, &t.difference, &t.back, &t.image, &t.inner, &t.inner_values, &d_h, &d_z,
                    &d_z_values, &d_image, &d_difference, &d_inner, &d_inner_values, &features, &read_s, &scratch_h})
      v->assign(std::ptrdiff_t(c) * H, 0);
    for (auto* v : {&t.error, &t.outer, &t.outer_values, &d_outer, &d_error, &d_outer_values, &read_out})
      v->assign(std::ptrdiff_t(c) * V, 0);
    for (auto* v : {&t.products, &t.factor, &d_factor, &pairs, &inner_attention, &outer_attention, &weighted, &inside})
      v->assign(std::ptrdiff_t(c + 1) * pad, 0);
    wholes.resize(M);
    for (int m = 0; m < M; ++m) {
      use(m);
      for (auto* v : {&wholes[m].inner, &wholes[m].inner_t}) v->assign(inner_size, 0);
      for (auto* v : {&wholes[m].outer, &wholes[m].outer_t}) v->assign(outer_size, 0);
    }
    H = w.hidden;
    t.change_inner_t.assign(std::ptrdiff_t(H) * K, 0);
    t.change_outer_t.assign(std::ptrdiff_t(V) * H, 0);
    t.h_t.assign(std::ptrdiff_t(H) * pad, 0);
    wide_t.assign(std::ptrdiff_t(widest) * std::max(pad, widest), 0);
    wide.assign(std::ptrdiff_t(c) * widest, 0);
    wide2.assign(std::ptrdiff_t(c) * widest, 0);
    for (auto* v : {&t.error_square, &t.image_square, &t.h_square, &t.inner_coefficient, &t.outer_coefficient,
                    &t.on_error, &t.on_image})
      v->assign(c, 0);
    t.strengths.resize(c);
    if (P) {
      projected.assign(std::ptrdiff_t(P) * c * K, 0);
      projected_s.assign(std::ptrdiff_t(P) * c * H, 0);
      projected_h.assign(std::ptrdiff_t(P) * c * H, 0);
      d_projected.assign(std::ptrdiff_t(c) * K, 0);
    }
    if (w.has_momentum) {
      inner_erased.assign(std::ptrdiff_t(c) * H, 0);
      outer_erased.assign(std::ptrdiff_t(c) * V, 0);
      d_inner_erased.assign(std::ptrdiff_t(c) * H, 0);
      d_outer_erased.assign(std::ptrdiff_t(c) * V, 0);
    }
  }

  // Which row and head comes next; the tiles are used again.
  void choose(int next) {
    n = next;
    row = n / w.heads;
    head = n % w.heads;
  }

  void forward() {
    // The state after the walk is where it is kept during the walk.
    T* now[6];
    open(w.state, w.after, now);
    std::fill(same.begin(), same.end(), 0);
    for (int s = 0; s < w.segments; ++s) {
      if (reset(s)) {
        fresh(now);
        std::fill(same.begin(), same.end(), 0);
      }
      if (w.keep) {
        copy(now[0], saved(0, s), total(0));
        copy(now[1], saved(1, s), total(1));
        if (w.has_momentum) {
          copy(now[4], saved(2, s), total(0));
          copy(now[5], saved(3, s), total(1));
        }
      }
      const T* snap[2] = {same[0] ? now[0] : now[2], same[0] ? now[1] : now[3]};
      begin(s, snap[0], snap[1]);
      for (int m = 0; m < M; ++m) {
        use(m);
        write(m, now[0] + at(0, m), now[1] + at(1, m), now[same[m] ? 0 : 2] + at(0, m), now[same[m] ? 1 : 3] + at(1, m),
              w.has_momentum ? now[4] + at(0, m) : nullptr, w.has_momentum ? now[5] + at(1, m) : nullptr);
        if (m == M - 1) {
          read_main(now[0] + at(0, m), now[1] + at(1, m),
                    w.has_momentum ? now[4] + at(0, m) : nullptr,
                    w.has_momentum ? now[5] + at(1, m) : nullptr, true);
          hand_out();
        }
        // A snapshot is the running memory itself until that goes on while the snapshot stays.
        const bool completed = completes(m, s);
        if (same[m] && !completed) take_snapshot(m, now);
        same[m] = completed;
        advance(keys.data(), K, t.inner, H, inner_erased, now[0] + at(0, m),
                w.has_momentum ? now[4] + at(0, m) : nullptr);
        advance(t.h.data(), H, t.outer, V, outer_erased, now[1] + at(1, m),
                w.has_momentum ? now[5] + at(1, m) : nullptr);
      }
    }
    for (int m = 0; m < M; ++m)
      if (same[m]) use(m), take_snapshot(m, now);
    close(w.after, now);
  }

  void read_all() {
    const T* snap[2];
    given_snapshot(snap);
    for (int s = 0; s < w.segments; ++s) {
      begin_reading(s, snap, s == 0);
      read_main(nullptr, nullptr, nullptr, nullptr, true);
      hand_out();
    }
  }

  void read_all_backward() {
    T* d[6];
    open(w.d_after, w.d_state, d);
    const T* snap[2];
    given_snapshot(snap);
    for (int s = 0; s < w.segments; ++s) {
      begin_reading(s, snap, s == 0);
      for (auto* v : {&d_keys, &d_values}) std::fill(v->begin(), v->end(), T(0));
      read_main(nullptr, nullptr, nullptr, nullptr, false);
      whole_inner.resize(inner_size);
      whole_outer.resize(outer_size);
      read_snapshot_backward();
      through_whole(M - 1, whole_inner, whole_outer, d);
      add_made();
      prologue_backward(d);
    }
    close(w.d_state, d);
  }

  void take_snapshot(int m, T** now) {
    copy(now[0] + at(0, m), now[2] + at(0, m), inner_size);
    copy(now[1] + at(1, m), now[3] + at(1, m), outer_size);
  }

  void backward() {
    // Gradients of the running memories, of the snapshot in use, and of the momentum, at the end of segment s.
    T* d[6];
    open(w.d_after, w.d_state, d);
    const T* initial_snapshot[2];
    given_snapshot(initial_snapshot);
    for (int s = w.segments - 1; s >= 0; --s) {
      if (w.detach_every && (s + 1) % w.detach_every == 0)
        for (int i = 0; i < 6; ++i)
          if (d[i]) std::fill(d[i], d[i] + total(i % 2), T(0));
      // The snapshot after this segment is the running memory, where a chunk ends here.
      for (int m = 0; m < M; ++m)
        if (completes(m, s)) {
          use(m);
          fold(d[2] + at(0, m), d[0] + at(0, m), inner_size);
          fold(d[3] + at(1, m), d[1] + at(1, m), outer_size);
        }
      const T *run[2] = {saved(0, s), saved(1, s)}, *momentum[2] = {nullptr, nullptr}, *snap[2][2];
      if (w.has_momentum) momentum[0] = saved(2, s), momentum[1] = saved(3, s);
      for (int main = 0; main < 2; ++main) {
        const int taken = snapshot_of(main, s);
        snap[main][0] = taken < 0 ? initial_snapshot[0] : saved(0, taken);
        snap[main][1] = taken < 0 ? initial_snapshot[1] : saved(1, taken);
      }
      // The prologue reads memories of projections only.
      begin(s, snap[0][0], snap[0][1]);
      for (auto* v : {&d_keys, &d_values, &d_queries, &d_inner_factor}) std::fill(v->begin(), v->end(), T(0));
      for (auto* v : {&d_gate, &d_retain, &d_momentum, &d_log_retain, &d_log_momentum, &d_inner_erase, &d_inner_write})
        std::fill(v->begin(), v->end(), T(0));
      decays.clear_gradients();
      for (int m = 0; m < M; ++m) {
        use(m);
        const T* const* taken = snap[m == M - 1];
        write(m, run[0] + at(0, m), run[1] + at(1, m), taken[0] + at(0, m), taken[1] + at(1, m),
              momentum[0] ? momentum[0] + at(0, m) : nullptr,
              momentum[1] ? momentum[1] + at(1, m) : nullptr);
        memory_backward(m, run, taken, momentum, d);
      }
      inner_factor_backward();
      gates_backward();
      add_made();
      prologue_backward(d);
      if (reset(s)) reset_backward(d);
    }
    close(w.d_state, d);
  }

 private:
  // ---- where things lie ----
  // Of a tensor (N, M, ...) like the inner (0) or the outer maps (1), the part of this row and head.
  T* of(const void* p, int kind) const {
    return p ? static_cast<T*>(const_cast<void*>(p)) + n * padded(kind) : nullptr;
  }
  // Here memories lie one after another, each as wide as it is; outside all are as wide as the widest, with zeros.
  std::ptrdiff_t padded(int kind) const { return std::ptrdiff_t(M) * w.hidden * (kind ? V : K); }
  std::ptrdiff_t at(int kind, int m) const { return units[m] * (kind ? V : K); }
  std::ptrdiff_t total(int kind) const { return at(kind, M); }
  void use(int m) {
    H = w.widths[m];
    whole = &wholes[m];
    inner_size = std::ptrdiff_t(H) * K;
    outer_size = std::ptrdiff_t(V) * H;
  }
  void pack(int kind, const T* from, T* to) const {
    for (int m = 0; m < M; ++m, from += std::ptrdiff_t(w.hidden) * (kind ? V : K)) {
      const int width = w.widths[m];
      if (!kind) copy(from, to + at(0, m), std::ptrdiff_t(width) * K);
      for (int v = 0; kind && v < V; ++v)
        copy(from + std::ptrdiff_t(v) * w.hidden, to + at(1, m) + std::ptrdiff_t(v) * width, width);
    }
  }
  void unpack(int kind, const T* from, T* to) const {
    for (int m = 0; m < M; ++m, to += std::ptrdiff_t(w.hidden) * (kind ? V : K)) {
      const int width = w.widths[m];
      if (!kind) copy(from + at(0, m), to, std::ptrdiff_t(width) * K);
      for (int v = 0; kind && v < V; ++v)
        copy(from + at(1, m) + std::ptrdiff_t(v) * width, to + std::ptrdiff_t(v) * w.hidden, width);
    }
  }
  // Six tensors like a state, in this task's form: the caller's own where all memories are as wide, or copies. What is
  // not given is zero.
  void open(const void* const* from, void* const* into, T** here) {
    for (int i = 0; i < 6; ++i) {
      here[i] = nullptr;
      if (!into[i]) continue;
      if (even) {
        here[i] = of(into[i], i % 2);
        if (!from[i])
          std::fill(here[i], here[i] + total(i % 2), T(0));
        else
          copy(of(from[i], i % 2), here[i], total(i % 2));
      } else {
        local[i].resize(total(i % 2));
        here[i] = local[i].data();
        if (from[i])
          pack(i % 2, of(from[i], i % 2), here[i]);
        else
          std::fill(here[i], here[i] + total(i % 2), T(0));
      }
    }
  }
  // Back into the caller's form.
  void close(void* const* into, T** here) {
    for (int i = 0; i < 6 && !even; ++i) {
      if (!here[i]) continue;
      T* to = of(into[i], i % 2);
      std::fill(to, to + padded(i % 2), T(0));
      unpack(i % 2, here[i], to);
    }
  }
  // The snapshot that came with the state, in this task's form.
  void given_snapshot(const T** snap) {
    for (int i = 0; i < 2; ++i) {
      snap[i] = of(w.state[2 + i], i);
      if (even) continue;
      given[i].resize(total(i));
      pack(i, snap[i], given[i].data());
      snap[i] = given[i].data();
    }
  }
  T* outputs(const void* p) const {
    return static_cast<T*>(const_cast<void*>(p)) + (std::ptrdiff_t(n) * w.places + start) * V;
  }
  T* saved(int i, int s) const {
    const std::ptrdiff_t size = total(i % 2);
    return static_cast<T*>(w.saved[i]) + (std::ptrdiff_t(s) * w.rows * w.heads + n) * size;
  }
  // Memory m of a tensor of initial memories, where the narrow ones may lie apart. `which` is the head, or for
  // gradients the row and head.
  T* initial(const void* const* wide, const void* const* narrow, bool outer, int m, int which) const {
    const std::ptrdiff_t first = at(outer, w.narrow_first), apart = at(outer, w.narrow_stop) - first;
    if (m >= w.narrow_first && m < w.narrow_stop)
      return static_cast<T*>(const_cast<void*>(narrow[outer])) + which * apart + at(outer, m) - first;
    return static_cast<T*>(const_cast<void*>(wide[outer])) + which * (total(outer) - apart) + at(outer, m) -
           (m < w.narrow_first ? 0 : apart);
  }
  const T* base(bool outer, int m) const { return initial(w.base, w.base_narrow, outer, m, head); }
  T* d_base(bool outer, int m) const {
    return initial(const_cast<const void* const*>(w.d_base), const_cast<const void* const*>(w.d_base_narrow),
                   outer, m, n);
  }
  const T* stream(int i) const {
    return static_cast<const T*>(w.streams) + ((std::ptrdiff_t(i) * w.rows * w.heads + n) * w.places + start) * K;
  }
  T* made(const void* p, int i) const {
    return static_cast<T*>(const_cast<void*>(p)) + ((std::ptrdiff_t(i) * w.rows * w.heads + n) * w.places + start) * K;
  }
  T* projection(int p) { return projected.data() + std::ptrdiff_t(p) * c * K; }
  T* d_stream(int i) const {
    return static_cast<T*>(w.d_streams) + ((std::ptrdiff_t(i) * w.rows * w.heads + n) * w.places + start) * K;
  }
  const T* readout(int i) const {
    return w.readouts[i] ? static_cast<const T*>(w.readouts[i]) + head * (i % 2 ? 1 : K) : nullptr;
  }
  T* d_readout(int i) const { return static_cast<T*>(w.d_readouts[i]) + n * (i % 2 ? 1 : K); }
  bool reset(int s) const { return w.reset[s * w.rows + row]; }
  bool completes(int m, int s) const {
    return w.completes[((m == M - 1 ? 0 : 1) * w.segments + s) * w.rows + row];
  }
  // At the start of which segment the snapshot of segment s was taken; -1: it came with the state.
  int snapshot_of(bool main, int s) const {
    for (int at = s; at >= 0; --at)
      if (reset(at) || (at > 0 && completes(main ? M - 1 : -1, at - 1))) return at;
    return -1;
  }
  static void copy(const T* from, T* to, std::ptrdiff_t count) { std::memcpy(to, from, count * sizeof(T)); }
  static void fold(T* from, T* to, std::ptrdiff_t count) {
    NESTLEARN_APART
    for (std::ptrdiff_t i = 0; i < count; ++i) to[i] += from[i], from[i] = 0;
  }

  void fresh(T** now) {
    for (int i = 0; i < 6; ++i) {
      if (!now[i]) continue;
      for (int m = 0; m < M; ++m) {
        T* to = now[i] + at(i % 2, m);
        const std::ptrdiff_t size = at(i % 2, m + 1) - at(i % 2, m);
        if (w.to_initial || i >= 4)
          std::fill(to, to + size, T(0));
        else
          copy(base(i % 2, m), to, size);
      }
    }
  }
  void reset_backward(T** d) {
    for (int i = 0; i < 6; ++i) {
      if (!d[i]) continue;
      for (int m = 0; m < M && !w.to_initial && i < 4; ++m)
        axpy(int(at(i % 2, m + 1) - at(i % 2, m)), T(1), d[i] + at(i % 2, m), d_base(i % 2, m));
      std::fill(d[i], d[i] + total(i % 2), T(0));
    }
  }

  // The memory at the snapshot, with the part that does not change.
  void make_whole(int m, const T* snap_inner, const T* snap_outer) {
    if (w.to_initial) {
      const T *b = base(false, m), *o = base(true, m);
      NESTLEARN_APART
      for (std::ptrdiff_t i = 0; i < inner_size; ++i) whole->inner[i] = snap_inner[i] + b[i];
      NESTLEARN_APART
      for (std::ptrdiff_t i = 0; i < outer_size; ++i) whole->outer[i] = snap_outer[i] + o[i];
    } else {
      copy(snap_inner, whole->inner.data(), inner_size);
      copy(snap_outer, whole->outer.data(), outer_size);
    }
    turned(H, K, whole->inner.data(), whole->inner_t);
    turned(V, H, whole->outer.data(), whole->outer_t);
  }

  // For fewer rows than this, rows of the factor are read as they lie, and no transposed copy is made.
  static constexpr int few = 3;

  // out (c x columns) = [out +] alpha x B^T, with B (columns x width) and, unless there are few rows, its transpose.
  void times(const T* x, int width, const T* b, const T* b_t, int columns, T* out, T alpha = 1, bool add = false) {
    if (c >= few) {
      gemm<T>(c, columns, width, x, width, 1, b_t, columns, out, columns, alpha, add);
      return;
    }
    for (int i = 0; i < c; ++i)
      NESTLEARN_APART
      for (int j = 0; j < columns; ++j) {
        const T y = alpha * dot(width, x + i * width, b + std::ptrdiff_t(j) * width);
        out[i * columns + j] = add ? out[i * columns + j] + y : y;
      }
  }
  const T* turned(int rows, int columns, const T* from, std::vector<T>& to) {
    if (c >= few) transpose(rows, columns, from, columns, to.data(), rows);
    return to.data();
  }


  // ---- k, v, q, gates and decays of segment s (Eq. 83) ----
  int projection_stream(int p) const { return p == 0 ? 1 : p == 1 ? 2 : p == 4 ? 0 : 3; }

  void project(int s, const T* snap_inner, const T* snap_outer, bool make = true) {
    start = w.starts[s];
    c = w.stops[s] - start;
    ld = (c + 15) / 16 * 16;
    if (P) {
      for (int p = 0; p < P; ++p) {
        use(p);
        if (make) make_whole(p, snap_inner + at(0, p), snap_outer + at(1, p));
        const T* x = stream(projection_stream(p));
        T *sig = projected_s.data() + units[p] * c, *h = projected_h.data() + units[p] * c;
        T* y = projected.data() + std::ptrdiff_t(p) * c * K;
        times(x, K, whole->inner.data(), whole->inner_t.data(), H, sig);
        activate(c * H, sig, h);
        copy(x, y, std::ptrdiff_t(c) * K);
        times(h, H, whole->outer.data(), whole->outer_t.data(), K, y, 1, true);
      }
      normalize(projected.data(), keys, key_norm);
      normalize(projected.data() + std::ptrdiff_t(c) * K, values, value_norm);
      normalize(w.adaptive_query ? projected.data() + std::ptrdiff_t(4) * c * K : stream(0), queries, query_norm);
    } else {
      copy(stream(0), queries.data(), std::ptrdiff_t(c) * K);
      copy(stream(1), keys.data(), std::ptrdiff_t(c) * K);
      copy(stream(2), values.data(), std::ptrdiff_t(c) * K);
    }
  }

  // What reads need of segment s; the memories are made whole where `make`.
  void begin_reading(int s, const T* const* snap, bool make) {
    project(s, snap[0], snap[1], make);
    const int m = M - 1;
    use(m);
    if (make) make_whole(m, snap[0] + at(0, m), snap[1] + at(1, m));
  }

  void begin(int s, const T* snap_inner, const T* snap_outer) {
    project(s, snap_inner, snap_outer);
    decays.c = c;
    decays.ld = ld;
    const T *rate = projected.data() + std::ptrdiff_t(2) * c * K, *retention = rate + std::ptrdiff_t(c) * K;
    for (int i = 0; i < c; ++i) {
      if (P) {
        gate_logit[i] = dot(K, rate + i * K, readout(0)) + *readout(1);
        if (w.has_retain) retain_logit[i] = dot(K, retention + i * K, readout(2)) + *readout(3);
        if (w.has_momentum) momentum_logit[i] = dot(K, rate + i * K, readout(4)) + *readout(5);
      } else {
        gate_logit[i] = logit(0)[i];
        if (w.has_retain) retain_logit[i] = logit(1)[i];
        if (w.has_momentum) momentum_logit[i] = logit(1 + w.has_retain)[i];
      }
      decays.active[i] = w.active ? T(w.active[std::ptrdiff_t(row) * w.places + start + i]) : T(1);
      decays.gate[i] = T(w.largest_gate) * sigmoid(gate_logit[i]);
      decays.log_retain[i] = w.has_retain ? log_sigmoid(retain_logit[i]) : T(0);
      decays.retain[i] = exponential(decays.log_retain[i]);
      decays.momentum[i] = w.has_momentum ? sigmoid(momentum_logit[i]) : T(0);
      decays.log_momentum[i] = w.has_momentum ? log_sigmoid(momentum_logit[i]) : T(0);
    }
    decays.compute(w.has_momentum);
    // The inner maps share one key.
    transpose(c, K, keys.data(), K, keys_t.data(), ld);
    for (int k = 0; k < K; ++k)
      for (int i = c; i < ld; ++i) keys_t[std::ptrdiff_t(k) * ld + i] = 0;
    for (int i = 0; i < c; ++i) {
      key_square[i] = dot(K, &keys[i * K], &keys[i * K]);
      inner_strengths[i] = strength<T>(rule, decays.gate[i], decays.retain[i], decays.momentum[i], key_square[i],
                                       decays.active[i]);
    }
    if (rule.erases) triangular(keys.data(), K, keys_t.data(), inner_strengths, inner_products, inner_factor);
    if (w.read != 2)
      gemm<T>(c, ld, K, queries.data(), K, 1, keys_t.data(), ld, inner_attention.data(), ld, 1, false, Shape::OutLower);
  }

  const T* logit(int i) const {
    return static_cast<const T*>(w.logits) + (std::ptrdiff_t(i) * w.rows * w.heads + n) * w.places + start;
  }

  void normalize(const T* x, std::vector<T>& y, std::vector<T>& inverse) {
    for (int i = 0; i < c; ++i) {
      const T by = inverse[i] = 1 / std::sqrt(dot(K, x + i * K, x + i * K) + T(1e-12));
      scale_row(K, by, x + i * K, &y[i * K]);
    }
  }

  // K K^T and A = erase R_before * K K^T, strictly lower.
  void triangular(const T* x, int width, const T* x_t, const std::vector<Strength<T>>& e, std::vector<T>& products,
                  std::vector<T>& factor) {
    gemm<T>(c, ld, width, x, width, 1, x_t, ld, products.data(), ld, 1, false, Shape::OutLower);
    for (int i = 0; i < c; ++i) {
      const T* r = decays.row(decays.retain_between, i - 1);
      T *f = &factor[std::ptrdiff_t(i) * ld], *p = &products[std::ptrdiff_t(i) * ld];
      NESTLEARN_APART
      for (int s = 0; s < i; ++s) f[s] = e[i].erase * r[s] * p[s];
      for (int s = i; s < ld; ++s) f[s] = p[s] = 0;
    }
  }

  // ---- what a chunk writes into one memory (Eq. 84-90) ----
  void write(int m, const T* run_inner, const T* run_outer, const T* snap_inner, const T* snap_outer,
             const T* momentum_inner, const T* momentum_outer) {
    if (m >= P) make_whole(m, snap_inner, snap_outer);
    times(keys.data(), K, whole->inner.data(), whole->inner_t.data(), H, t.s.data());
    activate(c * H, t.s.data(), t.h.data());
    if (w.own_targets) {
      times(values.data(), K, whole->inner.data(), whole->inner_t.data(), H, t.s_values.data());
      activate(c * H, t.s_values.data(), t.difference.data());
      NESTLEARN_APART
      for (int i = 0; i < c * H; ++i) t.difference[i] = t.h[i] - t.difference[i];
    } else {
      copy(t.h.data(), t.difference.data(), std::ptrdiff_t(c) * H);
    }
    const bool residual = has_residual(m);
    NESTLEARN_APART
    for (int i = 0; i < c * V; ++i) t.error[i] = residual ? keys[i] - values[i] : -values[i];
    times(t.difference.data(), H, whole->outer.data(), whole->outer_t.data(), V, t.error.data(), 1, true);
    gemm<T>(c, H, V, t.error.data(), V, 1, whole->outer.data(), H, t.back.data(), H);
    NESTLEARN_APART
    for (int i = 0; i < c * H; ++i) t.image[i] = t.back[i] * silu_slope(t.s[i], t.h[i]);
    const T scale = T(w.scales[m]), square = T(w.bound * w.bound);
    for (int i = 0; i < c; ++i) {
      t.error_square[i] = dot(V, &t.error[i * V], &t.error[i * V]);
      t.image_square[i] = dot(H, &t.image[i * H], &t.image[i * H]);
      t.h_square[i] = dot(H, &t.h[i * H], &t.h[i * H]);
      t.strengths[i] =
          strength<T>(rule, decays.gate[i], decays.retain[i], decays.momentum[i], t.h_square[i], decays.active[i]);
      t.on_error[i] = t.on_image[i] = 1;
      if (w.bound > 0) {
        t.on_error[i] = std::sqrt(square / std::max(t.error_square[i], square));
        const T image = t.on_error[i] * t.on_error[i] * t.image_square[i];
        t.on_image[i] = std::sqrt(square / std::max(image, square));
      }
      t.outer_coefficient[i] = -scale * t.on_error[i] * t.strengths[i].write;
      t.inner_coefficient[i] = -scale * t.on_error[i] * t.on_image[i] * inner_strengths[i].write;
      scale_row(H, t.inner_coefficient[i], &t.image[i * H], &t.inner_values[i * H]);
      scale_row(V, t.outer_coefficient[i], &t.error[i * V], &t.outer_values[i * V]);
    }
    transpose(c, H, t.h.data(), H, t.h_t.data(), ld);
    for (int k = 0; k < H; ++k)
      for (int i = c; i < ld; ++i) t.h_t[std::ptrdiff_t(k) * ld + i] = 0;
    turned(H, K, run_inner, t.change_inner_t);
    turned(V, H, run_outer, t.change_outer_t);
    if (rule.erases) triangular(t.h.data(), H, t.h_t.data(), t.strengths, t.products, t.factor);
    solve(keys.data(), K, H, t.inner_values, run_inner, t.change_inner_t.data(), snap_inner, momentum_inner,
          inner_strengths, inner_products, inner_factor, t.inner, inner_erased);
    solve(t.h.data(), H, V, t.outer_values, run_outer, t.change_outer_t.data(), snap_outer, momentum_outer,
          t.strengths, t.products, t.factor, t.outer, outer_erased);
  }

  bool has_residual(int m) const { return m < M - 1 ? true : w.main_residual != 0; }

  // The triangular system of one map: x (c x width), values (c x columns), memory (columns x width) and its transpose.
  // `given` is kept with momentum only.
  void solve(const T* x, int width, int columns, std::vector<T>& given, const T* memory, const T* memory_t,
             const T* reference, const T* momentum, const std::vector<Strength<T>>& e,
             const std::vector<T>& products, const std::vector<T>& factor, std::vector<T>& writes, std::vector<T>& erased) {
    if (momentum)
      copy(given.data(), writes.data(), std::ptrdiff_t(c) * columns);
    else
      std::swap(given, writes);
    if (!rule.erases) {
      if (momentum) std::fill(erased.begin(), erased.end(), T(0));
      return;
    }
    T* right = momentum ? erased.data() : writes.data();
    if (momentum) std::fill(erased.begin(), erased.end(), T(0));
    scaled(x, width, [&](int i) { return e[i].erase * decays.kept_before(i); });
    times(wide.data(), width, memory, memory_t, columns, right, -1, true);
    if (w.rule == 2) {
      turned(columns, width, reference, wide_t);
      scaled(x, width, [&](int i) { return e[i].erase; });
      times(wide.data(), width, reference, wide_t.data(), columns, right, 1, true);
    }
    if (momentum) {
      turned(columns, width, momentum, wide_t);
      scaled(x, width, [&](int i) { return e[i].erase * decays.carry_before(i); });
      times(wide.data(), width, momentum, wide_t.data(), columns, right, -1, true);
      for (int i = 0; i < c; ++i) {
        const T* r = decays.write_row(true, i - 1);
        for (int s = 0; s < ld; ++s)
          inside[std::ptrdiff_t(i) * ld + s] = s < i ? e[i].erase * r[s] * products[std::ptrdiff_t(i) * ld + s] : T(0);
      }
      gemm<T>(c, columns, c, inside.data(), ld, 1, given.data(), columns, right, columns, -1, true, Shape::LeftLower);
    }
    solve_lower(c, columns, factor.data(), ld, right, columns);
  }

  template <typename F>
  void scaled(const T* x, int width, F factor) {
    scaled_into(x, width, wide, factor);
  }

  // As `advance`: the memory (columns x width) after the chunk, in place.
  void advance(const T* x, int width, const std::vector<T>& writes, int columns, const std::vector<T>& erased,
               T* memory, T* momentum) {
    const T *last = decays.write_row(w.has_momentum, c - 1), *last_retain = decays.row(decays.retain_between, c - 1);
    for (int i = 0; i < c; ++i) {
      scale_row(columns, last[i], &writes[i * columns], &wide2[i * columns]);
      if (momentum) axpy(columns, last_retain[i], &erased[i * columns], &wide2[i * columns]);
    }
    const T kept = decays.kept[c - 1];
    const std::ptrdiff_t size = std::ptrdiff_t(columns) * width;
    if (momentum) {
      const T carry = decays.carry[c - 1];
      NESTLEARN_APART
      for (std::ptrdiff_t i = 0; i < size; ++i) memory[i] = kept * memory[i] + carry * momentum[i];
    } else {
      NESTLEARN_APART
      for (std::ptrdiff_t i = 0; i < size; ++i) memory[i] *= kept;
    }
    gemm<T>(columns, width, c, wide2.data(), 1, columns, x, width, memory, width, 1, true);
    if (!momentum) return;
    const T* of_momentum = decays.row(decays.momentum_between, c - 1);
    for (int i = 0; i < c; ++i)
      scale_row(columns, of_momentum[i], &writes[i * columns], &wide2[i * columns]);
    NESTLEARN_APART
    for (std::ptrdiff_t i = 0; i < size; ++i) momentum[i] *= decays.momentum_kept[c - 1];
    gemm<T>(columns, width, c, wide2.data(), 1, columns, x, width, momentum, width, 1, true);
  }

  // ---- reads of the main memory, whose tiles are in t ----
  // Its hidden features and, if they are wanted, the outputs.
  void read_main(const T* run_inner, const T* run_outer, const T* momentum_inner, const T* momentum_outer,
                 bool output) {
    const int m = M - 1;
    if (w.read == 2) {
      times(queries.data(), K, whole->inner.data(), whole->inner_t.data(), H, read_s.data());
      activate(c * H, read_s.data(), features.data());
      if (output) times(features.data(), H, whole->outer.data(), whole->outer_t.data(), V, read_out.data());
    } else {
      read(queries.data(), K, H, inner_attention, run_inner, t.change_inner_t.data(), momentum_inner, t.inner,
           inner_erased, base(false, m), read_s);
      activate(c * H, read_s.data(), features.data());
      gemm<T>(c, ld, H, features.data(), H, 1, t.h_t.data(), ld, outer_attention.data(), ld, 1, false, Shape::OutLower);
      if (output)
        read(features.data(), H, V, outer_attention, run_outer, t.change_outer_t.data(), momentum_outer, t.outer,
             outer_erased, base(true, m), read_out);
    }
    if (output && w.main_residual)
      NESTLEARN_APART
      for (int i = 0; i < c * V; ++i) read_out[i] += queries[i];
  }

  void hand_out() {
    copy(read_out.data(), outputs(w.out), std::ptrdiff_t(c) * V);
    if (!w.made) return;
    const T* parts[] = {queries.data(), keys.data(), values.data(), projection(2), projection(3)};
    for (int i = 0; i < 5; ++i) copy(parts[i], made(w.made, i), std::ptrdiff_t(c) * K);
  }

  int before() const { return w.read == 1 ? 1 : 0; }
  T read_kept(int i) const { return before() ? decays.kept_before(i) : decays.kept[i]; }
  T read_carry(int i) const { return before() ? decays.carry_before(i) : decays.carry[i]; }

  // weighted = R * attention, lower triangular, with the factors of the token or of the one before.
  void weigh(std::vector<T>& between, const std::vector<T>& attention) {
    for (int i = 0; i < c; ++i) {
      const T *r = decays.row(between, i - before()), *a = &attention[std::ptrdiff_t(i) * ld];
      T* out = &weighted[std::ptrdiff_t(i) * ld];
      const int end = i + 1 - before();
      NESTLEARN_APART
      for (int s = 0; s < end; ++s) out[s] = r[s] * a[s];
      for (int s = end; s < ld; ++s) out[s] = 0;
    }
  }
  std::vector<T>& write_between() { return w.has_momentum ? decays.write_between : decays.retain_between; }

  void read(const T* q, int width, int columns, const std::vector<T>& attention, const T* memory, const T* memory_t,
            const T* momentum, const std::vector<T>& writes, const std::vector<T>& erased, const T* fixed,
            std::vector<T>& out) {
    scaled(q, width, [&](int i) { return read_kept(i); });
    times(wide.data(), width, memory, memory_t, columns, out.data());
    weigh(write_between(), attention);
    gemm<T>(c, columns, c, weighted.data(), ld, 1, writes.data(), columns, out.data(), columns, 1, true,
            Shape::LeftLower);
    if (momentum) {
      turned(columns, width, momentum, wide_t);
      scaled(q, width, [&](int i) { return read_carry(i); });
      times(wide.data(), width, momentum, wide_t.data(), columns, out.data(), 1, true);
      if (rule.erases) {
        weigh(decays.retain_between, attention);
        gemm<T>(c, columns, c, weighted.data(), ld, 1, erased.data(), columns, out.data(), columns, 1, true,
                Shape::LeftLower);
      }
    }
    if (w.to_initial) {
      turned(columns, width, fixed, wide_t);
      times(q, width, fixed, wide_t.data(), columns, out.data(), 1, true);
    }
  }

  // Gradients of `read`: adds to d_memory (columns x width), d_momentum, d_fixed, d_keys_of (c x width), and sets
  // d_q (c x width), d_writes, d_erased (c x columns).
  void read_backward(const T* d_out, const T* q, int width, int columns, const std::vector<T>& attention,
                     const T* memory, const T* momentum, const std::vector<T>& writes, const std::vector<T>& erased,
                     const T* fixed, const T* x, T* d_q, T* d_writes, T* d_erased, T* d_x, T* d_memory, T* d_momentum,
                     T* d_fixed) {
    // out = g q M^T
    gemm<T>(c, width, columns, d_out, columns, 1, memory, width, wide.data(), width);
    for (int i = 0; i < c; ++i) {
      const T g = read_kept(i), along = dot(width, q + i * width, &wide[i * width]);
      add_log_kept(i, g * along);
      scale_row(width, g, &wide[i * width], d_q + i * width);
    }
    scaled_into(d_out, columns, wide2, [&](int i) { return read_kept(i); });
    gemm<T>(columns, width, c, wide2.data(), 1, columns, q, width, d_memory, width, 1, true);
    // + (R^w * q K^T) writes
    std::fill(d_factor.begin(), d_factor.begin() + std::ptrdiff_t(c) * ld, T(0));
    pairs_backward(d_out, columns, writes, attention, write_between(), w.has_momentum, d_writes);
    if (momentum) {
      gemm<T>(c, width, columns, d_out, columns, 1, momentum, width, wide.data(), width);
      for (int i = 0; i < c; ++i) {
        const T g = read_carry(i), along = dot(width, q + i * width, &wide[i * width]);
        if (i - before() >= 0) decays.d_carry[i - before()] += along;
        axpy(width, g, &wide[i * width], d_q + i * width);
      }
      scaled_into(d_out, columns, wide2, [&](int i) { return read_carry(i); });
      gemm<T>(columns, width, c, wide2.data(), 1, columns, q, width, d_momentum, width, 1, true);
      if (rule.erases) pairs_backward(d_out, columns, erased, attention, decays.retain_between, false, d_erased);
    }
    // the attention q K^T itself
    gemm<T>(c, width, c, d_factor.data(), ld, 1, x, width, d_q, width, 1, true, Shape::LeftLower);
    gemm<T>(c, width, c, d_factor.data(), 1, ld, q, width, d_x, width, 1, true, Shape::LeftUpper);
    if (w.to_initial) {
      gemm<T>(c, width, columns, d_out, columns, 1, fixed, width, d_q, width, 1, true);
      gemm<T>(columns, width, c, d_out, 1, columns, q, width, d_fixed, width, 1, true);
    }
  }

  // Of out += (R * attention) y: adds R * (d_out y^T) to d_factor, sets d_y, and adds to the gradient of R.
  void pairs_backward(const T* d_out, int columns, const std::vector<T>& y, const std::vector<T>& attention,
                      std::vector<T>& between, bool plain, T* d_y) {
    transposed(y.data(), columns);
    gemm<T>(c, ld, columns, d_out, columns, 1, wide_t.data(), ld, pairs.data(), ld, 1, false, Shape::OutLower);
    for (int i = 0; i < c; ++i) {
      const int at = i - before(), end = at + 1;
      const T *r = decays.row(between, at), *a = &attention[std::ptrdiff_t(i) * ld],
          *p = &pairs[std::ptrdiff_t(i) * ld];
      T *f = &d_factor[std::ptrdiff_t(i) * ld], *out = &weighted[std::ptrdiff_t(i) * ld];
      T* g = decays.row(plain ? decays.d_write : decays.d_log_between, at);
      NESTLEARN_APART
      for (int s = 0; s < end; ++s) {
        f[s] += r[s] * p[s];
        out[s] = r[s] * a[s];
        g[s] += p[s] * (plain ? a[s] : out[s]);
      }
      for (int s = end; s < ld; ++s) out[s] = 0;
    }
    gemm<T>(c, columns, c, weighted.data(), 1, ld, d_out, columns, d_y, columns, 1, false, Shape::LeftUpper);
  }

  // y (c x columns) to wide_t (columns x ld), with zeros behind c.
  void transposed(const T* y, int columns) {
    transpose(c, columns, y, columns, wide_t.data(), ld);
    for (int k = 0; k < columns; ++k)
      for (int i = c; i < ld; ++i) wide_t[std::ptrdiff_t(k) * ld + i] = 0;
  }

  template <typename F>
  void scaled_into(const T* x, int width, std::vector<T>& out, F factor) {
    for (int i = 0; i < c; ++i) scale_row(width, factor(i), x + i * width, &out[i * width]);
  }

  void add_log_kept(int i, T x) {
    const int at = i - before();
    if (at >= 0) decays.d_log_kept[at] += x;
  }

  // ---- gradients of one memory, whose tiles are in t ----
  void memory_backward(int m, const T* const* run, const T* const* snap, const T* const* momentum, T** d) {
    const std::ptrdiff_t at_inner = at(0, m), at_outer = at(1, m);
    const bool main = m == M - 1;
    T *base_inner = d_base(false, m), *base_outer = d_base(true, m);
    const T* momentum_inner = momentum[0] ? momentum[0] + at_inner : nullptr;
    const T* momentum_outer = momentum[1] ? momentum[1] + at_outer : nullptr;
    std::fill(d_h.begin(), d_h.end(), T(0));
    // Gradients of the whole memory gather in `whole_*`, those of the memory before the chunk in place of those of the
    // memory after it, or in `before_*` where a read adds to them while those are still needed.
    const bool was_read = main && w.read != 2, chunk_read = main && w.read == 2;
    whole_inner.resize(inner_size);
    whole_outer.resize(outer_size);
    if (was_read) {
      before_inner.assign(inner_size, 0);
      before_outer.assign(outer_size, 0);
    }
    momentum_before_inner.assign(w.has_momentum ? inner_size : 0, 0);
    momentum_before_outer.assign(w.has_momentum ? outer_size : 0, 0);
    if (main) main_backward(run, momentum_inner, momentum_outer, base_inner, base_outer);

    write_backward(t.h.data(), H, V, t.outer_values, run[1] + at_outer, snap[1] + at_outer, momentum_outer, t.strengths,
                   t.products, t.factor, t.outer, outer_erased, d[1] + at_outer, d[5] ? d[5] + at_outer : nullptr,
                   was_read, d_outer, d_outer_erased, d_h, d_outer_values, d_outer_erase, d_factor,
                   before_outer, momentum_before_outer, d[3] + at_outer);
    factor_backward(t.h.data(), H, t.strengths, t.products, t.factor, d_factor, d_h, d_outer_erase);
    write_backward(keys.data(), K, H, t.inner_values, run[0] + at_inner, snap[0] + at_inner, momentum_inner,
                   inner_strengths, inner_products, inner_factor, t.inner, inner_erased, d[0] + at_inner,
                   d[4] ? d[4] + at_inner : nullptr, was_read, d_inner, d_inner_erased, d_keys,
                   d_inner_values, d_inner_erase_one, d_inner_factor, before_inner, momentum_before_inner,
                   d[2] + at_inner);
    for (int i = 0; i < c; ++i) d_inner_erase[i] += d_inner_erase_one[i];

    // Coefficients, bounds and strengths.
    const T scale = T(w.scales[m]), square = T(w.bound * w.bound);
    for (int i = 0; i < c; ++i) {
      const T d_outer_coefficient = dot(V, &d_outer_values[i * V], &t.error[i * V]);
      const T d_inner_coefficient = dot(H, &d_inner_values[i * H], &t.image[i * H]);
      const T on_error = t.on_error[i], on_image = t.on_image[i];
      const T inner_write = inner_strengths[i].write, outer_write = t.strengths[i].write;
      T d_on_error = -scale * (outer_write * d_outer_coefficient + on_image * inner_write * d_inner_coefficient);
      const T d_on_image = -scale * on_error * inner_write * d_inner_coefficient;
      d_inner_write[i] -= scale * on_error * on_image * d_inner_coefficient;
      const T d_outer_write = -scale * on_error * d_outer_coefficient;
      T d_image_square = 0, d_error_square = 0;
      if (w.bound > 0) {
        const T bounded = on_error * on_error * t.image_square[i];
        if (bounded >= square) {
          const T d_bounded = d_on_image * T(-0.5) * on_image / bounded;
          d_image_square = d_bounded * on_error * on_error;
          d_on_error += d_bounded * 2 * on_error * t.image_square[i];
        }
        if (t.error_square[i] >= square) d_error_square = d_on_error * T(-0.5) * on_error / t.error_square[i];
      }
      const StrengthGradient<T> g = strength_backward<T>(rule, decays.gate[i], decays.retain[i], decays.momentum[i],
                                                         t.h_square[i], decays.active[i], d_outer_erase[i],
                                                             d_outer_write);
      d_gate[i] += g.gate;
      d_retain[i] += g.retain;
      d_momentum[i] += g.momentum;
      const T on_h = 2 * g.square, on_inner = t.inner_coefficient[i], on_outer = t.outer_coefficient[i];
      NESTLEARN_APART
      for (int j = 0; j < H; ++j) {
        d_image[i * H + j] = on_inner * d_inner_values[i * H + j] + 2 * d_image_square * t.image[i * H + j];
        d_h[i * H + j] += on_h * t.h[i * H + j];
      }
      NESTLEARN_APART
      for (int j = 0; j < V; ++j)
        d_error[i * V + j] = on_outer * d_outer_values[i * V + j] + 2 * d_error_square * t.error[i * V + j];
    }

    // Back from the image and the error (Eq. 84, 85).
    NESTLEARN_APART
    for (int i = 0; i < c * H; ++i) {
      const T s = t.s[i], h = t.h[i], rest = 1 - s;
      const T curvature = rest * (h + 2 * s * (1 - h));
      d_z[i] = d_image[i] * t.back[i] * curvature;
      d_image[i] *= s + h * rest;  // now the gradient of the error through W1
    }
    gemm<T>(V, H, c, t.error.data(), 1, V, d_image.data(), H, whole_outer.data(), H, 1, chunk_read);
    times(d_image.data(), H, whole->outer.data(), whole->outer_t.data(), V, d_error.data(), 1, true);
    gemm<T>(c, H, V, d_error.data(), V, 1, whole->outer.data(), H, d_difference.data(), H);
    gemm<T>(V, H, c, d_error.data(), 1, V, t.difference.data(), H, whole_outer.data(), H, 1, true);
    NESTLEARN_APART
    for (int i = 0; i < c * H; ++i) d_z[i] += (d_h[i] + d_difference[i]) * silu_slope(t.s[i], t.h[i]);
    gemm<T>(c, K, H, d_z.data(), H, 1, whole->inner.data(), K, d_keys.data(), K, 1, true);
    gemm<T>(H, K, c, d_z.data(), 1, H, keys.data(), K, whole_inner.data(), K, 1, chunk_read);
    if (w.own_targets) {
      NESTLEARN_APART
      for (int i = 0; i < c * H; ++i)
        d_z_values[i] = -d_difference[i] * silu_slope(t.s_values[i], t.h[i] - t.difference[i]);
      gemm<T>(c, K, H, d_z_values.data(), H, 1, whole->inner.data(), K, d_values.data(), K, 1, true);
      gemm<T>(H, K, c, d_z_values.data(), 1, H, values.data(), K, whole_inner.data(), K, 1, true);
    }
    const bool residual = has_residual(m);
    NESTLEARN_APART
    for (int i = 0; i < c * V; ++i) {
      if (residual) d_keys[i] += d_error[i];
      d_values[i] -= d_error[i];
    }
    // To the memory before, to the snapshot and to what does not change.
    if (was_read) {
      copy(before_inner.data(), d[0] + at_inner, inner_size);
      copy(before_outer.data(), d[1] + at_outer, outer_size);
    }
    if (w.has_momentum) {
      copy(momentum_before_inner.data(), d[4] + at_inner, inner_size);
      copy(momentum_before_outer.data(), d[5] + at_outer, outer_size);
    }
    through_whole(m, whole_inner, whole_outer, d);
  }

  void through_whole(int m, const std::vector<T>& inner, const std::vector<T>& outer, T** d) {
    for (int i = 0; i < 2; ++i) {
      const T* __restrict from = i ? outer.data() : inner.data();
      T *__restrict snapshot = d[2 + i] + at(i, m), *__restrict initial = w.to_initial ? d_base(i, m) : nullptr;
      const std::ptrdiff_t size = i ? outer_size : inner_size;
      if (!initial) {
        axpy(int(size), T(1), from, snapshot);
        continue;
      }
      for (std::ptrdiff_t j = 0; j < size; ++j) snapshot[j] += from[j], initial[j] += from[j];
    }
  }

  void main_backward(const T* const* run, const T* momentum_inner, const T* momentum_outer, T* base_inner,
                     T* base_outer) {
    const int m = M - 1;
    const T* d_out = outputs(w.d_out);
    read_main(run[0] + at(0, m), run[1] + at(1, m), momentum_inner, momentum_outer, false);
    if (w.read == 2) {
      read_snapshot_backward();
    } else {
      read_backward(d_out, features.data(), H, V, outer_attention, run[1] + at(1, m), momentum_outer, t.outer,
                    outer_erased, base(true, m), t.h.data(), scratch_h.data(), d_outer.data(), d_outer_erased.data(),
                    d_h.data(), before_outer.data(), momentum_before_outer.data(), base_outer);
      NESTLEARN_APART
      for (int i = 0; i < c * H; ++i) scratch_h[i] *= silu_slope(read_s[i], features[i]);
      read_backward(scratch_h.data(), queries.data(), K, H, inner_attention, run[0] + at(0, m), momentum_inner,
                    t.inner, inner_erased, base(false, m), keys.data(), d_queries.data(), d_inner.data(),
                    d_inner_erased.data(), d_keys.data(), before_inner.data(), momentum_before_inner.data(),
                        base_inner);
      if (w.main_residual) axpy(c * K, T(1), d_out, d_queries.data());
    }
  }

  // Sets d_queries, and the gradient of the memory at its snapshot.
  void read_snapshot_backward() {
    const T* d_out = outputs(w.d_out);
    gemm<T>(c, H, V, d_out, V, 1, whole->outer.data(), H, scratch_h.data(), H);
    gemm<T>(V, H, c, d_out, 1, V, features.data(), H, whole_outer.data(), H);
    NESTLEARN_APART
    for (int i = 0; i < c * H; ++i) scratch_h[i] *= silu_slope(read_s[i], features[i]);
    gemm<T>(c, K, H, scratch_h.data(), H, 1, whole->inner.data(), K, d_queries.data(), K);
    gemm<T>(H, K, c, scratch_h.data(), 1, H, queries.data(), K, whole_inner.data(), K);
    if (w.main_residual) axpy(c * K, T(1), d_out, d_queries.data());
  }

  // What is asked of q, k and v beside what reads and writes ask.
  void add_made() {
    if (!w.d_made) return;
    std::vector<T>* gradients[] = {&d_queries, &d_keys, &d_values};
    for (int i = 0; i < 3; ++i) axpy(c * K, T(1), made(w.d_made, i), gradients[i]->data());
  }

  // Gradients of `solve` and `advance` together, for one map of one memory. Adds to d_x (c x width), d_factor_total,
  // before, momentum_before and d_reference; sets d_given and d_erase.
  void write_backward(const T* x, int width, int columns, const std::vector<T>& given, const T* memory,
                      const T* reference, const T* momentum, const std::vector<Strength<T>>& e,
                      const std::vector<T>& products, const std::vector<T>& factor, const std::vector<T>& writes,
                      const std::vector<T>& erased, T* d_memory, const T* d_momentum, bool was_read,
                      std::vector<T>& d_writes, std::vector<T>& d_erased, std::vector<T>& d_x, std::vector<T>& d_given,
                      std::vector<T>& d_erase, std::vector<T>& d_factor_total, std::vector<T>& before_read,
                      std::vector<T>& momentum_before, T* d_reference) {
    const bool shared = &d_factor_total == &d_inner_factor;
    const T *last = decays.write_row(w.has_momentum, c - 1), *last_retain = decays.row(decays.retain_between, c - 1);
    if (!was_read && momentum) std::fill(d_erased.begin(), d_erased.begin() + std::ptrdiff_t(c) * columns, T(0));
    d_erase.assign(w.chunk, 0);
    // M' = g M + (last * writes + last_retain * erased)^T x + c S
    const std::ptrdiff_t size = std::ptrdiff_t(columns) * width;
    turned(columns, width, d_memory, wide_t);
    scaled(x, width, [&](int i) { return last[i]; });
    times(wide.data(), width, d_memory, wide_t.data(), columns, d_writes.data(), 1, was_read);
    if (momentum) {
      scaled(x, width, [&](int i) { return last_retain[i]; });
      times(wide.data(), width, d_memory, wide_t.data(), columns, d_erased.data(), 1, true);
    }
    gemm<T>(c, width, columns, writes.data(), columns, 1, d_memory, width, wide.data(), width);
    for (int i = 0; i < c; ++i) {
      const T along = dot(width, x + i * width, &wide[i * width]);
      if (w.has_momentum)
        decays.row(decays.d_write, c - 1)[i] += along;
      else
        decays.row(decays.d_log_between, c - 1)[i] += last[i] * along;
      axpy(width, last[i], &wide[i * width], &d_x[i * width]);
    }
    const T kept = decays.kept[c - 1];
    decays.d_log_kept[c - 1] += kept * dot(int(size), d_memory, memory);
    if (momentum) {
      gemm<T>(c, width, columns, erased.data(), columns, 1, d_memory, width, wide.data(), width);
      for (int i = 0; i < c; ++i) {
        decays.row(decays.d_log_between, c - 1)[i] += last_retain[i] * dot(width, x + i * width, &wide[i * width]);
        axpy(width, last_retain[i], &wide[i * width], &d_x[i * width]);
      }
      axpy(int(size), decays.carry[c - 1], d_memory, momentum_before.data());
      decays.d_carry[c - 1] += dot(int(size), d_memory, momentum);
      // S' = g^m S + (R^m_last * writes)^T x
      const T* of_momentum = decays.row(decays.momentum_between, c - 1);
      turned(columns, width, d_momentum, wide_t);
      times(x, width, d_momentum, wide_t.data(), columns, wide2.data());
      gemm<T>(c, width, columns, writes.data(), columns, 1, d_momentum, width, wide.data(), width);
      for (int i = 0; i < c; ++i) {
        axpy(columns, of_momentum[i], &wide2[i * columns], &d_writes[i * columns]);
        decays.d_momentum_last[i] += dot(width, x + i * width, &wide[i * width]);
        axpy(width, of_momentum[i], &wide[i * width], &d_x[i * width]);
      }
      axpy(int(size), decays.momentum_kept[c - 1], d_momentum, momentum_before.data());
      decays.d_momentum_carried += dot(int(size), d_momentum, momentum);
    }
    T* before = was_read ? before_read.data() : d_memory;
    if (was_read)
      axpy(int(size), kept, d_memory, before);
    else
      for (std::ptrdiff_t i = 0; i < size; ++i) before[i] *= kept;
    if (!rule.erases) {
      copy(d_writes.data(), d_given.data(), std::ptrdiff_t(c) * columns);
      if (!shared) std::fill(d_factor_total.begin(), d_factor_total.end(), T(0));
      return;
    }
    // (I + A) X = right
    std::vector<T>& right = momentum ? d_erased : d_writes;
    solve_lower_transposed(c, columns, factor.data(), ld, right.data(), columns);
    transposed((momentum ? erased : writes).data(), columns);
    gemm<T>(c, ld, columns, right.data(), columns, 1, wide_t.data(), ld, d_factor_total.data(), ld, -1, shared,
            Shape::OutLower);
    // right = G - e g_b x M^T [+ e x R^T] [- e c_b x S^T - e (R^w_b * x x^T) G]
    gemm<T>(c, width, columns, right.data(), columns, 1, memory, width, wide.data(), width);
    for (int i = 0; i < c; ++i) {
      const T along = dot(width, x + i * width, &wide[i * width]), kept_before = decays.kept_before(i);
      d_erase[i] -= kept_before * along;
      if (i) decays.d_log_kept[i - 1] -= kept_before * e[i].erase * along;
      axpy(width, -e[i].erase * kept_before, &wide[i * width], &d_x[i * width]);
    }
    scaled_into(right.data(), columns, wide2, [&](int i) { return -e[i].erase * decays.kept_before(i); });
    gemm<T>(columns, width, c, wide2.data(), 1, columns, x, width, before, width, 1, true);
    if (w.rule == 2) {
      gemm<T>(c, width, columns, right.data(), columns, 1, reference, width, wide.data(), width);
      for (int i = 0; i < c; ++i) {
        d_erase[i] += dot(width, x + i * width, &wide[i * width]);
        axpy(width, e[i].erase, &wide[i * width], &d_x[i * width]);
      }
      scaled_into(right.data(), columns, wide2, [&](int i) { return e[i].erase; });
      gemm<T>(columns, width, c, wide2.data(), 1, columns, x, width, d_reference, width, 1, true);
    }
    if (!momentum) {
      std::swap(right, d_given);
      return;
    }
    gemm<T>(c, width, columns, right.data(), columns, 1, momentum, width, wide.data(), width);
    for (int i = 0; i < c; ++i) {
      const T along = dot(width, x + i * width, &wide[i * width]), carry = decays.carry_before(i);
      d_erase[i] -= carry * along;
      if (i) decays.d_carry[i - 1] -= e[i].erase * along;
      axpy(width, -e[i].erase * carry, &wide[i * width], &d_x[i * width]);
    }
    scaled_into(right.data(), columns, wide2, [&](int i) { return -e[i].erase * decays.carry_before(i); });
    gemm<T>(columns, width, c, wide2.data(), 1, columns, x, width, momentum_before.data(), width, 1, true);
    // inside = e R^w_b * x x^T, strictly lower
    transposed(given.data(), columns);
    gemm<T>(c, ld, columns, right.data(), columns, 1, wide_t.data(), ld, pairs.data(), ld, 1, false, Shape::OutLower);
    for (int i = 0; i < c; ++i) {
      const T* r = decays.write_row(true, i - 1);
      T *g = decays.row(decays.d_write, i - 1), *f = &inside[std::ptrdiff_t(i) * ld];
      const T *q = &pairs[std::ptrdiff_t(i) * ld], *p = &products[std::ptrdiff_t(i) * ld];
      NESTLEARN_APART
      for (int s = 0; s < i; ++s) {
        const T through = q[s] * p[s];
        d_erase[i] -= r[s] * through;
        g[s] -= e[i].erase * through;
        f[s] = e[i].erase * r[s];
      }
    }
    for (int i = 0; i < c; ++i)
      for (int s = 0; s < ld; ++s) {
        T& f = inside[std::ptrdiff_t(i) * ld + s];
        const T through = s < i ? f * pairs[std::ptrdiff_t(i) * ld + s] : T(0);
        weighted[std::ptrdiff_t(i) * ld + s] = through;
        f = s < i ? f * products[std::ptrdiff_t(i) * ld + s] : T(0);
      }
    copy(d_writes.data(), d_given.data(), std::ptrdiff_t(c) * columns);
    gemm<T>(c, columns, c, inside.data(), 1, ld, right.data(), columns, d_given.data(), columns, -1, true,
            Shape::LeftUpper);
    gemm<T>(c, width, c, weighted.data(), ld, 1, x, width, d_x.data(), width, -1, true, Shape::LeftLower);
    gemm<T>(c, width, c, weighted.data(), 1, ld, x, width, d_x.data(), width, -1, true, Shape::LeftUpper);
  }

  // Of A = erase R_before * x x^T.
  void factor_backward(const T* x, int width, const std::vector<Strength<T>>& e, const std::vector<T>& products,
                       const std::vector<T>& factor, std::vector<T>& d_a, std::vector<T>& d_x,
                           std::vector<T>& d_erase) {
    if (!rule.erases) return;
    for (int i = 0; i < c; ++i) {
      const T* r = decays.row(decays.retain_between, i - 1);
      T *g = decays.row(decays.d_log_between, i - 1), *f = &d_a[std::ptrdiff_t(i) * ld];
      const T *a = &factor[std::ptrdiff_t(i) * ld], *p = &products[std::ptrdiff_t(i) * ld];
      T sum = 0;
      NESTLEARN_APART
      for (int s = 0; s < i; ++s) {
        sum += r[s] * p[s] * f[s];
        g[s] += a[s] * f[s];
        f[s] *= e[i].erase * r[s];
      }
      for (int s = i; s < ld; ++s) f[s] = 0;
      d_erase[i] += sum;
    }
    gemm<T>(c, width, c, d_a.data(), ld, 1, x, width, d_x.data(), width, 1, true, Shape::LeftLower);
    gemm<T>(c, width, c, d_a.data(), 1, ld, x, width, d_x.data(), width, 1, true, Shape::LeftUpper);
  }

  void inner_factor_backward() {
    factor_backward(keys.data(), K, inner_strengths, inner_products, inner_factor, d_inner_factor, d_keys,
                    d_inner_erase);
    for (int i = 0; i < c; ++i) {
      const StrengthGradient<T> g =
          strength_backward<T>(rule, decays.gate[i], decays.retain[i], decays.momentum[i], key_square[i],
                               decays.active[i], d_inner_erase[i], d_inner_write[i]);
      d_gate[i] += g.gate;
      d_retain[i] += g.retain;
      d_momentum[i] += g.momentum;
      axpy(K, 2 * g.square, &keys[i * K], &d_keys[i * K]);
    }
  }

  // From the gates to their logits, which end in d_gate, d_retain and d_momentum.
  void gates_backward() {
    decays.backward(w.has_momentum, d_log_retain.data(), d_log_momentum.data());
    for (int i = 0; i < c; ++i) {
      const T gate = decays.gate[i], retain = decays.retain[i], momentum = decays.momentum[i];
      d_gate[i] *= gate * (1 - gate / T(w.largest_gate));
      d_retain[i] = (d_retain[i] * retain + d_log_retain[i]) * sigmoid(-retain_logit[i]);
      d_momentum[i] = (d_momentum[i] * momentum + d_log_momentum[i]) * sigmoid(-momentum_logit[i]);
    }
  }

  void prologue_backward(T** d) {
    if (!P) {
      copy(d_queries.data(), d_stream(0), std::ptrdiff_t(c) * K);
      copy(d_keys.data(), d_stream(1), std::ptrdiff_t(c) * K);
      copy(d_values.data(), d_stream(2), std::ptrdiff_t(c) * K);
      int count = 0;
      for (const auto* d : {&d_gate, w.has_retain ? &d_retain : nullptr, w.has_momentum ? &d_momentum : nullptr})
        if (d)
          copy(d->data(),
               static_cast<T*>(w.d_logits) + (std::ptrdiff_t(count++) * w.rows * w.heads + n) * w.places + start, c);
      return;
    }
    if (!w.adaptive_query) normalize_backward(d_queries, queries, query_norm, d_stream(0));
    for (int p = 0; p < P; ++p) {
      use(p);
      T* y = projected.data() + std::ptrdiff_t(p) * c * K;
      if (p == 0) normalize_backward(d_keys, keys, key_norm, d_projected.data());
      if (p == 1) normalize_backward(d_values, values, value_norm, d_projected.data());
      if (p == 4) normalize_backward(d_queries, queries, query_norm, d_projected.data());
      if (p == 2 || p == 3) std::fill(d_projected.begin(), d_projected.end(), T(0));
      if (p == 2 && !w.reads_only) {
        readout_backward(d_gate, y, 0);
        if (w.has_momentum) readout_backward(d_momentum, y, 4);
      }
      if (p == 3 && w.has_retain && !w.reads_only) readout_backward(d_retain, y, 2);
      if (w.d_made && (p == 2 || p == 3)) axpy(c * K, T(1), made(w.d_made, p + 1), d_projected.data());
      const T* x = stream(projection_stream(p));
      const T *sig = projected_s.data() + units[p] * c, *h = projected_h.data() + units[p] * c;
      whole_inner.resize(inner_size);
      whole_outer.resize(outer_size);
      gemm<T>(c, H, V, d_projected.data(), K, 1, whole->outer.data(), H, d_z.data(), H);
      gemm<T>(V, H, c, d_projected.data(), 1, K, h, H, whole_outer.data(), H);
      NESTLEARN_APART
      for (int i = 0; i < c * H; ++i) d_z[i] *= silu_slope(sig[i], h[i]);
      gemm<T>(H, K, c, d_z.data(), 1, H, x, K, whole_inner.data(), K);
      gemm<T>(c, K, H, d_z.data(), H, 1, whole->inner.data(), K, d_projected.data(), K, 1, true);
      T* to = d_stream(projection_stream(p));
      if (p == 3)
        axpy(c * K, T(1), d_projected.data(), to);
      else
        copy(d_projected.data(), to, std::ptrdiff_t(c) * K);
      through_whole(p, whole_inner, whole_outer, d);
    }
  }

  void readout_backward(const std::vector<T>& d_logit, const T* y, int which) {
    T *d_r = d_readout(which), *d_b = d_readout(which + 1);
    for (int i = 0; i < c; ++i) {
      axpy(K, d_logit[i], y + i * K, d_r);
      *d_b += d_logit[i];
      axpy(K, d_logit[i], readout(which), &d_projected[i * K]);
    }
  }

  void normalize_backward(const std::vector<T>& d_y, const std::vector<T>& y, const std::vector<T>& inverse, T* d_x) {
    for (int i = 0; i < c; ++i) {
      const T along = dot(K, &d_y[i * K], &y[i * K]);
      const T by = inverse[i];
      NESTLEARN_APART
      for (int k = 0; k < K; ++k) d_x[i * K + k] = (d_y[i * K + k] - y[i * K + k] * along) * by;
    }
  }

  const Walk& w;
  const int M, P, K, V, pad;
  int H;  // hidden width of the memory in hand
  int n = 0, row = 0, head = 0;
  std::vector<std::ptrdiff_t> units;  // hidden units before each memory
  std::vector<char> same;             // whether each memory's snapshot is the running memory itself
  bool even;                           // whether all memories are as wide
  std::vector<T> local[6], given[2];
  std::ptrdiff_t inner_size, outer_size;
  GateRule rule;
  int start = 0, c = 0, ld = 0;
  Decays<T> decays;
  Tiles<T> t;
  std::vector<Whole<T>> wholes;
  Whole<T>* whole;  // of the memory in hand
  std::vector<Strength<T>> inner_strengths;
  std::vector<T> keys, values, queries, keys_t, key_norm, value_norm, query_norm, key_square;
  std::vector<T> gate_logit, retain_logit, momentum_logit;
  std::vector<T> inner_products, inner_factor, inner_attention, outer_attention, weighted, inside, pairs;
  std::vector<T> projected, projected_s, projected_h, features, read_s, read_out, wide, wide2, wide_t;
  std::vector<T> inner_erased, outer_erased;
  std::vector<T> d_keys, d_values, d_queries, d_h, d_z, d_z_values, d_image, d_difference, d_error, d_factor;
  std::vector<T> d_inner, d_outer, d_inner_values, d_outer_values, d_inner_erased, d_outer_erased, d_inner_factor;
  std::vector<T> d_gate, d_retain, d_momentum, d_log_retain, d_log_momentum, d_inner_erase, d_inner_write;
  std::vector<T> d_outer_erase, d_inner_erase_one;
  std::vector<T> d_projected, scratch_h;
  std::vector<T> before_inner, before_outer, whole_inner, whole_outer, momentum_before_inner, momentum_before_outer;
};

template <typename T>
bool run(const Walk& w, bool backward) {
  std::atomic<int> next{0};
  const int tasks = w.rows * w.heads;
  const int threads = std::min(w.threads, tasks);
  return in_parallel(threads, threads, [&](int) {
    Task<T> task(w);
    for (int n; (n = next++) < tasks;) {
      task.choose(n);
      if (w.reads_only)
        backward ? task.read_all_backward() : task.read_all();
      else
        backward ? task.backward() : task.forward();
    }
  });
}

}  // namespace

extern "C" {

std::int32_t nestlearn_walk_size() { return sizeof(Walk); }

std::int32_t nestlearn_walk(const Walk* w, std::int32_t backward) {
  return !(w->wide ? run<double>(*w, backward) : run<float>(*w, backward));
}
}
