// The gradients of hidden states, the LM head and its bias, for a whole vocabulary and without a filter.
#include "contract.h"
#include "head.h"
#include "linear.h"
#include "memory.h"
#include "product.h"
#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mv.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace fastpref {
namespace {

using at::Tensor;
using std::optional;

// Return the values (planes, n) of n rows, from contiguous planes (..., B, T'), if there are any.
optional<Tensor> picked(const optional<Tensor>& planes, const ScoredRows& rows, int64_t first, int64_t n) {
  if (!planes) return std::nullopt;
  const int64_t count = planes->dim() == 3 ? planes->size(0) : 1, plane = planes->numel() / count;
  const Tensor out = at::empty({count, n}, planes->scalar_type());
  AT_DISPATCH_FLOATING_TYPES(planes->scalar_type(), "fastpref::picked", [&] {
    const scalar_t* from = planes->const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i < n; ++i) to[k * n + i] = from[k * plane + rows.index[first + i]];
    }
  });
  return out;
}

// Return rows x (n, H), each times a factor, rounded to x's dtype.
template <typename A>
Tensor scaled(const Tensor& x, const A* factor) {
  const Tensor out = scratch(Scratch::kScaledStates, x.sizes(), x.scalar_type());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fastpref::scaled", [&] {
    const int64_t H = x.size(1);
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    for_rows(0, x.size(0), H, [&](int64_t i) {
      for (int64_t j = i * H; j < (i + 1) * H; ++j) to[j] = scalar_t(A(from[j]) * factor[i]);
    });
  });
  return out;
}

// Write rows (n, H) to their places in `out` (B, T, H), or add them to it. Multiply each by its factor, if there are
// any.
template <typename A>
void put_rows(const Tensor& out, const Tensor& values, const A* factor, const ScoredRows& rows, int64_t first,
              bool add) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "fastpref::put_rows", [&] {
    const int64_t n = values.size(0), H = values.size(1);
    scalar_t* data = out.mutable_data_ptr<scalar_t>();
    for_rows(first, n, H, [&](int64_t i) {
      const A* from = values.const_data_ptr<A>() + (i - first) * H;
      const A scale = factor ? factor[i - first] : A(1);
      scalar_t* to = line(data, out, rows, i);
      for (int64_t j = 0; j < H; ++j) to[j] = scalar_t((add ? A(to[j]) : A(0)) + from[j] * scale);
    });
  });
}

void check_gradients(const optional<Tensor>& grad, const optional<Tensor>& grad_entropy, const Tensor& hidden,
                     const Tensor& weight, const Tensor& labels, const ScoredRows& rows, const Tensor& norm,
                     const optional<Tensor>& store, const optional<Tensor>& d_hidden,
                     const optional<Tensor>& d_weight, const optional<Tensor>& d_bias) {
  const std::array<int64_t, 2> shape{labels.size(0), rows.per_batch};
  const auto is_plane = [&](const optional<Tensor>& x) { return !x || x->sizes() == at::IntArrayRef(shape); };
  TORCH_CHECK((grad || grad_entropy) && is_plane(grad) && is_plane(grad_entropy),
              "a gradient of the log-probs or of the entropy is needed, (B, T') = ", at::IntArrayRef(shape));
  const int64_t planes = norm_planes(grad_entropy.has_value());
  TORCH_CHECK(norm.dim() == 3 && norm.size(0) >= planes && norm.sizes().slice(1) == at::IntArrayRef(shape),
              "norm must be ", planes, " planes or more of (B, T') = ", at::IntArrayRef(shape), "; got ", norm.sizes());
  check_store(store, rows, weight);
  const bool has_features = d_hidden && (d_hidden->stride(2) == 1 || d_hidden->size(2) <= 1);
  TORCH_CHECK(!d_hidden || (d_hidden->sizes() == hidden.sizes() && has_features),
              "hidden's gradient must be (B, T, H) = ", hidden.sizes(), ", with contiguous features; got ",
              d_hidden->sizes(), " with strides ", d_hidden->strides());
  TORCH_CHECK(!d_weight || d_weight->sizes() == weight.sizes(), "weight's gradient must be ", weight.sizes(), "; got ",
              d_weight->sizes());
  TORCH_CHECK(!d_bias || (d_bias->dim() == 1 && d_bias->size(0) == weight.size(0)), "bias's gradient must be (V,) = (",
              weight.size(0), ",); got ", d_bias->sizes());
}

