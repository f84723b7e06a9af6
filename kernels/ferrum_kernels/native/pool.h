// Threads that share the units of one job with the caller, and sleep when there is none.
#pragma once

#include <cstdint>

namespace ferrum {

// Threads a job may use, the caller included: FERRUM_JAX_THREADS, else the processors this process may run on.
int pool_threads();

// Takes the pool for one call of a kernel. When another call has it, units run on the caller alone: two programs at
// once never wait for each other and never run more threads than there are processors for.
class Session {
 public:
  Session();
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  int threads() const;

  // Calls body(unit) for every unit in [0, units), in any order and on any thread of the pool; returns when all are
  // done. What a body throws, on whatever thread, is thrown here.
  template <typename Body>
  void run(int64_t units, const Body& body) {
    run_erased(units, [](const void* b, int64_t unit) { (*static_cast<const Body*>(b))(unit); }, &body);
  }

 private:
  void run_erased(int64_t units, void (*call)(const void*, int64_t), const void* body);
  bool mine_;
};

}  // namespace ferrum
