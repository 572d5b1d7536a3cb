// Log-probs of labels under logits, in one pass over the scored rows.
//
// Where no statistic is asked for, a row is anchored at the label: logp = -log1p(sum over j != y of exp(z_j - z_y)).
// The sum needs no maximum, so a row is read once, and a log-prob near 0 keeps its digits. A row whose other logits lie
// far above the label's, and every row with statistics other than lse, is anchored at its maximum instead, a chunk at a
// time.
//
// A row is always the work of one thread and summed in one order: its bits depend on nothing but itself.
#include "lanes.h"
#include "logits.h"
#include "rows.h"
#include "statistics.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
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

// Return the sum of exp(rate * (u(x_j) - anchor)) over n contiguous values.
template <bool Cap, typename T>
double sum_exp(const T* x, int64_t n, acc_t<T> anchor, const Transform& t) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  const V rate{A(t.rate)}, shift{A(anchor * A(t.rate))};
  V first(A(0)), second(A(0));
  const auto term = [&](const V& v) { return exp(at::vec::fmsub(u_of<Cap>(v, t), rate, shift)); };
  double rest = 0;
  for_each(
      x, n,
      [&](const Pair<A>& v, int64_t) {
        first = first + term(v.first);
        second = second + term(v.second);
      },
      [&](const Pair<A>& v, int64_t, int64_t left) {
        A out[kStep<T>];
        store_pair(out, map(v, term));
        for (int64_t i = 0; i < left; ++i) rest += out[i];
      });
  return rest + double(sum(first + second));
}

// A row's log-prob, and its sums of e_j = exp(d_j) with d_j = rate * (u_j - anchor).
template <typename A>
struct RowResult {
  A anchor;
  double logp, sum, log_sum;  // sum: of e
  // Only where a statistic but lse is asked for. weighted and squares leave the label out.
  double weighted, squares, total_u, d_y, e_y;
  bool is_top1;
  double second;  // the second-largest u
};

// Return a statistic of a row of V logits.
template <Statistic S, typename A>
double statistic(const RowResult<A>& r, const Transform& t, int64_t V) {
  if constexpr (S == kLse) {
    return double(r.anchor) * t.rate + r.log_sum;
  } else if constexpr (S == kEntropy) {
    return r.log_sum - (r.weighted + (r.e_y == 0 ? 0 : r.e_y * r.d_y)) / r.sum;
  } else if constexpr (S == kMeanLogits) {
    return r.total_u * t.rate / double(V);
  } else if constexpr (S == kIsTop1) {
    return r.is_top1;
  } else if constexpr (S == kLogSumSqProbs) {
    return std::log(r.squares + r.e_y * r.e_y) - 2 * r.log_sum;
  } else {
    static_assert(S == kTop2Margin, "a Statistic of contract.py has no branch in logprobs.cpp");
    return (double(r.anchor) - r.second) * t.rate;
  }
}

// Score a row, anchored at the label. Return false if that would overflow, or if the label's logit is not finite: the
// row is then anchored at its maximum.
template <bool Cap, typename T>
bool forward_anchored(const T* row, int64_t V, int64_t width, int64_t y, const Transform& t,
                      RowResult<acc_t<T>>& out) {
  using A = acc_t<T>;
  const A u_y = u_of<Cap>(A(row[y * width]), t);
  if (!std::isfinite(u_y)) return false;
  T scratch[kChunk];
  double s = 0;
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = std::min(kChunk, V - begin);
    const T* x = columns(row, width, begin, n, scratch);
    const int64_t skip = y - begin;
    if (skip >= 0 && skip < n) {
      s += sum_exp<Cap>(x, skip, u_y, t) + sum_exp<Cap>(x + skip + 1, n - skip - 1, u_y, t);
    } else {
      s += sum_exp<Cap>(x, n, u_y, t);
    }
  }
  // With a larger sum, 1 / (1 + s) and its products could leave float32's normal range.
  if (!(s < kLimit)) return false;
  out.anchor = u_y;
  out.sum = 1 + s;
  out.log_sum = std::log1p(s);
  out.logp = -out.log_sum;
  return true;
}