// Write the sums of the gradients over rows, or add them unless the gradients are `fresh`. d_weight may be narrower
// than the sums only if all rows fit in one chunk.
template <typename A>
void accumulate(const optional<Tensor>& grad, const optional<Tensor>& grad_entropy, const Head& head,
                ScoredRows& rows, const Tensor& norm, const optional<Tensor>& store, const optional<Tensor>& d_hidden,
                const optional<Tensor>& d_weight, const optional<Tensor>& d_bias, bool fresh,
                optional<int64_t> chunk_rows) {
  const int64_t R = rows.size();
  // d_weight is not zeroed: the first product of each block of columns overwrites it.
  if (fresh && d_hidden) d_hidden->zero_();
  if (fresh && d_bias) d_bias->zero_();
  if (fresh && d_weight && R == 0) d_weight->zero_();
  // The kept exponentials serve the log-probs alone: an entropy's gradient needs the log-probs of every entry too.
  const bool keeps = store && !grad_entropy;
  // fp16 has no product of its own here, so its tiles need not be rounded to it.
  const at::ScalarType narrow =
      head.hidden.scalar_type() == at::kHalf ? head.dtype : head.hidden.scalar_type();
  const auto planes = [&](const optional<Tensor>& x) {
    return x ? optional<Tensor>(x->to(head.dtype).contiguous()) : std::nullopt;
  };
  const optional<Tensor> of_rows = planes(norm), of_logps = planes(grad), of_entropy = planes(grad_entropy);
  for (int64_t first = 0; first < R;) {
    const int64_t n = std::min(chunk_rows.value_or(kRows), R - first);
    const Tensor x = head.states(rows, first, n), y = at::from_blob(rows.label.data() + first, {n}, at::kLong);
    const Tensor of_row = *picked(of_rows, rows, first, n);
    const optional<Tensor> g = picked(of_logps, rows, first, n), h = picked(of_entropy, rows, first, n);
    std::vector<A> factors;
    Tensor right = x;
    if (keeps) {
      const A* inverse = of_row.const_data_ptr<A>() + kNormInverse * n;
      for (int64_t i = 0; i < n; ++i) factors.push_back(-g->const_data_ptr<A>()[i] * inverse[i]);
      right = scaled(x, factors.data());
    }
    Tensor rows_gradient;
    if (d_hidden) rows_gradient = scratch(Scratch::kHidden, {n, head.H}, head.dtype);
    if (d_hidden && head.V == 0) rows_gradient.zero_();
    for (int64_t begin = 0; begin < head.V; begin += kColumns) {
      const int64_t columns = std::min(kColumns, head.V - begin);
      Tensor tile;
      if (keeps) {
        tile = narrowed(narrowed(*store, 0, first, n), 1, begin, columns);
      } else {
        const Tensor z = head.products(x, begin, columns);
        tile = narrow == head.dtype ? z : head.tile(Scratch::kGradient, n, columns, narrow);
        fold_backward(z, head.bias_of(begin, columns), y, begin, head.logit_scale, head.temperature, head.softcap,
                      of_row, g, h, tile);
      }
      if (d_hidden) product(rows_gradient, tile, head.weight_of(begin, columns), begin > 0, head.onednn);
      if (d_weight) {
        Tensor total = narrowed(*d_weight, 0, begin, columns);
        const bool rounds = total.scalar_type() != head.dtype;
        const Tensor sums = rounds ? scratch(Scratch::kWeight, {columns, head.H}, head.dtype) : total;
        product(sums, tile.t(), right, !rounds && !(fresh && first == 0), head.onednn);
        if (rounds) total.copy_(sums);
      }
      if (d_bias) {
        const Tensor wide = tile.to(head.dtype);
        narrowed(*d_bias, 0, begin, columns)
            .add_(keeps ? at::mv(wide.t(), at::from_blob(factors.data(), {n}, head.dtype)) : wide.sum(0));
      }
    }
    if (d_hidden) put_rows<A>(*d_hidden, rows_gradient, keeps ? factors.data() : nullptr, rows, first, !fresh);
    first += n;
  }
}

