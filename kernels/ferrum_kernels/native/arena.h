// Scratch memory of one kernel call. It is kept for the next call, so that none pays for fresh pages.
#pragma once

#include <cstdint>
#include <vector>

namespace ferrum {

class Arena {
 public:
  Arena() : Arena(INT64_MAX) {}
  // For about this many bytes: of the memory kept, the smallest piece that will do.
  explicit Arena(int64_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised room for `count` values, aligned to 64 bytes, until the arena goes. Throws std::bad_alloc.
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  struct Piece {
    char* memory;
    int64_t size;
  };
  void* take_bytes(int64_t bytes);

  std::vector<Piece> pieces_;
  int64_t used_;  // of the last piece
};

}  // namespace ferrum
