// The gates of a chunk for one row and head: write strengths, retention, momentum, and the decay factors that follow
// from them, with their derivatives. The formulas are those of nestlearn.memory.mlp and chunk_decay.
#pragma once

#include <vector>

#include "linear.h"

struct GateRule {
  bool negative_eigenvalues, erases, momentum;
  double largest;
};

template <typename T>
struct Strength {
  T erase, write;
};

template <typename T>
struct StrengthGradient {
  T gate = 0, retain = 0, momentum = 0, square = 0;
};

// erase and write for a key of the given squared norm (Eq. 56, exact for any norm).
template <typename T>
Strength<T> strength(const GateRule& rule, T gate, T retain, T momentum, T square, T active) {
  Strength<T> out;
  if (rule.negative_eigenvalues) {
    const T reach = (1 + retain) / std::max(square, T(1));
    out.erase = gate * reach;
    out.write = std::min(out.erase, reach - out.erase);
  } else {
    out.erase = out.write = gate / (1 - gate + gate * square);
  }
  if (rule.momentum) out.write *= 1 - momentum;
  out.erase *= rule.erases ? active : T(0);
  out.write *= active;
  return out;
}

template <typename T>
StrengthGradient<T> strength_backward(const GateRule& rule, T gate, T retain, T momentum, T square, T active, T d_erase,
                                      T d_write) {
  StrengthGradient<T> d;
  d_erase *= rule.erases ? active : T(0);
  d_write *= active;
  const T kept = rule.momentum ? 1 - momentum : T(1);
  if (rule.negative_eigenvalues) {
    const T clamped = std::max(square, T(1)), reach = (1 + retain) / clamped, erase = gate * reach,
        rest = reach - erase;
    const T write = std::min(erase, rest);
    if (rule.momentum) d.momentum = -write * d_write;
    const T through = d_write * kept;
    T d_e = d_erase, d_reach = 0;
    // At a tie both sides take half, as torch.minimum does.
    const T share = erase < rest ? T(1) : erase > rest ? T(0) : T(0.5);
    d_e += share * through - (1 - share) * through;
    d_reach += (1 - share) * through;
    d.gate = reach * d_e;
    d_reach += gate * d_e;
    d.retain = d_reach / clamped;
    if (square >= 1) d.square = -d_reach * reach / clamped;
  } else {
    const T below = 1 - gate + gate * square, write = gate / below;
    if (rule.momentum) d.momentum = -write * d_write;
    const T total = d_erase + kept * d_write;
    d.gate = total / (below * below);
    d.square = -total * write * write;
  }
  return d;
}

// Factors of a chunk of c tokens; matrices (c x ld), lower triangular, with a row of zeros before row 0, so that row
// t - 1 of any t is there.
template <typename T>
struct Decays {
  int c = 0, ld = 0;
  std::vector<T> gate, retain, momentum, log_retain, log_momentum, active;
  std::vector<T> total, kept, carry, momentum_total, momentum_kept;
  std::vector<T> retain_between, write_between, momentum_between;
  // Gradients: of logarithms for `kept` and `retain_between` (times the factor itself), plain for the others.
  std::vector<T> d_log_kept, d_log_between, d_write, d_carry, d_momentum_last;
  T d_momentum_carried = 0;

  explicit Decays(int chunk, int padded) {
    for (auto* v : {&gate, &retain, &momentum, &log_retain, &log_momentum, &active, &total, &kept, &carry,
                    &momentum_total,
                    &momentum_kept, &d_log_kept, &d_carry, &d_momentum_last})
      v->assign(chunk + 1, 0);
    for (auto* v : {&retain_between, &write_between, &momentum_between, &d_log_between, &d_write})
      v->assign(std::size_t(chunk + 1) * padded, 0);
  }

  T* row(std::vector<T>& m, int t) { return m.data() + std::ptrdiff_t(t + 1) * ld; }
  T kept_before(int t) const { return t ? kept[t - 1] : T(1); }
  T carry_before(int t) const { return t ? carry[t - 1] : T(0); }
  // Weights of what was written: with momentum R^w, without it R^a itself.
  T* write_row(bool has_momentum, int t) { return row(has_momentum ? write_between : retain_between, t); }