// Run `fastpref::linear_logprobs_backward_`, without a filter.
void linear_logprobs_backward_(
    const optional<Tensor>& grad, const optional<Tensor>& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const optional<Tensor>& bias, const Tensor& labels, const optional<Tensor>& cu_seqlens, const Tensor& norm,
    const optional<Tensor>& store, const optional<Tensor>& d_hidden, const optional<Tensor>& d_weight,
    const optional<Tensor>& d_bias, bool fresh, int64_t ignore_index, bool shift, double logit_scale,
    double temperature, optional<double> softcap, optional<int64_t> chunk_rows, bool onednn) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_operands(hidden, weight, bias, labels, chunk_rows);
  const Head head(hidden, weight, bias, logit_scale, temperature, softcap, onednn);
  ScoredRows rows(labels, cu_seqlens, ignore_index, shift, std::nullopt);
  check_gradients(grad, grad_entropy, hidden, weight, labels, rows, norm, store, d_hidden, d_weight, d_bias);
  const auto run = head.dtype == at::kDouble ? &accumulate<double> : &accumulate<float>;
  run(grad, grad_entropy, head, rows, norm, store, d_hidden, d_weight, d_bias, fresh, chunk_rows);
}

// Run `fastpref::linear_logprobs_backward`, without a filter.
std::tuple<Tensor, Tensor, Tensor> linear_logprobs_backward(
    const optional<Tensor>& grad, const optional<Tensor>& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const optional<Tensor>& bias, const Tensor& labels, const optional<Tensor>& cu_seqlens, const Tensor& norm,
    const optional<Tensor>& store, std::array<bool, 3> needed, at::ScalarType hidden_dtype,
    at::ScalarType weight_dtype, at::ScalarType bias_dtype, int64_t ignore_index, bool shift, double logit_scale,
    double temperature, optional<double> softcap, optional<int64_t> chunk_rows, bool onednn) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_operands(hidden, weight, bias, labels, chunk_rows);
  const Head head(hidden, weight, bias, logit_scale, temperature, softcap, onednn);
  ScoredRows rows(labels, cu_seqlens, ignore_index, shift, std::nullopt);
  check_gradients(grad, grad_entropy, hidden, weight, labels, rows, norm, store, std::nullopt, std::nullopt,
                  std::nullopt);
  // Each row of hidden's gradient is written once. With one chunk, the weight's gradient needs no sums between chunks.
  const bool once = rows.size() <= chunk_rows.value_or(kRows);
  const auto fresh = [&](bool want, at::IntArrayRef size, at::ScalarType kind) {
    return want ? optional<Tensor>(empty(size, kind)) : std::nullopt;
  };
  const optional<Tensor> d_hidden = fresh(needed[0], hidden.sizes(), hidden_dtype),
                         d_weight = fresh(needed[1], weight.sizes(), once ? weight_dtype : head.dtype),
                         d_bias = fresh(needed[2] && bias, {head.V}, head.dtype);
  const auto run = head.dtype == at::kDouble ? &accumulate<double> : &accumulate<float>;
  run(grad, grad_entropy, head, rows, norm, store, d_hidden, d_weight, d_bias, true, chunk_rows);
  const auto rounded = [&](const optional<Tensor>& total, at::ScalarType kind) {
    if (!total) return empty({0}, kind);
    return total->scalar_type() == kind ? *total : empty(total->sizes(), kind).copy_(*total);
  };
  return {rounded(d_hidden, hidden_dtype), rounded(d_weight, weight_dtype), rounded(d_bias, bias_dtype)};
}

}  // namespace
}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("linear_logprobs_backward_", &fastpref::linear_logprobs_backward_);
  m.def(
      "linear_logprobs_backward(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
      "Tensor labels, Tensor? cu_seqlens, Tensor norm, Tensor? store, bool[3] needed, ScalarType hidden_dtype, "
      "ScalarType weight_dtype, ScalarType bias_dtype, int ignore_index, bool shift, float logit_scale, "
      "float temperature, float? softcap, int? chunk_rows, bool onednn) -> (Tensor, Tensor, Tensor)",
      &fastpref::linear_logprobs_backward);
}
