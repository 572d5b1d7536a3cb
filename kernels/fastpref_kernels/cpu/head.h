// The operands of log-probs from hidden states: their checks, and the pieces that forward and backward multiply.
#pragma once

#include "contract.h"
#include "lanes.h"
#include "memory.h"
#include "product.h"
#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

namespace fastpref {

// Return a pointer to the first feature of scored row i in x (B, T, H), whose features are contiguous.
template <typename T>
T* line(T* data, const at::Tensor& x, const ScoredRows& rows, int64_t i) {
  return data + rows.index[i] / rows.per_batch * x.stride(0) + rows.index[i] % rows.per_batch * x.stride(1);
}

// Call f(i) for the rows [first, first + n), each of `size` values, split between threads.
template <typename F>
void for_rows(int64_t first, int64_t n, int64_t size, const F& f) {
  at::parallel_for(first, first + n, std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) f(i);
                   });
}

// Raise if a shape or a dtype is wrong. The operators can be called directly, and they read and write through pointers.
void check_operands(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& labels, const std::optional<int64_t>& chunk_rows);
void check_store(const std::optional<at::Tensor>& store, const ScoredRows& rows, const at::Tensor& weight);

// The head, the hidden states that it multiplies, and the transform of the products.
struct Head {
  const at::Tensor hidden;  // (B, T, H), features contiguous
  const at::Tensor& weight;
  const std::optional<at::Tensor>& bias;
  const Transform transform;
  const double logit_scale, temperature;
  const std::optional<double> softcap;
  const at::ScalarType dtype;  // of the logits
  const int64_t V, H;
  const bool onednn;

  Head(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias, double logit_scale,
       double temperature, std::optional<double> softcap, bool onednn)
      : hidden(hidden.stride(2) == 1 ? hidden : hidden.contiguous()),
        weight(weight),
        bias(bias),
        transform(logit_scale, temperature, softcap),
        logit_scale(logit_scale),
        temperature(temperature),
        softcap(softcap),
        dtype(c10::promoteTypes(hidden.scalar_type(), at::kFloat)),
        V(weight.size(0)),
        H(weight.size(1)),
        onednn(onednn) {}

  at::Tensor weight_of(int64_t begin, int64_t columns) const {
    return narrowed(weight, 0, begin, columns);
  }

  std::optional<at::Tensor> bias_of(int64_t begin, int64_t columns) const {
    return bias ? std::optional<at::Tensor>(narrowed(*bias, 0, begin, columns)) : std::nullopt;
  }

  // Return the hidden states (n, H) of the rows from `first` on, in scratch memory.
  at::Tensor states(const ScoredRows& rows, int64_t first, int64_t n) const;

  // Return scratch for a tile of n rows, with the same distance between rows in the narrower last tile as in the
  // others.
  at::Tensor tile(Scratch name, int64_t n, int64_t columns, at::ScalarType kind) const {
    return narrowed(scratch(name, {n, std::min(kColumns, V)}, kind), 1, 0, columns);
  }

  // Return a tile's logits before their transform, in scratch memory.
  at::Tensor products(const at::Tensor& x, int64_t begin, int64_t columns) const;

  // Write z of the labels, each computed by a separate dot product. Exponentials are anchored at it, so it need not
  // equal the tile's.
  void label_logits(const at::Tensor& x, const int64_t* labels, double* z) const;

  // Return dz/dx where z is a label's logit.
  double slope(double z) const {
    return softcap ? slope_at<true>(z, transform) : transform.slope;
  }
};

}  // namespace fastpref
