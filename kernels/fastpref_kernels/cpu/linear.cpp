// The row passes over a tile of logits that a matrix product has just written, while it is still in the cache.
//
// Exponentials are anchored at the label: e_j = exp(z_j - a) needs no running maximum, and bfloat16, which has float32's
// range, can hold them. A row whose sum would pass kLimit moves its anchor up to the tile's maximum; a row whose entropy
// is wanted does so at kEntropyLimit, to be near its mass.
#include "lanes.h"
#include "linear.h"
#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace fastpref {
namespace {

using at::Tensor;

// Call body(pair, j, left) for n values, `left` of them in the last pair, whose other lanes hold `fill`.
template <typename A, typename F>
inline void sweep(const A* z, int64_t n, A fill, const F& body) {
  int64_t j = 0;
  for (; j + kStep<A> <= n; j += kStep<A>) body(load_pair(z + j), j, kStep<A>);
  if (j < n) {
    A padded[kStep<A>];
    std::fill(std::copy(z + j, z + n, padded), padded + kStep<A>, fill);
    body(load_pair(padded), j, n - j);
  }
}

template <typename S, typename A>
inline void store_left(S* to, const Pair<A>& v, int64_t left) {
  if (left == kStep<A>) return store_pair(to, v);
  S padded[kStep<A>];
  store_pair(padded, v);
  std::copy(padded, padded + left, to);
}

// Write z = rate * u(x + bias) over x.
template <bool Cap, typename A>
void transform_row(A* x, int64_t n, const A* bias, const Transform& t) {
  using V = Vectorized<A>;
  if (!Cap && !bias && t.rate == 1) return;
  const V rate{A(t.rate)};
  A shifted[kStep<A>] = {};
  sweep(x, n, A(0), [&](Pair<A> v, int64_t j, int64_t left) {
    if (bias) {
      std::copy(bias + j, bias + j + left, shifted);
      const Pair<A> b = load_pair(shifted);
      v = {v.first + b.first, v.second + b.second};
    }
    store_left(x + j, map(v, [&](const V& w) { return u_of<Cap>(w, t) * rate; }), left);
  });
}

struct Sums {
  double rest = 0, weighted = 0, squares = 0;  // of e, e * d and e * e
};

// Return the sums over a tile, and write exp(d) * dz/dx to `store`. If the label is in the tile, its logit must be
// -inf.
template <bool Cap, bool Stats, typename A, typename S>
Sums exponentials(const A* z, int64_t n, A anchor, const Transform& t, S* store) {
  using V = Vectorized<A>;
  const V a(anchor), floor(A(-1e30));
  V e_sum[2] = {V(A(0)), V(A(0))}, ed_sum(A(0)), ee_sum(A(0));
  sweep(z, n, -std::numeric_limits<A>::infinity(), [&](const Pair<A>& v, int64_t j, int64_t left) {
    const Pair<A> d = map(v, [&](const V& w) { return w - a; });
    const Pair<A> e = map(d, [](const V& w) { return exp(w); });
    e_sum[0] = e_sum[0] + e.first;
    e_sum[1] = e_sum[1] + e.second;
    if constexpr (Stats) {
      // The floor keeps 0 * -inf out of the sum; its exponential is 0 all the same.
      ed_sum = at::vec::fmadd(e.first, at::vec::maximum(d.first, floor), ed_sum);
      ed_sum = at::vec::fmadd(e.second, at::vec::maximum(d.second, floor), ed_sum);
      ee_sum = at::vec::fmadd(e.first, e.first, ee_sum);
      ee_sum = at::vec::fmadd(e.second, e.second, ee_sum);
    }
    if (store) {
      const Pair<A> kept{e.first * slope_at<Cap>(v.first, t), e.second * slope_at<Cap>(v.second, t)};
      store_left(store + j, kept, left);
    }
  });
  return {double(sum(e_sum[0] + e_sum[1])), double(sum(ed_sum)), double(sum(ee_sum))};
}

template <typename A>
A maximum_of(const A* z, int64_t n) {
  Vectorized<A> best(-std::numeric_limits<A>::infinity());
  sweep(z, n, -std::numeric_limits<A>::infinity(), [&](const Pair<A>& v, int64_t, int64_t) {
    best = at::vec::maximum(best, at::vec::maximum(v.first, v.second));
  });
  return max(best);
}

template <bool Cap, bool Stats, typename A, typename S>
void fold_row(A* z, int64_t C, int64_t own, const A* bias, const Transform& t, int64_t stats, double* state,
              int64_t R, double* anchor_out, double* mass_out, S* store) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  const auto sum_of = [&](RowSum plane) -> double& { return state[plane * R]; };
  double &anchor = sum_of(kAnchor), &rest = sum_of(kRest), &weighted = sum_of(kWeighted), &squares = sum_of(kSquares);
  transform_row<Cap>(z, C, bias, t);
  if (stats & kMeanLogits) {
    Vectorized<A> sums(A(0));
    sweep(z, C, A(0), [&](const Pair<A>& v, int64_t, int64_t) { sums = sums + (v.first + v.second); });
    sum_of(kTotal) += double(sum(sums));
  }
  double &before = sum_of(kBefore), &after = sum_of(kAfter);
  const double best = greater(before, after);  // before this tile
  if (stats & (kIsTop1 | kTop2Margin)) {
    const int64_t left = std::clamp<int64_t>(own, 0, C), right = std::clamp<int64_t>(own + 1, 0, C);
    before = greater(before, maximum_of(z, left));
    after = greater(after, maximum_of(z + right, C - right));
  }
  if (own >= 0 && own < C) {
    sum_of(kLabel) = z[own];
    z[own] = -inf;
  }
  if (stats & kTop2Margin) {
    TopTwo<A> top;
    sweep(z, C, -inf, [&](const Pair<A>& v, int64_t, int64_t) { top.add(v.first), top.add(v.second); });
    const auto [tile_best, tile_second] = top.reduced();
    // The second largest is that of the tile, that of the tiles before it, or the smaller of the two maxima.
    double& second = sum_of(kSecond);
    second = std::max({second, double(tile_second), std::min(best, double(tile_best))});
  }
  Sums sums = exponentials<Cap, Stats>(z, C, A(anchor), t, store);
  if (!(rest + sums.rest < (stats & kEntropy ? kEntropyLimit : kLimit))) {
    const A top = maximum_of(z, C);
    const double old = rest > 0 || std::isfinite(anchor) ? anchor : -double(inf);
    const double moved = at::_isnan(top) ? double(top) : std::max<double>(old, top);
    // If all logits so far are -inf, use any number: the sum is then 0 and not NaN, and the row stays without an
    // anchor.
    const double base = moved == -double(inf) ? 0 : moved;
    if (base != anchor) {
      const double gap = anchor - base, f = std::exp(gap);
      // exp(d) d becomes f exp(d) (d + gap). If f is 0, so is the sum, whatever the gap.
      weighted = f == 0 ? 0 : f * (weighted + gap * rest);
      rest = rest == 0 ? 0 : f * rest;
      squares = squares == 0 ? 0 : f * f * squares;
      anchor = moved;
      sums = exponentials<Cap, Stats>(z, C, A(base), t, store);
    }
  }
  rest += sums.rest;
  weighted += sums.weighted;
  squares += sums.squares;
  *anchor_out = anchor;
  *mass_out = sums.rest;
}

