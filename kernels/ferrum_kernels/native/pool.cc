#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ferrum {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  int found = static_cast<int>(std::thread::hardware_concurrency());
  return found > 0 ? found : 1;
}

int wanted_threads() {
  const char* text = std::getenv("FERRUM_JAX_THREADS");
  int wanted = text ? std::atoi(text) : 0;
  return wanted > 0 ? wanted : processors();
}

// A worker looks for the next job this long before it sleeps: longer than the gap between two kernels of a decode
// step, shorter than anyone would notice on an idle machine.
constexpr auto kPatience = std::chrono::microseconds(200);

class Pool {
 public:
  explicit Pool(int threads) : process_(getpid()) {
    try {
      for (; threads_ < threads; threads_++) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those that there are do the work.
    }
  }

  int threads() const { return threads_; }

  // A child of fork has no workers.
  bool take() { return process_ == getpid() && owner_.try_lock(); }
  void give() { owner_.unlock(); }

  void run(int64_t units, void (*call)(const void*, int64_t), const void* body) {
    call_ = call, body_ = body, units_ = units;
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    epoch_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    drain();
    // Workers that have not come by now are not waited for: they find the job closed.
    open_.store(false);
    for (int spins = 0; inside_.load() != 0; spins++) {
      if (spins < 4096) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
  }

 private:
  void drain() {
    try {
      for (int64_t unit; (unit = next_.fetch_add(1, std::memory_order_relaxed)) < units_;) call_(body_, unit);
    } catch (...) {
      // The caller gets what was thrown first, and no unit is begun any more.
      next_.store(units_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(throwing_);
      if (!thrown_) thrown_ = std::current_exception();
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      seen = wait_for_job(seen);
      inside_.fetch_add(1);
      if (open_.load()) drain();
      inside_.fetch_sub(1);
    }
  }

  uint64_t wait_for_job(uint64_t seen) {
    auto until = std::chrono::steady_clock::now() + kPatience;
    for (int spins = 1;; spins++) {
      uint64_t now = epoch_.load();
      if (now != seen) return now;
      pause();
      if (spins % 32 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return epoch_.load() != seen; });
    asleep_.fetch_sub(1);
    return epoch_.load();
  }

  int threads_ = 1;
  const pid_t process_;
  std::mutex owner_;

  void (*call_)(const void*, int64_t) = nullptr;
  const void* body_ = nullptr;
  int64_t units_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> epoch_{0};
  std::atomic<bool> open_{false};
  alignas(64) std::atomic<int> inside_{0};

  std::mutex throwing_;
  std::exception_ptr thrown_;

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
};

// Never destroyed: its threads may outlive every static object of the process.
Pool& pool() {
  static Pool* const one = new Pool(wanted_threads());
  return *one;
}

}  // namespace

int pool_threads() { return pool().threads(); }

Session::Session() : mine_(pool().threads() > 1 && pool().take()) {}

Session::~Session() {
  if (mine_) pool().give();
}

int Session::threads() const { return mine_ ? pool().threads() : 1; }

void Session::run_erased(int64_t units, void (*call)(const void*, int64_t), const void* body) {
  if (mine_ && units > 1) {
    pool().run(units, call, body);
  } else {
    for (int64_t unit = 0; unit < units; unit++) call(body, unit);
  }
}

}  // namespace ferrum
