// The row passes over a tile of logits. `fastpref_kernels.linear` defines them and their arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastpref {

void fold(const at::Tensor& z, const std::optional<at::Tensor>& bias, const at::Tensor& targets, int64_t column,
          double logit_scale, double temperature, std::optional<double> softcap, int64_t stats, const at::Tensor& state,
          const at::Tensor& anchors, const at::Tensor& masses, const std::optional<at::Tensor>& store);

void fold_backward(const at::Tensor& z, const std::optional<at::Tensor>& bias, const at::Tensor& targets,
                   int64_t column, double logit_scale, double temperature, std::optional<double> softcap,
                   const at::Tensor& norm, const std::optional<at::Tensor>& grad,
                   const std::optional<at::Tensor>& grad_entropy, const at::Tensor& out);

}  // namespace fastpref
