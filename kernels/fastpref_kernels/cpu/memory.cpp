// Large memory that outlives a call: gradients, and what a backward needs from its forward.
//
// A training loop frees and allocates the same few blocks at every step. If they went back to the operating system each
// time, they would return as zeroed pages, with a page fault for each. The faults cost as much as the arithmetic on the
// pages, and several times as much in a virtual machine that hands its free memory back to the host. So freed blocks
// are kept for the next step, up to a limit. Beyond it, the block that has been unused for the longest is given back
// first.
#include "memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/Allocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <optional>

namespace fastpref {
namespace {

constexpr size_t kPage = 2 << 20;     // a huge page
constexpr size_t kLarge = 2 * kPage;  // smaller blocks are malloc's, which keeps those itself

struct Block {
  void* data;
  size_t bytes;
};

class Pool final : public c10::Allocator {
 public:
  // The pool is never destroyed, because tensors may be freed after all static objects.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t wanted = (bytes + kPage - 1) / kPage * kPage;
    Block block = take(wanted);
    if (!block.data) {
      block = {std::aligned_alloc(kPage, wanted), wanted};
      TORCH_CHECK_WITH(OutOfMemoryError, block.data, "fastpref: no memory for ", wanted, " bytes");
#ifdef MADV_HUGEPAGE
      // If the system refuses, the pages are small, which only costs time.
      (void)madvise(block.data, wanted, MADV_HUGEPAGE);
#endif
    }
    return {block.data, new Block(block), &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  // Give back all blocks that are kept, and from now on keep no more than `limit` bytes.
  void clear(std::optional<size_t> limit) {
    std::list<Block> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      limit_ = limit.value_or(limit_);
      held_ = 0;
      dropped.swap(kept_);
    }
    free_all(dropped);
  }

  size_t held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

 private:
  Pool() {
    // A forked child must not find the lock held by a thread that the child does not have.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
  }

  // Return the smallest block that is not much too large, or none.
  Block take(size_t wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->bytes >= wanted && it->bytes <= wanted + wanted / 4;
      if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best == kept_.end()) return {nullptr, 0};
    const Block block = *best;
    held_ -= block.bytes;
    kept_.erase(best);
    return block;
  }

  static void release(void* context) {
    Block* block = static_cast<Block*>(context);
    Pool& pool = get();
    std::list<Block> dropped;
    {
      const std::lock_guard<std::mutex> lock(pool.mutex_);
      if (block->bytes > pool.limit_) {
        dropped.push_front(*block);  // dropped alone, so that it pushes no other block out
      } else {
        pool.kept_.push_front(*block);
        pool.held_ += block->bytes;
      }
      while (pool.held_ > pool.limit_) {
        pool.held_ -= pool.kept_.back().bytes;
        dropped.splice(dropped.end(), pool.kept_, std::prev(pool.kept_.end()));
      }
    }
    delete block;
    free_all(dropped);
  }

  static void free_all(const std::list<Block>& blocks) {
    for (const Block& block : blocks) std::free(block.data);
  }

  std::mutex mutex_;
  std::list<Block> kept_;  // the latest first
  size_t held_ = 0, limit_ = size_t(1) << 30;
};

thread_local std::array<at::Tensor, size_t(Scratch::kCount)> kept_scratch;

}  // namespace

at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(size) * c10::elementSize(dtype);
  if (bytes < kLarge) return at::empty(size, at::TensorOptions().dtype(dtype));
  at::Tensor out = at::detail::empty_generic(size, &Pool::get(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                             std::nullopt);
  // Fill the memory if a test asks for it, as at::empty does: all bits set are NaN in every floating type.
  if (at::globalContext().deterministicAlgorithms() && at::globalContext().deterministicFillUninitializedMemory()) {
    std::memset(out.mutable_data_ptr(), 0xff, bytes);
  }
  return out;
}

at::Tensor scratch(Scratch name, at::IntArrayRef size, at::ScalarType dtype) {
  at::Tensor& held = kept_scratch[size_t(name)];
  const int64_t bytes = c10::multiply_integers(size) * int64_t(c10::elementSize(dtype));
  if (!held.defined() || held.numel() < bytes) {
    held.reset();
    held = empty({bytes}, at::kByte);
  }
  return at::from_blob(held.mutable_data_ptr(), size, at::TensorOptions().dtype(dtype));
}

void release_memory(std::optional<int64_t> limit) {
  kept_scratch.fill(at::Tensor());
  Pool::get().clear(limit);
}

}  // namespace fastpref

TORCH_LIBRARY_FRAGMENT(fastpref_cpu, m) {
  m.def("empty(int[] size, ScalarType dtype) -> Tensor", &fastpref::empty);
  m.def("release_memory(int? limit) -> ()", &fastpref::release_memory);
  m.def("kept_memory() -> int", [] { return int64_t(fastpref::Pool::get().held()); });
}
