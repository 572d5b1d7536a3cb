// The tensors of per-token statistics, one for every member of the contract.
#pragma once

#include "contract.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <utility>
#include <vector>

namespace fastpref {

// Return zeros for each of `kMembers`, or a tensor of size 0 for one that is not asked for.
template <const auto& kMembers>
std::vector<at::Tensor> statistics_of(at::IntArrayRef shape, at::ScalarType dtype, int64_t stats) {
  std::vector<at::Tensor> result;
  for (const Statistic member : kMembers) {
    const auto options = at::TensorOptions().dtype(member & kBoolean ? at::kBool : dtype);
    result.push_back(stats & member ? at::zeros(shape, options) : at::empty({0}, options));
  }
  return result;
}

// Write value.operator()<S>() at `place` of the tensor of each statistic S that is asked for.
template <const auto& kMembers, typename A, typename F>
void write_statistics(const std::vector<at::Tensor>& tensors, int64_t stats, int64_t place, const F& value) {
  const auto write = [&]<Statistic S>(const at::Tensor& to) {
    if (!(stats & S)) return;
    if constexpr (S & kBoolean) {
      to.mutable_data_ptr<bool>()[place] = value.template operator()<S>() != 0;
    } else {
      to.mutable_data_ptr<A>()[place] = A(value.template operator()<S>());
    }
  };
  [&]<size_t... I>(std::index_sequence<I...>) {
    (write.template operator()<kMembers[I]>(tensors[I]), ...);
  }(std::make_index_sequence<kMembers.size()>());
}

}  // namespace fastpref
