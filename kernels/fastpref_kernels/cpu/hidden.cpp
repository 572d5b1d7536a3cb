// Log-probs from hidden states and the LM head, and their gradients, in one operator per direction, for a whole
// vocabulary and exact gradients. The formulas are in the docstring of `fastpref_kernels.linear`, whose tensor operations
// would take most of a small batch's time.
#include "lanes.h"
#include "linear.h"
#include "memory.h"
#include "product.h"
#include "rows.h"

#include <ATen/DimVector.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

namespace fastpref {
namespace {

using at::Tensor;
using std::optional;

// A tile of logits. More rows mean fewer passes over the weight and its gradient.
constexpr int64_t kRows = 1024, kColumns = 4096;
// oneDNN sums at most this many terms of a float32 product in one chain; the partial sums are then added.
constexpr int64_t kSummed = 512;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNear = 600;  // below this, exp(a - z_y) is a float64 with room to spare

// Same as Tensor::narrow, but calls one operator instead of three, and none if the whole dimension is kept.
Tensor narrowed(const Tensor& x, int64_t dim, int64_t begin, int64_t n) {
  if (n == x.size(dim)) return x;
  at::DimVector sizes(x.sizes());
  sizes[dim] = n;
  return x.as_strided(sizes, x.strides(), x.storage_offset() + begin * x.stride(dim));
}

// Returns a matrix in `dtype`, in scratch memory if it must be converted. Keeps its order, by rows or by columns.
Tensor widened(Scratch name, const Tensor& x, at::ScalarType dtype) {
  if (x.scalar_type() == dtype) return x;
  if (x.stride(0) == 1 && x.stride(1) != 1) return widened(name, x.t(), dtype).t();
  return scratch(name, x.sizes(), dtype).copy_(x);
}

// Whether lines of a matrix overlap without being the same, as only `as_strided` makes them.
bool overlaps(const Tensor& x) {
  const int inner = x.stride(0) < x.stride(1) ? 0 : 1, outer = 1 - inner;
  return 0 < x.stride(outer) && x.stride(outer) < x.stride(inner) * x.size(inner);
}

// out (M, N) = left (M, K) @ right (K, N), or += it, by whichever library is fastest at it with float32 sums.
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
    // oneDNN sums all of K in one chain, whose error grows with its length; MKL in blocks of a few hundred.
    for (int64_t begin = 0; begin < a.size(1); begin += kSummed) {
      const int64_t terms = std::min(kSummed, a.size(1) - begin);
      const Tensor part = linear.call(narrowed(a, 1, begin, terms), narrowed(b, 0, begin, terms).t(), std::nullopt, "none",
                                      c10::List<optional<at::Scalar>>(), "");
      add || begin ? result.add_(part) : result.copy_(part);
    }
  } else if (add) {
    at::addmm_out(result, result, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

// Returns a pointer to the first feature of scored row i in x (B, T, H), whose features are contiguous.
template <typename T>
T* line(T* data, const Tensor& x, const ScoredRows& rows, int64_t i) {
  return data + rows.index[i] / rows.per_batch * x.stride(0) + rows.index[i] % rows.per_batch * x.stride(1);
}

// f(i) for the rows [first, first + n), each of `size` values, shared out among threads.
template <typename F>
void for_rows(int64_t first, int64_t n, int64_t size, const F& f) {
  at::parallel_for(first, first + n, std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) f(i);
                   });
}

// The operators can be called directly, and read and write by pointers: shapes are checked here too.
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

struct Head {
  const Tensor hidden;  // (B, T, H), features contiguous
  const Tensor& weight;
  const optional<Tensor>& bias;
  const Transform transform;
  const double logit_scale, temperature;
  const optional<double> softcap;
  const at::ScalarType dtype;  // of the logits
  const int64_t V, H;
  const bool onednn;

  Head(const Tensor& hidden, const Tensor& weight, const optional<Tensor>& bias, double logit_scale, double temperature,
       optional<double> softcap, bool onednn)
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

  Tensor weight_of(int64_t begin, int64_t columns) const {
    return narrowed(weight, 0, begin, columns);
  }

  optional<Tensor> bias_of(int64_t begin, int64_t columns) const {
    return bias ? optional<Tensor>(narrowed(*bias, 0, begin, columns)) : std::nullopt;
  }

  // The hidden states (n, H) of the rows from `first` on.
  Tensor states(const ScoredRows& rows, int64_t first, int64_t n) const {
    const Tensor x = scratch(Scratch::kStates, {n, H}, hidden.scalar_type());
    const int64_t bytes = H * hidden.element_size();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "fastpref::states", [&] {
      const scalar_t* from = hidden.const_data_ptr<scalar_t>();
      scalar_t* to = x.mutable_data_ptr<scalar_t>();
      for_rows(first, n, H, [&](int64_t i) { std::memcpy(to + (i - first) * H, line(from, hidden, rows, i), bytes); });
    });
    return x;
  }

  // Room for a tile of n rows, each as far from the next in the narrower last tile as in the others.
  Tensor tile(Scratch name, int64_t n, int64_t columns, at::ScalarType kind) const {
    return narrowed(scratch(name, {n, std::min(kColumns, V)}, kind), 1, 0, columns);
  }

