// bfloat16 matrix products that keep their float32 sums. They run by MKL on a processor with AMX, and by oneDNN's
// kernels on packed blocks on one that has only a bfloat16 dot product. A processor that can run both has both, so that
// each can be tested there; the faster one is used.
#include "bf16_gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#if defined(__AMX_BF16__) && defined(__linux__)
// Every libtorch_cpu that is built with MKL defines this function. In any other, it is null.
extern "C" __attribute__((weak)) void cblas_gemm_bf16bf16f32(int layout, int transpose_a, int transpose_b, int m, int n,
                                                             int k, float alpha, const void* a, int lda, const void* b,
                                                             int ldb, float beta, float* c, int ldc);
#define FASTPREF_BF16_MKL
#endif
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define FASTPREF_BF16_ONEDNN
#endif

namespace fastpref {
namespace {

using at::Tensor;
using c10::BFloat16;

// Return the step between the lines of x if they are contiguous and do not overlap. The lines are the rows (line = 0)
// or the columns (line = 1).
std::optional<int64_t> step_between(const Tensor& x, int64_t line) {
  const int64_t length = x.size(1 - line);
  // The stride of a dimension of size 1 has no meaning.
  const bool contiguous = length == 1 || x.stride(1 - line) == 1;
  const int64_t step = x.size(line) == 1 ? length : x.stride(line);
  return contiguous && step >= length ? std::optional(step) : std::nullopt;
}

#ifdef FASTPREF_BF16_MKL

constexpr int64_t kLargest = std::numeric_limits<int>::max();

// An operand as cblas takes it. If the leading dimension is shorter than a line, cblas refuses it, and says so only on
// stderr. So the layout and the leading dimension are decided together.
struct Operand {
  Tensor x;
  int layout, leading;

  explicit Operand(const Tensor& given) : x(given) {
    constexpr int kPlain = 111, kTransposed = 112;
    const auto rows = step_between(x, 0), columns = step_between(x, 1);
    if (rows && *rows <= kLargest) {
      layout = kPlain;
      leading = int(*rows);
    } else if (columns && *columns <= kLargest) {
      layout = kTransposed;
      leading = int(*columns);
    } else {
      x = x.clone(at::MemoryFormat::Contiguous);
      layout = kPlain;
      leading = int(x.size(1));
    }
  }
};

void multiply_by_mkl(const Tensor& out, const Tensor& left, const Tensor& right, bool add) {
  constexpr int kRowMajor = 101;
  const int64_t M = left.size(0), N = right.size(1), K = left.size(1), step = *step_between(out, 0);
  TORCH_CHECK(std::max({M, N, K, step}) <= kLargest, "MKL's sizes are 32-bit: out ", out.sizes(), " with strides ",
              out.strides(), " = left ", left.sizes(), " @ right ", right.sizes(), " exceeds them");
  const Operand a(left), b(right);
  cblas_gemm_bf16bf16f32(kRowMajor, a.layout, b.layout, int(M), int(N), int(K), 1.0f, a.x.const_data_ptr(), a.leading,
                         b.x.const_data_ptr(), b.leading, add ? 1.0f : 0.0f, out.mutable_data_ptr<float>(), int(step));
}

#endif

#ifdef FASTPREF_BF16_ONEDNN

// Rows and columns of one call: its packed columns stay in the L2 cache, whatever else passes through it.
constexpr int64_t kBlock = 64, kDepth = 1024;
// oneDNN's kernels reach the rows of a block by offsets of 32 bits, in bytes.
constexpr int64_t kLongestStep = std::numeric_limits<int32_t>::max() / int64_t(kBlock * sizeof(float));

struct Matrix {
  const BFloat16* data;
  int64_t rows, columns, by_row, by_column;

  explicit Matrix(const Tensor& x)
      : data(x.const_data_ptr<BFloat16>()), rows(x.size(0)), columns(x.size(1)), by_row(x.stride(0)),
        by_column(x.stride(1)) {}

  const BFloat16* at(int64_t i, int64_t j) const { return data + i * by_row + j * by_column; }
};

constexpr int64_t even(int64_t n) {
  return n + (n & 1);
}

// Copy x[i:i+m, j:j+k] row by row, with rows even(k) apart. If k is odd, fill the end with 0.
void copy_rows(const Matrix& x, int64_t i, int64_t m, int64_t j, int64_t k, BFloat16* to) {
  const int64_t width = even(k);
  if (x.by_row == 1) {
    for (int64_t row = 0; row < m; row += 32) {
      for (int64_t column = 0; column < k; column += 32) {
        at::vec::transpose_mxn<BFloat16>(x.at(i + row, j + column), x.by_column, to + row * width + column, width,
                                         int(std::min<int64_t>(32, k - column)), int(std::min<int64_t>(32, m - row)));
      }
    }
  } else {
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t column = 0; column < k; ++column) to[row * width + column] = *x.at(i + row, j + column);
    }
  }
  if (width > k) {
    for (int64_t row = 0; row < m; ++row) to[row * width + k] = BFloat16(0);
  }
}

