// What the handlers share: buffers of any float type, weights of a stack, errors as sentences.
#pragma once

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace ferrum {

namespace ffi = xla::ffi;

// A stack [L, E, ...] of packed matrices with leading axes flattened, as PackedLinear's arrays give it.
struct Stack {
  ffi::Buffer<ffi::U32> words;
  ffi::Buffer<ffi::F16> scales;
  ffi::Buffer<ffi::U32> zeros;  // no elements: symmetric
  ffi::Buffer<ffi::S32> perm;   // no elements: inputs in order
  int64_t k, n, group;
  int bits;

  int64_t matrices() const {
    int64_t size = matrix(0).word_rows() * n;
    return size ? static_cast<int64_t>(words.element_count()) / size : 0;
  }
  Packed matrix(int64_t i) const {
    Packed w{words.typed_data(), reinterpret_cast<const uint16_t*>(scales.typed_data()), nullptr, k, n, group, bits};
    int64_t groups = (k + group - 1) / group;
    w.words += i * w.word_rows() * n;
    w.scales += i * groups * n;
    if (zeros.element_count()) w.zeros = zeros.typed_data() + i * groups * w.zero_words();
    return w;
  }
  const int32_t* order(int64_t i) const { return perm.element_count() ? perm.typed_data() + i * k : nullptr; }
};

inline bool float_type(ffi::DataType type, Float* out) {
  if (type == ffi::DataType::F32) *out = Float::f32;
  else if (type == ffi::DataType::BF16) *out = Float::bf16;
  else if (type == ffi::DataType::F16) *out = Float::f16;
  else return false;
  return true;
}

inline int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

inline const void* at(const void* x, Float type, int64_t i) { return static_cast<const char*>(x) + i * size_of(type); }
inline void* at(void* x, Float type, int64_t i) { return static_cast<char*>(x) + i * size_of(type); }

// Runs a handler's body with the instruction set in use; what it throws becomes an error of XLA.
template <typename Body>
ffi::Error guarded(const Body& body) {
  const Isa* isa = chosen_isa();
  if (!isa) return ffi::Error(ffi::ErrorCode::kFailedPrecondition, "FERRUM_JAX_CPU_ISA names what this CPU has not");
  try {
    body(*isa);
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string("a CPU kernel of ferrum_jax failed: ") + error.what());
  }
  return ffi::Error::Success();
}

// A handler that Python can find in the library.
#define FERRUM_HANDLER(name, function, ...)                                                           \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame* call_frame); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, __VA_ARGS__)

inline void require(bool true_, const char* sentence) {
  if (!true_) throw std::runtime_error(sentence);
}

}  // namespace ferrum
