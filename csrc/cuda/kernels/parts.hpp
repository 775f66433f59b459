// The tensors of several micro-batches, taken as one tall matrix without being copied together.
#pragma once

#include "cuda/kernels/numbers.hpp"

namespace pipex::cuda {

constexpr int kMaxParts = 128;  // the struct travels as a kernel parameter, of which 4 KiB work everywhere

/// Row-major matrices of the same width, one per micro-batch, in rising order.
struct Parts {
  const void* data[kMaxParts];
  Index begin[kMaxParts + 1];  // the part's first row in the whole; then the number of all rows
  int count;

  PIPEX_BOTH Index rows() const { return begin[count]; }

  /// The part that holds row `row` of the whole (empty parts hold none).
  PIPEX_BOTH int find(Index row) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (begin[middle] <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }

  template <typename T>
  PIPEX_BOTH const T* row(Index row, Index columns) const {
    const int part = find(row);
    return static_cast<const T*>(data[part]) + (row - begin[part]) * columns;
  }
};
static_assert(sizeof(Parts) < 3 * 1024, "leaves room for a kernel's other parameters");

}  // namespace pipex::cuda