  // gate, retain, momentum, their logarithms and active are set.
  void compute(bool has_momentum) {
    T sum = 0, momentum_sum = 0;
    for (int t = 0; t < c; ++t) {
      total[t] = sum += active[t] * log_retain[t];
      kept[t] = exponential(sum);
      if (has_momentum) {
        momentum_total[t] = momentum_sum += active[t] * log_momentum[t];
        momentum_kept[t] = exponential(momentum_sum);
      }
    }
    between(total, retain_between);
    if (!has_momentum) return;
    between(momentum_total, momentum_between);
    // R^w = (R^a, where tokens are) R^m, c = (R^a, where tokens are) g^m
    std::vector<T>& entering = d_write;  // scratch
    for (int t = 0; t < c; ++t)
      for (int s = 0; s < ld; ++s) row(entering, t)[s] = s <= t ? row(retain_between, t)[s] * active[s] : T(0);
    std::fill(write_between.begin(), write_between.begin() + ld, T(0));
    gemm<T>(c, ld, c, row(entering, 0), ld, 1, row(momentum_between, 0), ld, row(write_between, 0), ld, 1, false,
            Shape::LeftLower);
    for (int t = 0; t < c; ++t) {
      for (int s = t + 1; s < ld; ++s) row(write_between, t)[s] = 0;
      carry[t] = dot(t + 1, row(entering, t), momentum_kept.data());
    }
  }

  void between(const std::vector<T>& logs, std::vector<T>& out) {
    std::fill(out.begin(), out.begin() + ld, T(0));
    for (int t = 0; t < c; ++t) {
      T* r = row(out, t);
      for (int s = 0; s <= t; ++s) r[s] = exponential(logs[t] - logs[s]);
      for (int s = t + 1; s < ld; ++s) r[s] = 0;
    }
  }

  void clear_gradients() {
    std::fill(d_log_kept.begin(), d_log_kept.end(), T(0));
    std::fill(d_carry.begin(), d_carry.end(), T(0));
    std::fill(d_momentum_last.begin(), d_momentum_last.end(), T(0));
    std::fill(d_log_between.begin(), d_log_between.end(), T(0));
    std::fill(d_write.begin(), d_write.end(), T(0));
    d_momentum_carried = 0;
  }

  // Adds to the gradients of log retain and log momentum, given those of all factors.
  void backward(bool has_momentum, T* d_log_retain, T* d_log_momentum) {
    std::vector<T> d_total(c, 0), d_momentum_total(c, 0);
    if (has_momentum) {
      std::vector<T> d_momentum_between(c, 0), d_kept(c, 0);
      for (int j = 0; j < c; ++j) {
        // through R^w = entering R^m and c = entering g^m
        std::fill(d_momentum_between.begin(), d_momentum_between.end(), T(0));
        for (int t = j; t < c; ++t) {
          const T entering = row(retain_between, t)[j] * active[j];
          const T d_entering =
              dot(j + 1, row(d_write, t), row(momentum_between, j)) + d_carry[t] * momentum_kept[j];
          row(d_log_between, t)[j] += entering * d_entering;
          axpy(j + 1, entering, row(d_write, t), d_momentum_between.data());
          d_kept[j] += entering * d_carry[t];
        }
        if (j == c - 1) {
          axpy(c, T(1), d_momentum_last.data(), d_momentum_between.data());
          d_kept[j] += d_momentum_carried;
        }
        for (int s = 0; s <= j; ++s) {
          const T x = d_momentum_between[s] * row(momentum_between, j)[s];
          d_momentum_total[j] += x;
          d_momentum_total[s] -= x;
        }
        d_momentum_total[j] += d_kept[j] * momentum_kept[j];
      }
    }
    for (int t = 0; t < c; ++t) {
      d_total[t] += d_log_kept[t];
      for (int s = 0; s <= t; ++s) {
        const T x = row(d_log_between, t)[s];
        d_total[t] += x;
        d_total[s] -= x;
      }
    }
    T sum = 0, momentum_sum = 0;
    for (int t = c - 1; t >= 0; --t) {
      d_log_retain[t] += active[t] * (sum += d_total[t]);
      if (has_momentum) d_log_momentum[t] += active[t] * (momentum_sum += d_momentum_total[t]);
    }
  }
};
