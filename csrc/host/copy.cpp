#include "host/copy.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pipex {

#if defined(__x86_64__)

namespace {

// From here on a streaming store wins, since it does not read the lines that it overwrites. Measured with one core on a
// Xeon with 2 MiB of L2: 4 MiB 287 against 320 µs, 16 MiB 1.16 against 1.30 ms, 64 MiB 8.5 against 5.3 ms.
constexpr std::size_t kStreamFrom = 32u << 20;

__attribute__((target("avx2"))) void stream(std::byte* to, const std::byte* from, std::size_t bytes) {
  const std::size_t whole = bytes & ~std::size_t{63};
  for (std::size_t i = 0; i < whole; i += 64) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), high);
  }
  _mm_sfence();  // streaming stores are weakly ordered: the slot must be whole before it is announced
  std::memcpy(to + whole, from + whole, bytes - whole);
}

}  // namespace

void copy_message(std::byte* to, const std::byte* from, std::size_t bytes) {
  static const bool can_stream = __builtin_cpu_supports("avx2");
  if (can_stream && bytes >= kStreamFrom) {
    stream(to, from, bytes);
  } else {
    std::memcpy(to, from, bytes);
  }
}

#else

void copy_message(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

#endif

}  // namespace pipex
