// Gradients that change their number type on the way into, or out of, an fp32 main gradient.
#pragma once

#include "cuda/kernels/numbers.hpp"

namespace pipex::cuda {

constexpr int kCastThreads = 256;

/// to += from, element by element. `vector` numbers the groups of `width` elements, of which the last may be cut short.
template <typename T, bool aligned>
struct AddToMain {
  static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));
  const T* from;
  float* to;
  Index count;

  PIPEX_BOTH void apply(Index vector) const {
    const Index at = vector * width, rest = count - at;
    if (aligned && rest >= width)
      accumulate<true>(load<width, true>(from + at, rest), to + at, rest);
    else
      accumulate<false>(load<width, false>(from + at, rest), to + at, rest);
  }
};

/// to = from in T's precision, rounded to nearest.
template <typename T, bool aligned>
struct CastFromMain {
  static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));
  const float* from;
  T* to;
  Index count;

  PIPEX_BOTH void apply(Index vector) const {
    const Index at = vector * width, rest = count - at;
    if (aligned && rest >= width)
      store<true>(load<width, true>(from + at, rest), to + at, rest);
    else
      store<false>(load<width, false>(from + at, rest), to + at, rest);
  }
};

PIPEX_BOTH Index vectors_of(Index count, int width) { return (count + width - 1) / width; }

}  // namespace pipex::cuda
