// Log-probs from hidden states and the LM head, for a whole vocabulary and without a filter. The formulas are in the
// docstring of `fastpref_kernels.linear`, whose tensor operations would take most of a small batch's time.
#include "contract.h"
#include "head.h"
#include "lanes.h"
#include "linear.h"
#include "product.h"
#include "rows.h"
#include "statistics.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace fastpref {
namespace {

using at::Tensor;
using std::optional;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNear = 600;  // below this, exp(a - z_y) is a float64 with room to spare

// A row's sums over all columns, and the terms that its log-prob and statistics share.
struct Row {
  double anchor, rest, weighted, squares, total, before, after, label, second;  // `contract.RowSums`
  double e_y, whole, gap, logp;                                                 // whole: sum of exp(z - anchor)

  Row(const double* sums, int64_t R)
      : anchor(sums[kAnchor * R] == -kInf ? 0 : sums[kAnchor * R]),  // nothing but -inf: any anchor does
        rest(sums[kRest * R]),
        weighted(sums[kWeighted * R]),
        squares(sums[kSquares * R]),
        total(sums[kTotal * R]),
        before(sums[kBefore * R]),
        after(sums[kAfter * R]),
        label(sums[kLabel * R]),
        second(sums[kSecond * R]),
        e_y(std::exp(label - anchor)),
        whole(rest + e_y),
        gap(anchor - label),
        logp(gap < kNear ? -std::log1p(rest * std::exp(gap)) : -gap - std::log(whole)) {
    if (label == kInf) logp = std::numeric_limits<double>::quiet_NaN();
  }
};

// Return a statistic of a row of V logits.
template <Statistic S>
double statistic(const Row& r, int64_t V) {
  if constexpr (S == kLse) {
    return r.anchor + std::log(r.whole);
  } else if constexpr (S == kEntropy) {
    // Computed relative to the label, an entropy near 0 keeps its digits.
    if (r.gap < kNear) return -r.logp - (r.weighted + r.gap * r.rest) / r.whole;
    return std::log(r.whole) - (r.weighted - (r.e_y == 0 ? 0 : r.e_y * r.gap)) / r.whole;
  } else if constexpr (S == kMeanLogits) {
    return r.total / double(V);
  } else if constexpr (S == kIsTop1) {
    return r.before < r.label && r.after <= r.label;
  } else if constexpr (S == kLogSumSqProbs) {
    return std::log(r.squares + r.e_y * r.e_y) - 2 * std::log(r.whole);
  } else if constexpr (S == kTop2Margin) {
    const double others = greater(r.before, r.after);
    return greater(others, r.label) - std::max(std::min(others, r.label), r.second);
  } else {
    static_assert(S == kDroppedMass, "a Statistic of contract.py has no branch in linear_forward.cpp");
    return 0;  // without a filter
  }
}

// The results of all rows.
struct Results {
  const Tensor logps, norm;
  const std::vector<Tensor> statistics;

  Results(at::IntArrayRef shape, at::ScalarType dtype, int64_t stats)
      : logps(at::zeros(shape, at::TensorOptions().dtype(dtype))),
        norm(at::zeros({norm_planes(stats & kEntropy), shape[0], shape[1]}, logps.options())),
        statistics(statistics_of<kLinearStatistics>(shape, dtype, stats)) {}

  // Write a row's results, and return the value stored at its label for the backward's products.
  template <typename A>
  double finish(const double* sums, int64_t R, const Head& head, int64_t stats, int64_t place) {
    const Row row(sums, R);
    const auto write_norm = [&](NormPlane plane, double value) {
      norm.mutable_data_ptr<A>()[plane * logps.numel() + place] = A(value);
    };
    const auto value = [&]<Statistic S>() { return statistic<S>(row, head.V); };
    const double unit = std::exp(row.anchor - row.anchor);  // 1, or NaN where the anchor is infinite
    logps.mutable_data_ptr<A>()[place] = A(row.logp);
    write_norm(kNormAnchor, row.anchor);
    write_norm(kNormInverse, unit / row.whole);
    write_norm(kNormLogp, row.logp);
    if (stats & kEntropy) write_norm(kNormEntropy, value.template operator()<kEntropy>());
    write_statistics<kLinearStatistics, A>(statistics, stats, place, value);
    return -row.rest * unit * head.slope(row.label);
  }
};

// Rescale the stored exponentials of rows from the anchor of each tile to the row's, and write the values at the
// labels.
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

// Run `fastpref::linear_logprobs`, without a filter.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> linear_logprobs(
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
    const Tensor state = at::zeros({kRowSums, n}, at::kDouble), anchors = at::empty({tiles, n}, at::kDouble),
                 masses = at::empty({n}, at::kDouble);
    double* sums = state.mutable_data_ptr<double>();
    head.label_logits(x, rows.label.data() + first, sums + kAnchor * n);
    for (const RowSum highest : {kBefore, kAfter, kSecond}) std::fill_n(sums + highest * n, n, -kInf);
    const optional<Tensor> kept = store ? optional<Tensor>(narrowed(*store, 0, first, n)) : std::nullopt;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = tile * kColumns, columns = std::min(kColumns, head.V - begin);
      const Tensor z = head.products(x, begin, columns);
      const optional<Tensor> tile_store = kept ? optional<Tensor>(narrowed(*kept, 1, begin, columns)) : std::nullopt;
      fold(z, head.bias_of(begin, columns), y, begin, logit_scale, temperature, softcap, stats, state,
           narrowed(anchors, 0, tile, 1), masses, tile_store);
    }
    std::vector<double> at_label(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = rows.index[first + i];
      at_label[i] = head.dtype == at::kDouble ? results.finish<double>(sums + i, n, head, stats, place)
                                              : results.finish<float>(sums + i, n, head, stats, place);
    }
    if (kept) finish_store(*kept, anchors, sums + kAnchor * n, rows.label.data() + first, at_label);
    first += n;
  }
  const Tensor shares = at::empty({0, labels.size(0), rows.per_batch}, at::kFloat);
  return {results.logps, results.norm, shares, results.statistics};
}

}  // namespace
}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("linear_logprobs", &fastpref::linear_logprobs);
}
