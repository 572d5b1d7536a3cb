// What both row passes, over logits and over a tile of them, have in common.
#pragma once

#include "lanes.h"

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

namespace fastpref {

// Sums above this are redone from the maximum: 1/(1+s) must stay a normal float32, and so must what it multiplies.
constexpr double kAnchorLimit = 0x1p60;
// Rows of one thread's share hold at least this many logits.
constexpr int64_t kGrain = 1 << 15;

enum Statistic { kLse = 1, kEntropy = 2, kMean = 4, kTop1 = 8, kLogSumSq = 16 };

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

// dz/dx where u(x) = u.
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

}  // namespace fastpref
