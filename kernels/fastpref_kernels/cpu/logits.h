// The scored rows of logits, and loops over their columns.
#pragma once

#include "lanes.h"
#include "rows.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

namespace fastpref {

// Columns handled at a time where a row is gone over twice or gathered: small enough to stay in the L1 cache.
constexpr int64_t kChunk = 2048;
// Bytes to prefetch ahead: the hardware's own prefetchers stop at the end of a 4 KiB page.
constexpr int64_t kAhead = 2048;

// The scored rows of logits (B, T, V).
struct Rows : ScoredRows {
  const at::Tensor& logits;
  int64_t V, width;  // width: stride of the vocabulary

  Rows(const at::Tensor& logits, const at::Tensor& labels, const std::optional<at::Tensor>& cu_seqlens,
       int64_t ignore_index, bool shift)
      : ScoredRows(labels, cu_seqlens, ignore_index, shift, logits.size(2)),
        logits(logits),
        V(logits.size(2)),
        width(logits.stride(2)) {}

  int64_t offset(int64_t row, const at::Tensor& like) const {
    return index[row] / per_batch * like.stride(0) + index[row] % per_batch * like.stride(1);
  }

  int64_t grain() const {
    return std::max<int64_t>(1, kGrain / V);
  }
};

// Return columns [begin, begin + n) of a row, contiguous: of the row itself, or their copy in `scratch`.
template <typename T>
inline const T* columns(const T* row, int64_t width, int64_t begin, int64_t n, T* scratch) {
  if (width == 1) return row + begin;
  for (int64_t j = 0; j < n; ++j) scratch[j] = row[(begin + j) * width];
  return scratch;
}

// Call f(pair) for n contiguous values, and `tail` for those left at the end, in a padded pair, with their number.
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

}  // namespace fastpref