// Pack x[i:i+k, j:j+n] as pairs of rows, with the two values of a column side by side, as a dot product of pairs needs.
void pack_pairs(const Matrix& x, int64_t i, int64_t k, int64_t j, int64_t n, BFloat16* to) {
  int64_t done = 0;
  if (x.by_row == 1 && x.by_column % 2 == 0 && reinterpret_cast<uintptr_t>(x.at(i, j)) % alignof(float) == 0) {
    // A pair is 4 bytes of one line, so the transposition moves floats.
    const auto* from = reinterpret_cast<const float*>(x.at(i, j));
    const int64_t pairs = k / 2, stride = x.by_column / 2;
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      for (int64_t column = 0; column < n; column += 16) {
        at::vec::transpose_mxn<float>(from + column * stride + pair, stride,
                                      reinterpret_cast<float*>(to) + pair * n + column, n,
                                      int(std::min<int64_t>(16, n - column)), int(std::min<int64_t>(16, pairs - pair)));
      }
    }
    done = 2 * pairs;
  } else if (x.by_column == 1) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; done + 2 <= k; done += 2) {
      const BFloat16 *first = x.at(i + done, j), *second = x.at(i + done + 1, j);
      BFloat16* row = to + done * n;
      int64_t column = 0;
      for (; column + 32 <= n; column += 32) {
        const __m512i a = _mm512_loadu_si512(first + column), b = _mm512_loadu_si512(second + column);
        _mm512_storeu_si512(row + 2 * column, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(row + 2 * column + 32, _mm512_permutex2var_epi16(a, high, b));
      }
      for (; column < n; ++column) {
        row[2 * column] = first[column];
        row[2 * column + 1] = second[column];
      }
    }
  }
  for (; done < k; done += 2) {
    for (int64_t column = 0; column < n; ++column) {
      to[done * n + 2 * column] = *x.at(i + done, j + column);
      to[done * n + 2 * column + 1] = done + 1 < k ? *x.at(i + done + 1, j + column) : BFloat16(0);
    }
  }
}

// oneDNN generates a kernel for each shape of a call once, so any number of rows is split into a few sizes.
template <typename F>
void row_blocks(int64_t rows, const F& body) {
  for (int64_t i = 0; i < rows;) {
    const int64_t m = std::min<int64_t>(kBlock, std::bit_floor(uint64_t(rows - i)));
    body(i, m);
    i += m;
  }
}

void multiply_by_onednn(const Tensor& out, const Tensor& left, const Tensor& right, bool add) {
  const Matrix a(left), b(right);
  const int64_t M = a.rows, N = b.columns, K = a.columns, step = *step_between(out, 0);
  float* c = out.mutable_data_ptr<float>();
  const auto blocks = [](int64_t n) { return (n + kBlock - 1) / kBlock; };
  const auto buffer = [](int64_t size) { return at::empty({size}, at::kBFloat16); };
  TORCH_CHECK(step <= kLongestStep, "rows of out must be no more than ", kLongestStep, " elements apart; got ", step);
  // oneDNN refuses rows that overlap, and rows that are too far apart.
  const auto left_step = step_between(left, 0);
  const bool is_usable = left_step && *left_step <= kLongestStep;
  const auto packed_rows = [&](int64_t i, int64_t m, int64_t from, int64_t depth, BFloat16* scratch) {
    const bool in_place = is_usable && depth % 2 == 0;
    if (!in_place) copy_rows(a, i, m, from, depth, scratch);
    return std::pair(in_place ? a.at(i, from) : scratch, in_place ? *left_step : even(depth));
  };
  const auto call = [&](int64_t i, int64_t m, int64_t j, int64_t n, int64_t from, int64_t depth,
                        std::pair<const BFloat16*, int64_t> rows, const BFloat16* columns) {
    at::native::cpublas::brgemm(m, n, even(depth), rows.second, n, step, add || from > 0, rows.first, columns,
                                c + i * step + j);
  };
  // Threads share out the longer side of the result. The operand of the other side is packed once.
  const bool by_columns = N >= M && is_usable && K % 2 == 0;
  if (by_columns) {
    at::parallel_for(0, blocks(N), 1, [&](int64_t begin, int64_t end) {
      const Tensor held = buffer(kBlock * kDepth);
      auto* columns = held.mutable_data_ptr<BFloat16>();
      for (int64_t j = begin * kBlock; j < std::min(N, end * kBlock); j += kBlock) {
        const int64_t n = std::min(kBlock, N - j);
        for (int64_t from = 0; from < K; from += kDepth) {
          const int64_t depth = std::min(kDepth, K - from);
          pack_pairs(b, from, depth, j, n, columns);
          row_blocks(M, [&](int64_t i, int64_t m) {
            call(i, m, j, n, from, depth, packed_rows(i, m, from, depth, nullptr), columns);
          });
        }
      }
      at::native::cpublas::brgemm_release();
    });
    return;
  }
  const Tensor packed = buffer(even(K) * N);
  auto* columns = packed.mutable_data_ptr<BFloat16>();
  // Block (from, j) follows all blocks of rows before it.
  const auto place = [&](int64_t from, int64_t depth, int64_t j) { return columns + from * N + even(depth) * j; };
  at::parallel_for(0, blocks(N), 1, [&](int64_t begin, int64_t end) {
    for (int64_t from = 0; from < K; from += kDepth) {
      const int64_t depth = std::min(kDepth, K - from);
      for (int64_t j = begin * kBlock; j < std::min(N, end * kBlock); j += kBlock) {
        pack_pairs(b, from, depth, j, std::min(kBlock, N - j), place(from, depth, j));
      }
    }
  });
  at::parallel_for(0, blocks(M), 1, [&](int64_t begin, int64_t end) {
    const Tensor held = buffer(kBlock * kDepth);
    auto* scratch = held.mutable_data_ptr<BFloat16>();
    const int64_t first = begin * kBlock;
    for (int64_t from = 0; from < K; from += kDepth) {
      const int64_t depth = std::min(kDepth, K - from);
      row_blocks(std::min(M, end * kBlock) - first, [&](int64_t i, int64_t m) {
        const auto rows = packed_rows(first + i, m, from, depth, scratch);
        for (int64_t j = 0; j < N; j += kBlock) {
          call(first + i, m, j, std::min(kBlock, N - j), from, depth, rows, place(from, depth, j));
        }
      });
    }
    at::native::cpublas::brgemm_release();
  });
}

