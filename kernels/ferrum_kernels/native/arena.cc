#include "arena.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

namespace ferrum {
namespace {

constexpr int64_t kLeast = 1 << 20;

struct Free {
  char* memory;
  int64_t size;
};

std::mutex lock;

// What no call uses: one piece for each call that ran at the same time. Never destroyed: calls may outlive statics.
std::vector<Free>& free_pieces() {
  static auto* const pieces = new std::vector<Free>;
  return *pieces;
}

}  // namespace

Arena::Arena(int64_t bytes) : used_(0) {
  std::lock_guard<std::mutex> guard(lock);
  auto& free = free_pieces();
  if (free.empty()) return;
  auto best = std::min_element(free.begin(), free.end(), [bytes](const Free& a, const Free& b) {
    bool a_does = a.size >= bytes, b_does = b.size >= bytes;
    return a_does && b_does ? a.size < b.size : a_does != b_does ? a_does : a.size > b.size;
  });
  pieces_.push_back({best->memory, best->size});
  free.erase(best);
}

Arena::~Arena() {
  if (pieces_.empty()) return;
  // Each piece is twice as large as the one before: the last will do for the next call of this size, or nearly.
  Piece keep = pieces_.back();
  pieces_.pop_back();
  for (const Piece& piece : pieces_) std::free(piece.memory);
  std::lock_guard<std::mutex> guard(lock);
  free_pieces().push_back({keep.memory, keep.size});
}

void* Arena::take_bytes(int64_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  if (pieces_.empty() || used_ + bytes > pieces_.back().size) {
    int64_t size = std::max(kLeast, bytes);
    if (!pieces_.empty()) size = std::max(size, 2 * pieces_.back().size);
    size = (size + 4095) / 4096 * 4096;
    void* memory = std::aligned_alloc(4096, static_cast<size_t>(size));
    if (!memory) throw std::bad_alloc();
    pieces_.push_back({static_cast<char*>(memory), size});
    used_ = 0;
  }
  char* at = pieces_.back().memory + used_;
  used_ += bytes;
  return at;
}

}  // namespace ferrum
