// Vector loads, stores and exp over at::vec, for the four dtypes of logits.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

namespace fastpref {

using at::vec::Vectorized;

// float64 is computed in float64, every other dtype in float32.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Two vectors at a time: a vector of bf16 or fp16 widens to two of float, and two chains hide the latency of exp.
template <typename A>
struct Pair {
  Vectorized<A> first, second;
};

template <typename T>
constexpr int64_t kStep = 2 * Vectorized<acc_t<T>>::size();

template <typename T>
inline Pair<acc_t<T>> load_pair(const T* p) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return {Vectorized<T>::loadu(p), Vectorized<T>::loadu(p + Vectorized<T>::size())};
  } else {
    auto [first, second] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(p));
    return {first, second};
  }
}

template <typename T>
inline void store_pair(T* p, const Pair<acc_t<T>>& v) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    v.first.store(p);
    v.second.store(p + Vectorized<T>::size());
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    // One instruction, where at::vec rounds with a dozen.
    const __m512bh rounded = _mm512_cvtne2ps_pbh(v.second, v.first);
    _mm512_storeu_si512(p, reinterpret_cast<const __m512i&>(rounded));
#endif
  } else {
    at::vec::convert_from_float<T>(v.first, v.second).store(p);
  }
}

template <typename A, typename F>
inline Pair<A> map(const Pair<A>& v, const F& f) {
  return {f(v.first), f(v.second)};
}

// Whether an argument of exp may be so large that the result is inf.
enum class Range { kAny, kBounded };

template <Range range = Range::kAny>
inline Vectorized<double> exp(const Vectorized<double>& x) {
  return x.exp();
}

// e^x to 1 ulp. at::vec's own choice is between Sleef's, whose call costs more than everything else of a pass over the
// logits, and exp_u20, which is wrong by 20 ulp. Below -87.7 it is exactly 0, above 88.4 inf, and a NaN stays one.
template <Range range = Range::kAny>
inline Vectorized<float> exp(const Vectorized<float>& x) {
  using V = Vectorized<float>;
  // Adding 1.5*2^23 + 127 rounds to an integer and leaves it, biased, in the low bits: shifted into the exponent they
  // are 2^n. That is +0 at n = -127 and inf at n = 128, and the two clamps let x go as far as these.
  const V magic(12583039.0f);
  const V clamped =
      range == Range::kAny ? at::vec::clamp(x, V(-88.0f), V(89.0f)) : at::vec::clamp_min(x, V(-88.0f));
  const V biased = at::vec::fmadd(clamped, V(1.44269504f), magic);
  const V n = biased - magic;
  const V high = at::vec::fmadd(n, V(-0.693145752f), clamped);
  const V r = at::vec::fmadd(n, V(-1.42860677e-6f), high);
  V q(0x1.6a2434p-10f);  // minimax of (e^r - 1 - r) / r^2 over |r| <= ln(2)/2, relative error of e^r 3e-9
  q = at::vec::fmadd(q, r, V(0x1.1239e2p-7f));
  q = at::vec::fmadd(q, r, V(0x1.5558f2p-5f));
  q = at::vec::fmadd(q, r, V(0x1.555492p-3f));
  q = at::vec::fmadd(q, r, V(0x1.fffffcp-2f));
  const V e = at::vec::fmadd(at::vec::fmadd(q, r, V(1.0f)), r, V(1.0f));
  const auto bits = at::vec::cast<int32_t>(biased) << Vectorized<int32_t>(23);
  return e * at::vec::cast<float>(bits);
}

template <typename A>
inline A sum(const Vectorized<A>& v) {
  return at::vec::vec_reduce_all<A>([](auto& a, auto& b) { return a + b; }, v);
}

template <typename A>
inline A max(const Vectorized<A>& v) {
  return at::vec::vec_reduce_all<A>([](auto& a, auto& b) { return at::vec::maximum(a, b); }, v);
}

// Return the larger of two numbers, or the NaN among them.
inline double greater(double a, double b) {
  return std::isnan(a) || std::isnan(b) ? a + b : std::max(a, b);
}

// The two largest values of every lane; equal on a tie.
template <typename A>
struct TopTwo {
  Vectorized<A> first{-std::numeric_limits<A>::infinity()}, second = first;

  void add(const Vectorized<A>& v) {
    second = at::vec::maximum(second, at::vec::minimum(first, v));
    first = at::vec::maximum(first, v);
  }

  // Return the two largest values of all lanes. They are unspecified where a lane has met a NaN.
  std::pair<A, A> reduced() const {
    constexpr int lanes = Vectorized<A>::size();
    A values[2 * lanes];
    first.store(values), second.store(values + lanes);
    A best = -std::numeric_limits<A>::infinity(), next = best;
    for (const A x : values) {
      next = std::max(next, std::min(best, x));
      best = std::max(best, x);
    }
    return {best, next};
  }
};

}  // namespace fastpref
