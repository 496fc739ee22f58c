#include "cpu/parallel.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace po_kernels {

namespace {

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
  }
};

// Starts fn(data) on that many threads and waits for them: the entry point that compilers use for OpenMP.
using OpenMP = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};

// The OpenMP runtime that torch brought into the process, or null. Its threads wait for work at no cost in time, but
// go on waiting for a while after torch's own loops: a second set of threads would have to share processors with them.
// It does not survive a fork.
OpenMP openmp() {
  static const OpenMP found = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}

// Threads of our own, asleep between loops, for where there is no OpenMP.
class Pool {
 public:
  // False if another caller has the pool.
  bool run(Loop& loop, int helpers) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    for (; workers_ < helpers; ++workers_) std::thread([this] { work(); }).detach();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop;
      tickets_ = helpers;
    }
    wake_.notify_all();
    loop.run();
    std::unique_lock<std::mutex> lock(mutex_);
    tickets_ = 0;  // who has not begun is not waited for
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return tickets_ > 0; });
      --tickets_;
      ++active_;
      Loop* loop = loop_;
      lock.unlock();
      loop->run();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int workers_ = 0, tickets_ = 0, active_ = 0;
};

// Never destroyed: its threads live as long as the process. A forked child has none of them and leaves the
// parent's pool, whose locks may be held, behind.
Pool* pool = nullptr;
std::once_flag pool_once;

void make_pool() {
  pool = new Pool;
  pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    pool = new Pool;
  });
}

struct Memory {
  void* data = nullptr;
  size_t size = 0;
  ~Memory() { std::free(data); }
};

// For tests: memory that a kernel reads before it writes then shows.
bool poisoned() {
  static const bool set = std::getenv("PO_KERNELS_POISON") != nullptr;
  return set;
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
  Loop loop(count, body, context);
  const int64_t wanted = threads < count ? threads : count;
  if (wanted > 1) {
    std::call_once(pool_once, make_pool);
    if (const OpenMP parallel = openmp()) {
      parallel([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, static_cast<unsigned>(wanted), 0);
    } else if (!pool->run(loop, static_cast<int>(wanted) - 1)) {
      loop.run();
    }
  } else {
    loop.run();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

void* scratch(size_t bytes) {
  static thread_local Memory memory;
  if (memory.size < bytes) {
    std::free(memory.data);
    memory.size = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(64, rounded);
    if (memory.data == nullptr) throw std::bad_alloc();
    memory.size = rounded;
  }
  if (poisoned()) std::memset(memory.data, 0xff, bytes);  // all bits set: nan
  return memory.data;
}

}  // namespace po_kernels
