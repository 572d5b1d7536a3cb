// bfloat16 matrix products with float32 sums.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace fastpref {

// Return whether bf16_gemm has a route that is faster than float32 products.
bool has_bf16_gemm();

// Compute out (M, N) float32 = left (M, K) @ right (K, N), or add it to out, in bfloat16 with float32 sums.
void bf16_gemm(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool add,
               const std::optional<std::string>& route);

}  // namespace fastpref
