// Matrix products with float32 sums, by whichever library is fastest at them.
#include "product.h"
#include "bf16_gemm.h"
#include "contract.h"
#include "memory.h"

#include <ATen/DimVector.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

namespace fastpref {

using at::Tensor;
using std::optional;

Tensor narrowed(const Tensor& x, int64_t dim, int64_t begin, int64_t n) {
  if (n == x.size(dim)) return x;
  at::DimVector sizes(x.sizes());
  sizes[dim] = n;
  return x.as_strided(sizes, x.strides(), x.storage_offset() + begin * x.stride(dim));
}

namespace {

// Return a matrix in `dtype`, in scratch memory if it must be converted. Keeps its order, by rows or by columns.
Tensor widened(Scratch name, const Tensor& x, at::ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  if (x.stride(0) == 1 && x.stride(1) != 1) return widened(name, x.t(), dtype).t();
  return scratch(name, x.sizes(), dtype).copy_(x);
}

// Return whether lines of a matrix overlap without being the same, as only `as_strided` makes them.
bool overlaps(const Tensor& x) {
  const int inner = x.stride(0) < x.stride(1) ? 0 : 1, outer = 1 - inner;
  return 0 < x.stride(outer) && x.stride(outer) < x.stride(inner) * x.size(inner);
}

}  // namespace

void product(const Tensor& out, const Tensor& left, const Tensor& right, bool add, bool onednn) {
  if (left.scalar_type() == at::kBFloat16 && has_bf16_gemm()) return bf16_gemm(out, left, right, add, std::nullopt);
  Tensor result = out;
  if (left.size(1) == 0 && !add) result.zero_();  // which oneDNN leaves unwritten
  const Tensor a = widened(Scratch::kLeft, left, out.scalar_type());
  Tensor b = widened(Scratch::kRight, right, out.scalar_type());
  if (onednn && out.scalar_type() == at::kFloat) {
    using Linear = Tensor(const Tensor&, const Tensor&, const optional<Tensor>&, std::string_view,
                          c10::List<optional<at::Scalar>>, optional<std::string_view>);
    static const auto linear =
        c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Linear>();
    if (overlaps(b)) b = b.contiguous();  // which oneDNN refuses
    // oneDNN sums all of K in one chain, whose error grows with its length. MKL sums blocks of a few hundred terms.
    for (int64_t begin = 0; begin < a.size(1); begin += kSummed) {
      const int64_t terms = std::min(kSummed, a.size(1) - begin);
      const Tensor x = narrowed(a, 1, begin, terms), w = narrowed(b, 0, begin, terms).t();
      const Tensor part = linear.call(x, w, std::nullopt, "none", c10::List<optional<at::Scalar>>(), "");
      add || begin ? result.add_(part) : result.copy_(part);
    }
  } else if (add) {
    at::addmm_out(result, result, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("product(Tensor(a!) out, Tensor left, Tensor right, bool add, bool onednn) -> ()", &fastpref::product);
}
