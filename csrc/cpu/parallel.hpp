// Loops of independent iterations on the threads of torch, where it uses OpenMP, and memory that each thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace po_kernels {

// Calls body(context, i) for i in [0, count) on up to `threads` threads, the caller's among them, and returns when
// all are done; on the caller's alone without OpenMP or in a forked child. Rethrows the first exception. Safe to call
// from several threads.
void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t count, int threads, Body&& body) {
  parallel_for(count, threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

// Memory aligned to 64, uninitialised.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { release(); }

  // At least so many bytes, until the next call. Throws std::bad_alloc.
  void* at_least(size_t bytes);
  void release();
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// At least `bytes` of memory aligned to 64, the calling thread's until its next call or the end of its loop. Throws
// std::bad_alloc.
void* scratch(size_t bytes);

}  // namespace po_kernels
