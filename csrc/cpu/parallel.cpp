#include "cpu/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>

#if defined(__SANITIZE_THREAD__)
// How threads of OpenMP begin and end, which ThreadSanitizer cannot see in a runtime that is not built with it.
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
#define __tsan_acquire(address) (void)0
#define __tsan_release(address) (void)0
#endif

namespace po_kernels {

namespace {

// Of a thread. What a call of usual size needs stays for the next; more would stay for nothing, and for ever.
thread_local Workspace memory;
constexpr size_t kKept = size_t(16) << 20;

struct Loop {
  Loop(int64_t count, void (*body)(void*, int64_t), void* context) : count(count), body(body), context(context) {}

  int64_t count;
  void (*body)(void*, int64_t);
  void* context;
  std::atomic<int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void run() {
    try {
      for (int64_t i = next++; i < count; i = next++) body(context, i);
    } catch (...) {
      next = count;
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    if (memory.size() > kKept) memory.release();
  }
};

// Starts fn(data) on that many threads and waits for them: the entry point that compilers use for OpenMP.
using OpenMP = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// It does not survive a fork: a child that enters it waits forever for threads that the parent has.
std::atomic<bool> forked{false};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// The OpenMP runtime that torch brought into the process, or null. Its threads wait for work at no cost in time, but
// go on waiting for a while after torch's own loops: a second set of threads would have to share processors with them.
OpenMP openmp() {
  static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked || watching_forks != 0 ? nullptr : found;
}

// For tests: memory that a kernel reads before it writes then shows.
bool poisoned() {
  static const bool set = std::getenv("PO_KERNELS_POISON") != nullptr;
  return set;
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
  Loop loop(count, body, context);
  const int64_t wanted = threads < count ? threads : count;
  const OpenMP parallel = wanted > 1 ? openmp() : nullptr;
  if (parallel != nullptr) {
    __tsan_release(&loop);
    const auto run = [](void* data) {
      __tsan_acquire(data);
      static_cast<Loop*>(data)->run();
      __tsan_release(data);
    };
    parallel(run, &loop, static_cast<unsigned>(wanted), 0);
    __tsan_acquire(&loop);
  } else {
    loop.run();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

void* Workspace::at_least(size_t bytes) {
  if (size_ < bytes) {
    release();
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    data_ = std::aligned_alloc(64, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  if (poisoned()) std::memset(data_, 0xff, bytes);  // all bits set: nan
  return data_;
}

void Workspace::release() {
  std::free(data_);
  data_ = nullptr;
  size_ = 0;
}

void* scratch(size_t bytes) {
  return memory.at_least(bytes);
}

}  // namespace po_kernels
