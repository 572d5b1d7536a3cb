// The gradient of logits, in one pass over the scored rows that reads each logit once and writes its gradient once.
#include "lanes.h"
#include "logits.h"
#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>

namespace fastpref {
namespace {

using at::Tensor;

// The terms of a row's gradient: dz_j = -p_j * (g + g_entropy * (log p_j + entropy)), but another term at the label.
template <typename A>
struct RowGradient {
  A anchor, inverse, logp, entropy, g, g_entropy;
};

template <bool Cap, bool Entropy, typename T>
void backward_row(const T* row, T* grad, int64_t V, int64_t width, int64_t grad_width, int64_t y, const Transform& t,
                  const RowGradient<acc_t<T>>& r) {
  using A = acc_t<T>;
  using Vec = Vectorized<A>;
  // Read before `grad` is written, which may be the same memory.
  const A u_y = u_of<Cap>(A(row[y * width]), t);
  const Vec rate{A(t.rate)}, shift{A(r.anchor * A(t.rate))};
  const Vec scale(Cap || Entropy ? -r.inverse : A(-r.g * r.inverse * t.rate)), g(r.g), g_entropy(r.g_entropy);
  const Vec surprise(std::log(r.inverse) + r.entropy), floor(A(-1e30));
  const auto gradient = [&](const Vec& x) {
    const Vec u = u_of<Cap>(x, t);
    const Vec d = at::vec::fmsub(u, rate, shift);
    if constexpr (Entropy) {
      const Vec clamped = at::vec::maximum(d, floor);
      const Vec weight = at::vec::fmadd(g_entropy, clamped + surprise, g);
      return exp<Range::kBounded>(clamped) * scale * weight * derivative<Cap>(u, t);
    } else if constexpr (Cap) {
      return exp<Range::kBounded>(d) * scale * g * derivative<Cap>(u, t);
    } else {
      return exp<Range::kBounded>(d) * scale;
    }
  };
  T in[kChunk], out[kChunk];
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = std::min(kChunk, V - begin);
    const T* x = columns(row, width, begin, n, in);
    T* to = grad_width == 1 ? grad + begin : out;
    for_each(
        x, n, [&](const Pair<A>& v, int64_t j) { store_pair(to + j, map(v, gradient)); },
        [&](const Pair<A>& v, int64_t j, int64_t left) {
          T padded[kStep<T>];
          store_pair(padded, map(v, gradient));
          std::copy(padded, padded + left, to + j);
        });
    if (grad_width != 1) {
      for (int64_t j = 0; j < n; ++j) grad[(begin + j) * grad_width] = out[j];
    }
  }
  A own = -r.g * std::expm1(r.logp);
  if (Entropy && r.logp != -std::numeric_limits<A>::infinity()) {
    own -= r.g_entropy * std::exp(r.logp) * (r.logp + r.entropy);
  }
  grad[y * grad_width] = T(own * derivative<Cap>(u_y, t));
}

// Write the gradient of logits to `out`, which may be the logits themselves.
void logprobs_backward(const Tensor& out, const std::optional<Tensor>& grad,
                       const std::optional<Tensor>& grad_entropy, const Tensor& logits, const Tensor& labels,
                       const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& weights,
                       const Tensor& norm, const Tensor& counts, int64_t ignore_index, bool shift,
                       double logit_scale, double temperature, std::optional<double> softcap,
                       std::string_view reduction) {
  const Rows rows(logits, labels, cu_seqlens, ignore_index, shift);
  const Transform transform(logit_scale, temperature, softcap);
  const bool reduced = reduction != "none";
  // These are (B, T') or (S,), and may be expanded, so they are made contiguous. The logits are not.
  const Tensor g = grad ? grad->contiguous() : Tensor(), gh = grad_entropy ? grad_entropy->contiguous() : Tensor();
  const Tensor weight = weights ? weights->to(norm.scalar_type()).contiguous() : Tensor(), saved = norm.contiguous(),
               count = counts.contiguous();
  const int64_t plane = norm.size(1) * norm.size(2);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "fastpref::logprobs_backward", [&] {
    using A = acc_t<scalar_t>;
    const scalar_t* data = logits.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const auto plain = gh.defined() ? &backward_row<false, true, scalar_t> : &backward_row<false, false, scalar_t>;
    const auto capped = gh.defined() ? &backward_row<true, true, scalar_t> : &backward_row<true, false, scalar_t>;
    const auto backward = softcap ? capped : plain;
    at::parallel_for(0, rows.size(), rows.grain(), [&](int64_t begin, int64_t end) {
      // The last row comes first, because what the forward read last may still be in the cache.
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t place = rows.index[i], s = rows.sequence[i];
        RowGradient<A> r{};
        const A* of_row = saved.const_data_ptr<A>() + place;
        r.anchor = of_row[kNormAnchor * plane], r.inverse = of_row[kNormInverse * plane];
        r.logp = of_row[kNormLogp * plane];
        if (g.defined()) {
          r.g = g.const_data_ptr<A>()[reduced ? s : place];
          if (weight.defined()) r.g *= weight.const_data_ptr<A>()[place];
          if (reduction == "mean") r.g /= A(std::max(count.const_data_ptr<int32_t>()[s], 1));
        }
        if (gh.defined()) {
          r.g_entropy = gh.const_data_ptr<A>()[place];
          r.entropy = of_row[kNormEntropy * plane];
        }
        backward(data + rows.offset(i, logits), to + rows.offset(i, out), rows.V, rows.width, out.stride(2),
                 rows.label[i], transform, r);
      }
    });
    const int64_t T = labels.size(1);
    at::parallel_for(0, rows.blank.size(), rows.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scalar_t* row = to + rows.blank[i] / T * out.stride(0) + rows.blank[i] % T * out.stride(1);
        if (out.stride(2) == 1) {
          std::fill(row, row + rows.V, scalar_t(0));
        } else {
          for (int64_t j = 0; j < rows.V; ++j) row[j * out.stride(2)] = scalar_t(0);
        }
      }
    });
  });
}

}  // namespace
}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("logprobs_backward", &fastpref::logprobs_backward);
}