Tensor widened(const std::optional<Tensor>& bias, const Tensor& z) {
  return bias ? bias->to(z.scalar_type()).contiguous() : Tensor();
}

}  // namespace

void fold(const Tensor& z, const std::optional<Tensor>& bias, const Tensor& targets, int64_t column,
          double logit_scale, double temperature, std::optional<double> softcap, int64_t stats, const Tensor& state,
          const Tensor& anchors, const Tensor& masses, const std::optional<Tensor>& store) {
  const Transform t(logit_scale, temperature, softcap);
  const int64_t R = z.size(0), C = z.size(1);
  const Tensor b = widened(bias, z);
  const int64_t* y = targets.const_data_ptr<int64_t>();
  double *sums = state.mutable_data_ptr<double>(), *anchor = anchors.mutable_data_ptr<double>(),
         *mass = masses.mutable_data_ptr<double>();
  const auto run = [&]<typename A, typename S>(S* kept) {
    constexpr int64_t summed = kEntropy | kLogSumSqProbs;
    const auto plain = stats & summed ? &fold_row<false, true, A, S> : &fold_row<false, false, A, S>;
    const auto capped = stats & summed ? &fold_row<true, true, A, S> : &fold_row<true, false, A, S>;
    const auto row = softcap ? capped : plain;
    A* tile = z.mutable_data_ptr<A>();
    const A* shift = b.defined() ? b.const_data_ptr<A>() : nullptr;
    at::parallel_for(0, R, std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        row(tile + i * z.stride(0), C, y[i] - column, shift, t, stats, sums + i, R, anchor + i, mass + i,
            kept ? kept + i * store->stride(0) : nullptr);
      }
    });
  };
  if (z.scalar_type() == at::kDouble) {
    run.operator()<double>(store ? store->mutable_data_ptr<double>() : nullptr);
  } else if (store && store->scalar_type() == at::kBFloat16) {
    run.operator()<float>(store->mutable_data_ptr<c10::BFloat16>());
  } else {
    run.operator()<float>(store ? store->mutable_data_ptr<float>() : nullptr);
  }
}