// Score a row, anchored at the running maximum of the chunks, with any statistics.
template <bool Cap, typename T>
void forward_online(const T* row, int64_t V, int64_t width, int64_t y, const Transform& t, int64_t stats,
                    RowResult<acc_t<T>>& out) {
  using A = acc_t<T>;
  using Vec = Vectorized<A>;
  constexpr A inf = std::numeric_limits<A>::infinity();
  const A u_y = u_of<Cap>(A(row[y * width]), t);
  T scratch[kChunk];
  A u[kChunk + kStep<A>];
  A m = u_y, above[2] = {-inf, -inf};  // above: the maxima before and after the label
  TopTwo<A> top;  // over j != y, as are the sums of e, e * d and e * e
  double rest = 0, weighted = 0, squares = 0, total_u = 0;
  const auto rescale = [&](double gap) {  // gap = rate * (old m - new m) <= 0
    const double f = std::exp(gap);
    // exp(d) d becomes f exp(d) (d + gap). If f is 0, so is the sum, whatever the gap.
    weighted = f == 0 ? 0 : f * (weighted + gap * rest);
    rest *= f;
    squares *= f * f;
  };
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = std::min(kChunk, V - begin);
    const T* x = columns(row, width, begin, n, scratch);
    for_each(
        x, n,
        [&](const Pair<A>& v, int64_t j) { store_pair(u + j, map(v, [&](const Vec& w) { return u_of<Cap>(w, t); })); },
        [&](const Pair<A>& v, int64_t j, int64_t) {
          store_pair(u + j, map(v, [&](const Vec& w) { return u_of<Cap>(w, t); }));
        });
    if (stats & kMeanLogits) {
      Vec sum_u(A(0));  // what pads the last vector is 0 here
      for (int64_t j = 0; j < n; j += Vec::size()) sum_u = sum_u + Vec::loadu(u + j);
      total_u += double(sum(sum_u));
    }
    const int64_t own = y - begin;
    const bool holds = own >= 0 && own < n;
    if (holds) u[own] = -inf;  // the label stays out of every sum, and adds its own terms at the end
    std::fill(u + n, u + n + kStep<A>, -inf);
    if (stats & kTop2Margin) {
      for (int64_t j = 0; j < n; j += Vec::size()) top.add(Vec::loadu(u + j));
    }

    const auto range_max = [](const A* p, int64_t k) {
      Vec best(-inf);
      for_each(
          p, k, [&](const Pair<A>& v, int64_t) { best = at::vec::maximum(best, at::vec::maximum(v.first, v.second)); },
          [&](const Pair<A>&, int64_t j, int64_t left) {
            for (int64_t i = 0; i < left; ++i) best = at::vec::maximum(best, Vec(p[j + i]));
          });
      return max(best);
    };
    A chunk_max;
    if (holds) {
      const A before = range_max(u, own), after = range_max(u + own + 1, n - own - 1);
      above[0] = at::_isnan(before) ? before : std::max(above[0], before);
      above[1] = at::_isnan(after) ? after : std::max(above[1], after);
      chunk_max = at::_isnan(before) ? before : at::_isnan(after) ? after : std::max(before, after);
    } else {
      chunk_max = range_max(u, n);
      A& side = above[begin > y];
      side = at::_isnan(chunk_max) ? chunk_max : std::max(side, chunk_max);
    }
    if (at::_isnan(chunk_max) || at::_isnan(m)) {
      m = std::numeric_limits<A>::quiet_NaN();
      continue;
    }
    if (chunk_max > m) {
      if (m != -inf) rescale((double(m) - double(chunk_max)) * t.rate);
      m = chunk_max;
    }
    if (m == -inf) continue;

    const Vec a(m), rate{A(t.rate)}, floor(A(-1e30));
    Vec e_sum(A(0)), ed_sum(A(0)), ee_sum(A(0));
    for (int64_t j = 0; j < n; j += Vec::size()) {
      // The floor keeps 0 * -inf out of the entropy: exp of it is 0 all the same.
      const Vec d = at::vec::maximum((Vec::loadu(u + j) - a) * rate, floor);
      const Vec e = exp(d);
      e_sum = e_sum + e;
      ed_sum = at::vec::fmadd(e, d, ed_sum);
      ee_sum = at::vec::fmadd(e, e, ee_sum);
    }
    rest += double(sum(e_sum));
    weighted += double(sum(ed_sum));
    squares += double(sum(ee_sum));
  }
  const double d_y = (double(u_y) - double(m)) * t.rate, e_y = std::exp(d_y);  // NaN where the row's maximum is inf
  out.anchor = m;
  out.sum = rest + e_y;
  out.log_sum = std::log(out.sum);
  out.logp = u_y == m ? -std::log1p(rest + 0 * d_y) : d_y - out.log_sum;
  out.weighted = weighted, out.squares = squares, out.total_u = total_u, out.d_y = d_y, out.e_y = e_y;
  out.is_top1 = above[0] < u_y && above[1] <= u_y;
  if (stats & kTop2Margin) {
    const auto [best, second] = top.reduced();
    out.second = std::max(second, std::min(best, u_y));
  }
}