  // A tile's logits before their transform.
  Tensor products(const Tensor& x, int64_t begin, int64_t columns) const {
    const Tensor z = tile(Scratch::kLogits, x.size(0), columns, dtype);
    product(z, x, weight_of(begin, columns).t(), false, onednn);
    return z;
  }

  // z of the labels, from a dot product of its own. The exponentials are anchored at it, so it need not equal the tile's.
  void label_logits(const Tensor& x, const int64_t* labels, double* z) const {
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

  // dz/dx where z is a label's logit.
  double slope(double z) const {
    return softcap ? slope_at<true>(z, transform) : transform.slope;
  }
};

// Where a row's results go: (B, T') each, or empty.
struct Results {
  Tensor logps, norm;
  std::array<Tensor, 6> statistics;

  Results(at::IntArrayRef shape, at::ScalarType dtype, int64_t stats) {
    const auto zeros = [&](at::IntArrayRef size, at::ScalarType kind) {
      return at::zeros(size, at::TensorOptions().dtype(kind));
    };
    logps = zeros(shape, dtype);
    norm = zeros({stats & kEntropy ? 4 : 3, shape[0], shape[1]}, dtype);
    for (int bit = 0; bit < 6; ++bit) {
      const at::ScalarType kind = 1 << bit == kTop1 ? at::kBool : dtype;
      statistics[bit] = stats >> bit & 1 ? zeros(shape, kind) : at::empty({0}, at::TensorOptions().dtype(kind));
    }
  }

  // Writes a row's results, and returns the value stored at its label for the backward's products.
  template <typename A>
  double finish(const double* state, int64_t R, const Head& head, int64_t stats, int64_t place) {
    const double anchor = state[0] == -kInf ? 0 : state[0];  // nothing but -inf: any anchor does
    const double rest = state[R], weighted = state[2 * R], squares = state[3 * R], total = state[4 * R],
                 before = state[5 * R], after = state[6 * R], z_y = state[7 * R];
    const double e_y = std::exp(z_y - anchor), whole = rest + e_y, gap = anchor - z_y;
    double logp = gap < kNear ? -std::log1p(rest * std::exp(gap)) : -gap - std::log(whole);
    if (z_y == kInf) logp = std::numeric_limits<double>::quiet_NaN();
    const auto put = [&](const Tensor& to, int64_t plane, double value) {
      to.mutable_data_ptr<A>()[plane * logps.numel() + place] = A(value);
    };
    put(logps, 0, logp);
    const double unit = std::exp(anchor - anchor);  // 1, or NaN where the anchor is infinite
    put(norm, 0, anchor), put(norm, 1, unit / whole), put(norm, 2, logp);
    if (stats & kLse) put(statistics[0], 0, anchor + std::log(whole));
    if (stats & kEntropy) {
      const double label = e_y == 0 ? 0 : e_y * gap;
      // From the label, an entropy near 0 keeps its digits.
      const double entropy = gap < kNear ? -logp - (weighted + gap * rest) / whole
                                         : std::log(whole) - (weighted - label) / whole;
      put(statistics[1], 0, entropy), put(norm, 3, entropy);
    }
    if (stats & kMean) put(statistics[2], 0, total / double(head.V));
    if (stats & kTop1) statistics[3].mutable_data_ptr<bool>()[place] = before < z_y && after <= z_y;
    if (stats & kLogSumSq) put(statistics[4], 0, std::log(squares + e_y * e_y) - 2 * std::log(whole));
    return -rest * unit * head.slope(z_y);
  }
};

// Bring stored exponentials of rows, each tile at an anchor of its own, to their row's, and write the labels' places.
void finish_store(const Tensor& store, const Tensor& anchors, const double* anchor, const int64_t* labels,
                  const std::vector<double>& at_label) {
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, store.scalar_type(), "fastpref::finish_store", [&] {
    using A = acc_t<scalar_t>;
    const int64_t n = store.size(0), V = store.size(1);
    scalar_t* data = store.mutable_data_ptr<scalar_t>();
    for_rows(0, n, V, [&](int64_t i) {
      scalar_t* row = data + i * store.stride(0);
      const double to = anchor[i] == -kInf ? 0 : anchor[i];
      for (int64_t tile = 0; tile < anchors.size(0); ++tile) {
        const double gap = anchors.const_data_ptr<double>()[tile * n + i] - to;
        if (gap == 0) continue;
        const A factor = A(std::exp(gap));
        for (int64_t j = tile * kColumns; j < std::min(V, (tile + 1) * kColumns); ++j) {
          row[j] = scalar_t(A(row[j]) * factor);
        }
      }
      row[labels[i]] = scalar_t(at_label[i]);
    });
  });
}