namespace {

// Write a row's gradient: dz_j = -p_j * (g + h * (log p_j + entropy)), and a formula of its own at the label.
template <bool Cap, bool Entropy, typename A, typename S>
void gradient_row(A* z, int64_t C, int64_t own, const A* bias, const Transform& t, const A* norm, int64_t R, A g, A h,
                  S* out) {
  using V = Vectorized<A>;
  const A anchor = norm[kNormAnchor * R], inverse = norm[kNormInverse * R], logp = norm[kNormLogp * R],
          entropy = Entropy ? norm[kNormEntropy * R] : A(0);
  transform_row<Cap>(z, C, bias, t);
  const A z_y = own >= 0 && own < C ? z[own] : A(0);
  const V a(anchor), scale(-inverse), g_v(g), h_v(h), surprise(std::log(inverse) + entropy), floor(A(-1e30));
  const auto gradient = [&](const V& v) {
    const V d = v - a;
    if constexpr (Entropy) {
      const V clamped = at::vec::maximum(d, floor);
      return exp(clamped) * scale * at::vec::fmadd(h_v, clamped + surprise, g_v) * slope_at<Cap>(v, t);
    } else {
      return exp(d) * scale * g_v * slope_at<Cap>(v, t);
    }
  };
  sweep(z, C, A(0), [&](const Pair<A>& v, int64_t j, int64_t left) { store_left(out + j, map(v, gradient), left); });
  if (own >= 0 && own < C) {
    A at_label = -g * std::expm1(logp);
    if (Entropy && logp != -std::numeric_limits<A>::infinity()) at_label -= h * std::exp(logp) * (logp + entropy);
    out[own] = S(at_label * slope_at<Cap>(z_y, t));
  }
}

}  // namespace

void fold_backward(const Tensor& z, const std::optional<Tensor>& bias, const Tensor& targets, int64_t column,
                   double logit_scale, double temperature, std::optional<double> softcap, const Tensor& norm,
                   const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_entropy, const Tensor& out) {
  const Transform t(logit_scale, temperature, softcap);
  const int64_t R = z.size(0), C = z.size(1);
  const Tensor b = widened(bias, z);
  const int64_t* y = targets.const_data_ptr<int64_t>();
  const auto run = [&]<typename A, typename S>(S* to) {
    const auto plain = grad_entropy ? &gradient_row<false, true, A, S> : &gradient_row<false, false, A, S>;
    const auto capped = grad_entropy ? &gradient_row<true, true, A, S> : &gradient_row<true, false, A, S>;
    const auto row = softcap ? capped : plain;
    A* tile = z.mutable_data_ptr<A>();
    const A* saved = norm.const_data_ptr<A>();
    const A* g = grad ? grad->const_data_ptr<A>() : nullptr;
    const A* h = grad_entropy ? grad_entropy->const_data_ptr<A>() : nullptr;
    const A* shift = b.defined() ? b.const_data_ptr<A>() : nullptr;
    at::parallel_for(0, R, std::max<int64_t>(1, kGrain / std::max<int64_t>(C, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        row(tile + i * z.stride(0), C, y[i] - column, shift, t, saved + i, R, g ? g[i] : A(0), h ? h[i] : A(0),
            to + i * out.stride(0));
      }
    });
  };
  if (z.scalar_type() == at::kDouble) {
    run.operator()<double>(out.mutable_data_ptr<double>());
  } else if (out.scalar_type() == at::kBFloat16) {
    run.operator()<float>(out.mutable_data_ptr<c10::BFloat16>());
  } else {
    run.operator()<float>(out.mutable_data_ptr<float>());
  }
}

}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("fold", &fastpref::fold);
  m.def("fold_backward", &fastpref::fold_backward);
}
