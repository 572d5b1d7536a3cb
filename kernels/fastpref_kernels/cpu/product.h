// Matrix products with float32 sums.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastpref {

// Narrow as Tensor::narrow does, but call one operator instead of three, and none if the whole dimension is kept.
at::Tensor narrowed(const at::Tensor& x, int64_t dim, int64_t begin, int64_t n);

// Compute out (M, N) = left (M, K) @ right (K, N), or += it, with float32 sums, by the library that is fastest at it.
void product(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool add, bool onednn);

}  // namespace fastpref
