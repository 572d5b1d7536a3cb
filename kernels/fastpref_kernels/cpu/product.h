// bfloat16 matrix products with float32 sums.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace fastpref {

// Whether bf16_gemm, called without a route, has one that is worth calling.
bool has_bf16_gemm();

// out (M, N) float32 = left (M, K) @ right (K, N) in bfloat16, summed in float32; or += of it.
void bf16_gemm(const at::Tensor& out, const at::Tensor& left, const at::Tensor& right, bool add,
               const std::optional<std::string>& route);

}  // namespace fastpref