// `fastpref::linear_logprobs`, without a filter.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_logprobs(
    const Tensor& hidden, const Tensor& weight, const optional<Tensor>& bias, const Tensor& labels,
    const optional<Tensor>& cu_seqlens, const optional<Tensor>& store, int64_t ignore_index, bool shift,
    double logit_scale, double temperature, optional<double> softcap, int64_t stats, optional<int64_t> chunk_rows,
    bool onednn) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_operands(hidden, weight, bias, labels, chunk_rows);
  const Head head(hidden, weight, bias, logit_scale, temperature, softcap, onednn);
  ScoredRows rows(labels, cu_seqlens, ignore_index, shift, head.V);
  check_store(store, rows, weight);
  Results results({labels.size(0), rows.per_batch}, head.dtype, stats);
  const int64_t tiles = (head.V + kColumns - 1) / kColumns, R = rows.size();
  for (int64_t first = 0; first < R;) {
    const int64_t n = std::min(chunk_rows.value_or(kRows), R - first);
    const Tensor x = head.states(rows, first, n);
    const Tensor y = at::from_blob(rows.label.data() + first, {n}, at::kLong);
    const Tensor state = at::zeros({8, n}, at::kDouble), anchors = at::empty({tiles, n}, at::kDouble),
                 masses = at::empty({n}, at::kDouble);
    double* sums = state.mutable_data_ptr<double>();
    head.label_logits(x, rows.label.data() + first, sums);
    std::fill(sums + 5 * n, sums + 7 * n, -kInf);
    const optional<Tensor> kept = store ? optional<Tensor>(narrowed(*store, 0, first, n)) : std::nullopt;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * kColumns, columns = std::min(kColumns, head.V - begin);
      const Tensor z = head.products(x, begin, columns);
      fold(z, head.bias_of(begin, columns), y, begin, logit_scale, temperature, softcap, stats, state,
           narrowed(anchors, 0, tile, 1), masses, kept ? optional<Tensor>(narrowed(*kept, 1, begin, columns)) : std::nullopt);
    }
    std::vector<double> at_label(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = rows.index[first + i];
      at_label[i] = head.dtype == at::kDouble ? results.finish<double>(sums + i, n, head, stats, place)
                                              : results.finish<float>(sums + i, n, head, stats, place);
    }
    if (kept) finish_store(*kept, anchors, sums, rows.label.data() + first, at_label);
    first += n;
  }
  const Tensor shares = at::empty({0, labels.size(0), rows.per_batch}, at::kFloat);
  const auto& [lse, entropy, mean, top1, log_sum_sq, dropped] = results.statistics;
  return {results.logps, results.norm, shares, lse, entropy, mean, top1, log_sum_sq, dropped};
}

// Returns rows' values (planes, n) of contiguous planes (..., B, T'), if there are any.
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

// Rows x (n, H) times a factor each, rounded to x's dtype.
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

// Rows (n, H), times a factor each if there are factors, to their places in `out` (B, T, H), or added to what is there.
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
  const int64_t planes = grad_entropy ? 4 : 3;
  TORCH_CHECK(norm.dim() == 3 && norm.size(0) >= planes && norm.sizes().slice(1) == at::IntArrayRef(shape),
              "norm must be ", planes, " planes or more of (B, T') = ", at::IntArrayRef(shape), "; got ", norm.sizes());
  check_store(store, rows, weight);
  TORCH_CHECK(!d_hidden || (d_hidden->sizes() == hidden.sizes() && (d_hidden->stride(2) == 1 || d_hidden->size(2) <= 1)),
              "hidden's gradient must be (B, T, H) = ", hidden.sizes(), ", with contiguous features; got ",
              d_hidden->sizes(), " with strides ", d_hidden->strides());
  TORCH_CHECK(!d_weight || d_weight->sizes() == weight.sizes(), "weight's gradient must be ", weight.sizes(), "; got ",
              d_weight->sizes());
  TORCH_CHECK(!d_bias || (d_bias->dim() == 1 && d_bias->size(0) == weight.size(0)), "bias's gradient must be (V,) = (",
              weight.size(0), ",); got ", d_bias->sizes());
}

// Sums of the gradients over rows: `fastpref::linear_logprobs_backward_`, without a filter. Where they are not `fresh`,
// they are added to what is there. d_weight may be narrower than the sums only if all rows fit in one chunk.
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
      const A* inverse = of_row.const_data_ptr<A>() + n;
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

// `fastpref::linear_logprobs_backward`, without a filter.
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
  // Each row of hidden's gradient is written once. The weight's needs no sums between chunks where there is one chunk.
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
  m.def("product(Tensor(a!) out, Tensor left, Tensor right, bool add, bool onednn) -> ()", &fastpref::product);
  m.def("linear_logprobs", &fastpref::linear_logprobs);
  m.def("linear_logprobs_backward_", &fastpref::linear_logprobs_backward_);
  m.def(
      "linear_logprobs_backward(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
      "Tensor labels, Tensor? cu_seqlens, Tensor norm, Tensor? store, bool[3] needed, ScalarType hidden_dtype, "
      "ScalarType weight_dtype, ScalarType bias_dtype, int ignore_index, bool shift, float logit_scale, "
      "float temperature, float? softcap, int? chunk_rows, bool onednn) -> (Tensor, Tensor, Tensor)",
      &fastpref::linear_logprobs_backward);
}
