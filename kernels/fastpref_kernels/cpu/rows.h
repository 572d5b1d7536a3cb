// The transform of logits and the scored rows, which all passes share.
#pragma once

#include "contract.h"
#include "lanes.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace fastpref {

// The rows that one thread takes at a time hold at least this many logits.
constexpr int64_t kGrain = 1 << 15;

// The planes of `norm`, from which a backward computes each row's gradient: softmax_j = exp(z_j - anchor) * inverse.
enum NormPlane : int64_t { kNormAnchor, kNormInverse, kNormLogp, kNormEntropy };

// The entropy has a plane only where it is asked for.
inline int64_t norm_planes(bool entropy) {
  return kNormEntropy + entropy;
}

// z = rate * u(x), with u(x) = x, or cap * tanh(x * scale / cap).
struct Transform {
  double rate, inner, cap, slope;  // inner = scale / cap, slope = dz/dx at u = 0

  Transform(double scale, double temperature, std::optional<double> softcap)
      : rate(softcap ? 1 / temperature : scale / temperature),
        inner(softcap ? scale / *softcap : 1),
        cap(softcap.value_or(0)),
        slope(scale / temperature) {}
};

template <bool Cap, typename A>
inline A u_of(A x, const Transform& t) {
  return Cap ? A(t.cap) * std::tanh(x * A(t.inner)) : x;
}

template <bool Cap, typename A>
inline Vectorized<A> u_of(const Vectorized<A>& x, const Transform& t) {
  if constexpr (Cap) {
    return Vectorized<A>(A(t.cap)) * (x * Vectorized<A>(A(t.inner))).tanh();
  } else {
    return x;
  }
}

// Return dz/dx where u(x) = u.
template <bool Cap, typename V>
inline V derivative(V u, const Transform& t) {
  using A = std::conditional_t<std::is_same_v<V, Vectorized<double>> || std::is_same_v<V, double>, double, float>;
  if constexpr (Cap) {
    const V share = u * V(A(1 / t.cap));
    return V(A(t.slope)) * (V(A(1)) - share * share);
  } else {
    return V(A(t.slope));
  }
}

// Return dz/dx where rate * u(x) = z.
template <bool Cap, typename V>
inline V slope_at(const V& z, const Transform& t) {
  using A = std::conditional_t<std::is_same_v<V, Vectorized<double>> || std::is_same_v<V, double>, double, float>;
  return Cap ? derivative<Cap>(z * V(A(1 / t.rate)), t) : V(A(t.slope));
}

// The scored positions of labels (B, T), and the label that each is scored against.
struct ScoredRows {
  int64_t per_batch, n_sequences;               // per_batch: T'
  std::vector<int64_t> label, index, sequence;  // of scored row i: its label, its place in (B, T'), its sequence
  std::vector<int64_t> blank;                   // places in (B, T) of the rows that are not scored

  // Labels are checked against `vocabulary`, if there is one.
  ScoredRows(const at::Tensor& labels, const std::optional<at::Tensor>& cu_seqlens, int64_t ignore_index, bool shift,
             std::optional<int64_t> vocabulary)
      : per_batch(shift ? std::max<int64_t>(labels.size(1) - 1, 0) : labels.size(1)),
        n_sequences(cu_seqlens ? cu_seqlens->size(0) - 1 : labels.size(0)) {
    const int64_t B = labels.size(0), T = labels.size(1);
    const at::Tensor wide = labels.to(at::kLong);
    const auto label_of = wide.accessor<int64_t, 2>();
    std::vector<int64_t> bounds{0, T};
    if (cu_seqlens) {
      const at::Tensor cu = cu_seqlens->to(at::kLong).contiguous();
      bounds.assign(cu.const_data_ptr<int64_t>(), cu.const_data_ptr<int64_t>() + cu.numel());
      bool rises = bounds.front() == 0 && bounds.back() == T;
      for (size_t s = 1; s < bounds.size(); ++s) rises = rises && bounds[s - 1] <= bounds[s];
      TORCH_CHECK_VALUE(rises, "cu_seqlens must rise from 0 to the number of tokens, ", T, "; got ",
                        at::IntArrayRef(bounds));
    }
    label.reserve(B * per_batch), index.reserve(B * per_batch), sequence.reserve(B * per_batch);
    for (int64_t b = 0; b < B; ++b) {
      size_t s = 0;
      for (int64_t t = 0; t < T; ++t) {
        while (s + 1 < bounds.size() && bounds[s + 1] <= t) ++s;
        const bool last = shift && (t + 1 == T || (cu_seqlens && t + 1 == bounds[s + 1]));
        const int64_t y = last ? ignore_index : label_of[b][t + shift];
        if (last || y == ignore_index) {
          blank.push_back(b * T + t);
          continue;
        }
        TORCH_CHECK_INDEX(!vocabulary || (y >= 0 && y < *vocabulary), "label ", y, " at scored position [", b, ", ", t,
                          "] is outside [0, ", *vocabulary, ") and is not ignore_index");
        label.push_back(y);
        index.push_back(b * per_batch + t);
        sequence.push_back(cu_seqlens ? int64_t(s) : b);
      }
    }
  }

  int64_t size() const {
    return label.size();
  }
};

}  // namespace fastpref