#endif

struct Route {
  std::string name;
  void (*multiply)(const Tensor&, const Tensor&, const Tensor&, bool);
  bool (*is_fastest)();  // also faster than a float32 product of widened operands
};

// The routes that this processor can run, the fastest first.
const std::vector<Route>& routes() {
  static const std::vector<Route> found = [] {
    std::vector<Route> result;
#ifdef FASTPREF_BF16_MKL
    if (cblas_gemm_bf16bf16f32 != nullptr) result.push_back({"MKL", multiply_by_mkl, [] { return true; }});
#endif
#ifdef FASTPREF_BF16_ONEDNN
    // On Intel processors with the dot product and without AMX, it is half as fast as float32 products. PyTorch's
    // brgemm raises in a process that has switched oneDNN off.
    const auto is_fastest = [] { return !__builtin_cpu_is("intel") && at::globalContext().userEnabledMkldnn(); };
    result.push_back({"oneDNN", multiply_by_onednn, is_fastest});
#endif
    return result;
  }();
  return found;
}


std::vector<std::string> bf16_routes() {
  std::vector<std::string> names;
  for (const Route& route : routes()) names.push_back(route.name);
  return names;
}

const Route& route_named(const std::optional<std::string>& name) {
  if (!name) {
    TORCH_CHECK(has_bf16_gemm(), "this build has no bfloat16 product with float32 sums that is faster than float32's");
    return routes().front();
  }
  const auto found = std::find_if(routes().begin(), routes().end(), [&](const Route& r) { return r.name == *name; });
  TORCH_CHECK(found != routes().end(), "route must be one of ", bf16_routes(), " here; got ", *name);
  return *found;
}

void check_matrix(const char* name, const Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == dtype && x.device().is_cpu(), name, " must be a matrix of ", dtype,
              " on the CPU; got sizes ", x.sizes(), ", ", x.scalar_type(), " on ", x.device());
}


}  // namespace

bool has_bf16_gemm() {
  return !routes().empty() && routes().front().is_fastest();
}

void bf16_gemm(const Tensor& out, const Tensor& left, const Tensor& right, bool add,
               const std::optional<std::string>& name) {
  const Route& route = route_named(name);
  check_matrix("out", out, at::kFloat);
  check_matrix("left", left, at::kBFloat16);
  check_matrix("right", right, at::kBFloat16);
  TORCH_CHECK(left.size(1) == right.size(0) && out.size(0) == left.size(0) && out.size(1) == right.size(1),
              "out (M, N) = left (M, K) @ right (K, N); got out ", out.sizes(), ", left ", left.sizes(), ", right ",
              right.sizes());
  if (out.numel() == 0) return;
  TORCH_CHECK(step_between(out, 0), "out must have contiguous rows that do not overlap; got sizes ", out.sizes(),
              " with strides ", out.strides());
  if (left.size(1) == 0) {
    if (!add) out.zero_();
    return;
  }
  route.multiply(out, left, right, add);
}

}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("has_bf16_gemm() -> bool", &fastpref::has_bf16_gemm);
  m.def("bf16_routes() -> str[]", &fastpref::bf16_routes);
  m.def("bf16_gemm(Tensor(a!) out, Tensor left, Tensor right, bool add, str? route=None) -> ()", &fastpref::bf16_gemm);
}
