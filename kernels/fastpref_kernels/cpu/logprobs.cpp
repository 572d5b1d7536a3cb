// Log-probs of labels under logits, and the gradient of the logits, in one pass over the scored rows each.
//
// Forward, where no statistic is asked for, is anchored at the label: logp = -log1p(sum over j != y of exp(z_j - z_y)).
// The sum needs no maximum, so a row is read once, and a log-prob near 0 keeps its digits. A row whose other logits lie
// far above the label's, and every row with statistics other than lse, is anchored at its maximum instead, a chunk at a
// time.
//
// A row is always the work of one thread and summed in one order: its bits depend on nothing but itself.
#include "lanes.h"
#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace fastpref {
namespace {

using at::Tensor;

// Columns handled at a time where a row is gone over twice or gathered: small enough to stay in the L1 cache.
constexpr int64_t kChunk = 2048;
// Bytes to prefetch ahead: the hardware's own prefetchers stop at the end of a 4 KiB page.
constexpr int64_t kAhead = 2048;

// The scored rows of logits (B, T, V).
struct Rows : ScoredRows {
  const Tensor& logits;
  int64_t V, width;  // width: stride of the vocabulary

  Rows(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& cu_seqlens, int64_t ignore_index,
       bool shift)
      : ScoredRows(labels, cu_seqlens, ignore_index, shift, logits.size(2)),
        logits(logits),
        V(logits.size(2)),
        width(logits.stride(2)) {}

  int64_t offset(int64_t row, const Tensor& like) const {
    return index[row] / per_batch * like.stride(0) + index[row] % per_batch * like.stride(1);
  }

  int64_t grain() const {
    return std::max<int64_t>(1, kGrain / V);
  }
};

// Columns [begin, begin + n) of a row, contiguous: the row itself, or its gathered copy in `scratch`.
template <typename T>
inline const T* columns(const T* row, int64_t width, int64_t begin, int64_t n, T* scratch) {
  if (width == 1) return row + begin;
  for (int64_t j = 0; j < n; ++j) scratch[j] = row[(begin + j) * width];
  return scratch;
}

// f(pair) over n contiguous values; what is left at the end arrives in a padded pair, with its number of values.
template <typename T, typename F, typename Tail>
inline void for_each(const T* x, int64_t n, const F& f, const Tail& tail) {
  int64_t j = 0;
  for (; j + kStep<T> <= n; j += kStep<T>) {
    const char* ahead = reinterpret_cast<const char*>(x + j) + kAhead;
    __builtin_prefetch(ahead);
    if constexpr (sizeof(T) * kStep<T> > 64) __builtin_prefetch(ahead + 64);
    f(load_pair(x + j), j);
  }
  if (j < n) {
    T padded[kStep<T>] = {};
    std::copy(x + j, x + n, padded);
    tail(load_pair(padded), j, n - j);
  }
}

// The sum of exp(rate * (u(x_j) - anchor)) over n contiguous values.
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

template <typename A>
struct RowResult {
  A logp, anchor, inverse;  // softmax_j = exp(rate * (u_j - anchor)) * inverse
  A lse = 0, entropy = 0, mean = 0, log_sum_sq = 0;
  bool top1 = false;
};

// Anchored at the label. False where that would overflow, or the label is not finite: then from the maximum.
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
  if (!(s < kAnchorLimit)) return false;
  out.logp = A(-std::log1p(s));
  out.anchor = u_y;
  out.inverse = A(1 / (1 + s));
  out.lse = A(double(u_y) * t.rate + std::log1p(s));
  return true;
}