template <typename T>
using Forward = void (*)(const T*, int64_t, int64_t, int64_t, const Transform&, int64_t, RowResult<acc_t<T>>&);

template <bool Cap, typename T>
void forward_row(const T* row, int64_t V, int64_t width, int64_t y, const Transform& t, int64_t stats,
                 RowResult<acc_t<T>>& out) {
  if ((stats & ~int64_t(kLse)) || !forward_anchored<Cap>(row, V, width, y, t, out)) {
    forward_online<Cap>(row, V, width, y, t, stats, out);
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Outputs logprobs(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& cu_seqlens,
                 const std::optional<Tensor>& weights, int64_t ignore_index, bool shift, double logit_scale,
                 double temperature, std::optional<double> softcap, std::string_view reduction, int64_t stats) {
  const Rows rows(logits, labels, cu_seqlens, ignore_index, shift);
  const Transform transform(logit_scale, temperature, softcap);
  const auto options = logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const std::vector<int64_t> shape{labels.size(0), rows.per_batch};
  const bool reduced = reduction != "none";
  const auto dtype = options.dtype().toScalarType();
  const Tensor logps = at::zeros(shape, options);
  const Tensor norm = at::zeros({norm_planes(stats & kEntropy), shape[0], shape[1]}, options);
  const std::vector<Tensor> statistics = statistics_of<kStatistics>(shape, dtype, stats);
  const Tensor sequences = at::zeros({reduced ? rows.n_sequences : 0}, options);
  const Tensor counts = at::zeros({reduced ? rows.n_sequences : 0}, options.dtype(at::kInt));

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "fastpref::logprobs", [&] {
    using A = acc_t<scalar_t>;
    const scalar_t* data = logits.const_data_ptr<scalar_t>();
    const Forward<scalar_t> forward = softcap ? &forward_row<true, scalar_t> : &forward_row<false, scalar_t>;
    A* out_logp = logps.mutable_data_ptr<A>();
    A* out_norm = norm.mutable_data_ptr<A>();
    at::parallel_for(0, rows.size(), rows.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RowResult<A> result;
        forward(data + rows.offset(i, logits), rows.V, rows.width, rows.label[i], transform, stats, result);
        const int64_t place = rows.index[i];
        out_logp[place] = A(result.logp);
        const auto write_norm = [&](NormPlane plane, double value) {
          out_norm[plane * logps.numel() + place] = A(value);
        };
        write_norm(kNormAnchor, result.anchor);
        write_norm(kNormInverse, 1 / result.sum);
        write_norm(kNormLogp, result.logp);
        const auto value = [&]<Statistic S>() { return statistic<S>(result, transform, rows.V); };
        if (stats & kEntropy) write_norm(kNormEntropy, value.template operator()<kEntropy>());
        write_statistics<kStatistics, A>(statistics, stats, place, value);
      }
    });
    if (reduced) {
      std::vector<double> sums(rows.n_sequences, 0);
      int32_t* count = counts.mutable_data_ptr<int32_t>();
      const Tensor weight = weights ? weights->to(dtype).contiguous() : Tensor();
      for (int64_t i = 0; i < rows.size(); ++i) {
        const double w = weights ? weight.const_data_ptr<A>()[rows.index[i]] : 1.0;
        if (w != 0) sums[rows.sequence[i]] += w * out_logp[rows.index[i]];  // 0 leaves out what may be -inf
        ++count[rows.sequence[i]];
      }
      for (int64_t s = 0; s < rows.n_sequences; ++s) {
        const double n = reduction == "mean" ? std::max(count[s], 1) : 1;
        sequences.mutable_data_ptr<A>()[s] = A(sums[s] / n);
      }
    }
  });
  return {logps, sequences, norm, counts, statistics};
}

}  // namespace
}  // namespace fastpref

TORCH_LIBRARY(fastpref_cpu, m) {
  m.def("logprobs", &fastpref::logprobs);
}
