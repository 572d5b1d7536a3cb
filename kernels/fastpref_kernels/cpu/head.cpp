#include "head.h"

#include <ATen/Dispatch.h>

#include <cstring>

namespace fastpref {

using at::Tensor;
using std::optional;

void check_operands(const Tensor& hidden, const Tensor& weight, const optional<Tensor>& bias, const Tensor& labels,
                    const optional<int64_t>& chunk_rows) {
  const at::ScalarType dtype = hidden.scalar_type();
  TORCH_CHECK(hidden.dim() == 3 && weight.dim() == 2 && weight.size(1) == hidden.size(2) &&
                  weight.scalar_type() == dtype,
              "hidden must be (B, T, H) and weight (V, H), of one dtype; got ", hidden.sizes(), " of ", dtype, " and ",
              weight.sizes(), " of ", weight.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == dtype),
              "bias must be (V,) = (", weight.size(0), ",) of ", dtype, "; got ", bias->sizes(), " of ",
              bias->scalar_type());
  TORCH_CHECK(labels.dim() == 2 && labels.size(0) == hidden.size(0) && labels.size(1) == hidden.size(1),
              "labels must be (B, T) = (", hidden.size(0), ", ", hidden.size(1), "); got ", labels.sizes());
  TORCH_CHECK(chunk_rows.value_or(1) >= 1, "chunk_rows must be None, or 1 or more; got ", *chunk_rows);
}

void check_store(const optional<Tensor>& store, const ScoredRows& rows, const Tensor& weight) {
  TORCH_CHECK(!store || (store->dim() == 2 && store->size(0) >= rows.size() && store->size(1) == weight.size(0) &&
                         (store->stride(1) == 1 || store->size(1) == 1)),
              "store must have rows of V = ", weight.size(0), " contiguous numbers, one for each of ", rows.size(),
              " scored tokens; got ", store->sizes());
}

Tensor Head::states(const ScoredRows& rows, int64_t first, int64_t n) const {
  const Tensor x = scratch(Scratch::kStates, {n, H}, hidden.scalar_type());
  const int64_t bytes = H * hidden.element_size();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "fastpref::states", [&] {
    const scalar_t* from = hidden.const_data_ptr<scalar_t>();
    scalar_t* to = x.mutable_data_ptr<scalar_t>();
    for_rows(first, n, H, [&](int64_t i) { std::memcpy(to + (i - first) * H, line(from, hidden, rows, i), bytes); });
  });
  return x;
}

Tensor Head::products(const Tensor& x, int64_t begin, int64_t columns) const {
  const Tensor z = tile(Scratch::kLogits, x.size(0), columns, dtype);
  product(z, x, weight_of(begin, columns).t(), false, onednn);
  return z;
}

void Head::label_logits(const Tensor& x, const int64_t* labels, double* z) const {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "fastpref::label_logits", [&] {
    using A = acc_t<scalar_t>;
    const scalar_t *states = x.const_data_ptr<scalar_t>(), *weights = weight.const_data_ptr<scalar_t>();
    for_rows(0, x.size(0), H, [&](int64_t i) {
      const scalar_t *a = states + i * H, *b = weights + labels[i] * weight.stride(0);
      Vectorized<A> sums(A(0));
      A raw = 0;
      int64_t j = 0;
      if (weight.stride(1) == 1) {
        for (; j + kStep<scalar_t> <= H; j += kStep<scalar_t>) {
          const Pair<A> u = load_pair(a + j), v = load_pair(b + j);
          sums = at::vec::fmadd(u.first, v.first, at::vec::fmadd(u.second, v.second, sums));
        }
        raw = sum(sums);
      }
      for (; j < H; ++j) raw += A(a[j]) * A(b[j * weight.stride(1)]);
      if (bias) raw += A(bias->const_data_ptr<scalar_t>()[labels[i] * bias->stride(0)]);
      z[i] = A(softcap ? u_of<true>(raw, transform) : raw) * A(transform.rate);
    });
  });
}

}  // namespace fastpref