// Anchored at the running maximum of the chunks, with any statistics.
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
  double rest = 0, weighted = 0, squares = 0, total_u = 0;  // over j != y, of e, e * d, e * e; over all, of u
  const auto rescale = [&](double gap) {  // gap = rate * (old m - new m) <= 0
    const double f = std::exp(gap);
    // exp(d) d becomes f exp(d) (d + gap); where f is 0 so is the sum, whatever the gap.
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
    if (stats & kMean) {
      Vec sum_u(A(0));  // what pads the last vector is 0 here
      for (int64_t j = 0; j < n; j += Vec::size()) sum_u = sum_u + Vec::loadu(u + j);
      total_u += double(sum(sum_u));
    }
    const int64_t own = y - begin;
    const bool holds = own >= 0 && own < n;
    if (holds) u[own] = -inf;  // the label stays out of every sum, and adds its own terms at the end
    std::fill(u + n, u + n + kStep<A>, -inf);

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
  const double s = rest + e_y, log_s = std::log(s);
  const double logp = u_y == m ? -std::log1p(rest + 0 * d_y) : d_y - log_s;
  out.logp = A(logp);
  out.anchor = m;
  out.inverse = A(1 / s);
  out.lse = A(double(m) * t.rate + log_s);
  out.entropy = A(log_s - (weighted + (e_y == 0 ? 0 : e_y * d_y)) / s);
  out.mean = A(total_u * t.rate / double(V));
  out.log_sum_sq = A(std::log(squares + e_y * e_y) - 2 * log_s);
  out.top1 = above[0] < u_y && above[1] <= u_y;
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

// What a row's gradient is made of: dz_j = -p_j * (g + g_entropy * (log p_j + entropy)), and its own at the label.
template <typename A>
struct RowGradient {
  A anchor, inverse, logp, entropy, g, g_entropy;
};

template <bool Cap, bool Entropy, typename T>
void backward_row(const T* row, T* grad, int64_t V, int64_t width, int64_t grad_width, int64_t y, const Transform& t,
                  const RowGradient<acc_t<T>>& r) {
  using A = acc_t<T>;
  using Vec = Vectorized<A>;
  // Read before `grad` is written, which may be the same memory.
  const A u_y = u_of<Cap>(A(row[y * width]), t);
  const Vec rate{A(t.rate)}, shift{A(r.anchor * A(t.rate))};
  const Vec scale(Cap || Entropy ? -r.inverse : A(-r.g * r.inverse * t.rate)), g(r.g), g_entropy(r.g_entropy);
  const Vec surprise(std::log(r.inverse) + r.entropy), floor(A(-1e30));
  const auto gradient = [&](const Vec& x) {
    const Vec u = u_of<Cap>(x, t);
    const Vec d = at::vec::fmsub(u, rate, shift);
    if constexpr (Entropy) {
      const Vec clamped = at::vec::maximum(d, floor);
      const Vec weight = at::vec::fmadd(g_entropy, clamped + surprise, g);
      return exp<Range::kBounded>(clamped) * scale * weight * derivative<Cap>(u, t);
    } else if constexpr (Cap) {
      return exp<Range::kBounded>(d) * scale * g * derivative<Cap>(u, t);
    } else {
      return exp<Range::kBounded>(d) * scale;
    }
  };
  T in[kChunk], out[kChunk];
  for (int64_t begin = 0; begin < V; begin += kChunk) {
    const int64_t n = std::min(kChunk, V - begin);
    const T* x = columns(row, width, begin, n, in);
    T* to = grad_width == 1 ? grad + begin : out;
    for_each(
        x, n, [&](const Pair<A>& v, int64_t j) { store_pair(to + j, map(v, gradient)); },
        [&](const Pair<A>& v, int64_t j, int64_t left) {
          T padded[kStep<T>];
          store_pair(padded, map(v, gradient));
          std::copy(padded, padded + left, to + j);
        });
    if (grad_width != 1) {
      for (int64_t j = 0; j < n; ++j) grad[(begin + j) * grad_width] = out[j];
    }
  }
  A own = -r.g * std::expm1(r.logp);
  if (Entropy && r.logp != -std::numeric_limits<A>::infinity()) {
    own -= r.g_entropy * std::exp(r.logp) * (r.logp + r.entropy);
  }
  grad[y * grad_width] = T(own * derivative<Cap>(u_y, t));
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs logprobs(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& cu_seqlens,
                 const std::optional<Tensor>& weights, int64_t ignore_index, bool shift, double logit_scale,
                 double temperature, std::optional<double> softcap, std::string_view reduction, int64_t stats) {
  const Rows rows(logits, labels, cu_seqlens, ignore_index, shift);
  const Transform transform(logit_scale, temperature, softcap);
  const auto options = logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const std::vector<int64_t> shape{labels.size(0), rows.per_batch};
  const bool reduced = reduction != "none";
  const auto statistic = [&](Statistic bit, at::ScalarType dtype) {
    return stats & bit ? at::zeros(shape, options.dtype(dtype)) : at::empty({0}, options.dtype(dtype));
  };
  const auto dtype = options.dtype().toScalarType();
  const Tensor logps = at::zeros(shape, options);
  const Tensor norm = at::zeros({stats & kEntropy ? 4 : 3, shape[0], shape[1]}, options);
  const Tensor lse = statistic(kLse, dtype), entropy = statistic(kEntropy, dtype), mean = statistic(kMean, dtype),
               top1 = statistic(kTop1, at::kBool), log_sum_sq = statistic(kLogSumSq, dtype);
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
        out_logp[place] = result.logp;
        out_norm[place] = result.anchor;
        out_norm[logps.numel() + place] = result.inverse;
        out_norm[2 * logps.numel() + place] = result.logp;
        if (stats & kEntropy) out_norm[3 * logps.numel() + place] = result.entropy;
        if (stats & kLse) lse.mutable_data_ptr<A>()[place] = result.lse;
        if (stats & kEntropy) entropy.mutable_data_ptr<A>()[place] = result.entropy;
        if (stats & kMean) mean.mutable_data_ptr<A>()[place] = result.mean;
        if (stats & kTop1) top1.mutable_data_ptr<bool>()[place] = result.top1;
        if (stats & kLogSumSq) log_sum_sq.mutable_data_ptr<A>()[place] = result.log_sum_sq;
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
  return {logps, sequences, norm, counts, lse, entropy, mean, top1, log_sum_sq};
}

// Writes the gradient of logits to `out`, which may be the logits themselves.
void write_gradient(const Tensor& out, const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_entropy,
                    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& cu_seqlens,
                    const std::optional<Tensor>& weights, const Tensor& norm, const Tensor& counts, int64_t ignore_index,
                    bool shift, double logit_scale, double temperature, std::optional<double> softcap,
                    std::string_view reduction) {
  const Rows rows(logits, labels, cu_seqlens, ignore_index, shift);
  const Transform transform(logit_scale, temperature, softcap);
  const bool reduced = reduction != "none";
  // These are (B, T') or (S,), and may be expanded: made contiguous, unlike the logits.
  const Tensor g = grad ? grad->contiguous() : Tensor(), gh = grad_entropy ? grad_entropy->contiguous() : Tensor();
  const Tensor weight = weights ? weights->to(norm.scalar_type()).contiguous() : Tensor(), saved = norm.contiguous(),
               count = counts.contiguous();
  const int64_t plane = norm.size(1) * norm.size(2);

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "fastpref::write_gradient", [&] {
    using A = acc_t<scalar_t>;
    const scalar_t* data = logits.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    const auto plain = gh.defined() ? &backward_row<false, true, scalar_t> : &backward_row<false, false, scalar_t>;
    const auto capped = gh.defined() ? &backward_row<true, true, scalar_t> : &backward_row<true, false, scalar_t>;
    const auto backward = softcap ? capped : plain;
    at::parallel_for(0, rows.size(), rows.grain(), [&](int64_t begin, int64_t end) {
      // Last row first: what the forward read last is what may still be in the cache.
      for (int64_t i = end - 1; i >= begin; --i) {
        const int64_t place = rows.index[i], s = rows.sequence[i];
        RowGradient<A> r{};
        const A* of_row = saved.const_data_ptr<A>() + place;
        r.anchor = of_row[0], r.inverse = of_row[plane], r.logp = of_row[2 * plane];
        if (g.defined()) {
          r.g = g.const_data_ptr<A>()[reduced ? s : place];
          if (weight.defined()) r.g *= weight.const_data_ptr<A>()[place];
          if (reduction == "mean") r.g /= A(std::max(count.const_data_ptr<int32_t>()[s], 1));
        }
        if (gh.defined()) {
          r.g_entropy = gh.const_data_ptr<A>()[place];
          r.entropy = of_row[3 * plane];
        }
        backward(data + rows.offset(i, logits), to + rows.offset(i, out), rows.V, rows.width, out.stride(2),
                 rows.label[i], transform, r);
      }
    });
    const int64_t T = labels.size(1);
    at::parallel_for(0, rows.blank.size(), rows.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        scalar_t* row = to + rows.blank[i] / T * out.stride(0) + rows.blank[i] % T * out.stride(1);
        if (out.stride(2) == 1) {
          std::fill(row, row + rows.V, scalar_t(0));
        } else {
          for (int64_t j = 0; j < rows.V; ++j) row[j * out.stride(2)] = scalar_t(0);
        }
      }
    });
  });
}

}  // namespace
}  // namespace fastpref

TORCH_LIBRARY(fastpref_cpu, m) {
  m.def("logprobs", &fastpref::logprobs);
  m.def("write_gradient", &fastpref::write_gradient);
}
