// Sums over the rows of a tall matrix, in an order that depends on nothing but its shape.
//
//   column →      tile 0    tile 1 …       A block takes one chunk of rows and one tile of columns:
//   chunk 0      ┌────────┬────────┐
//                │ lane 0 │        │       1. gather: thread (lane l, place p) sums rows l, l + lanes, … of the chunk
//                │ lane 1 │        │          in its `width` columns;
//   chunk 1      ├────────┼────────┤       2. finish: one thread per column adds the lanes in rising order and hands
//                │        │        │          the sum on: to a row of partial sums, or to the gradient.
//
// Both phases are plain functions of the thread's number, so that a test can run them on the CPU.
#pragma once

#include "cuda/kernels/parts.hpp"

namespace pipex::cuda {

constexpr int kPlaces = 32;  // threads along a row: one warp, so that a load covers neighbouring addresses

/// Sum of rows begin + lane, begin + lane + lanes, … before `end`, for `width` columns from `column` on.
template <int width, bool aligned, typename T>
PIPEX_BOTH Floats<width> sum_rows(const Parts& parts, Index columns, Index column, Index begin, Index end, int lane,
                                  int lanes) {
  Floats<width> sum;
  sum.clear();
  Index row = begin + lane;
  for (int part = parts.find(begin); row < end; ++part) {
    const Index stop = end < parts.begin[part + 1] ? end : parts.begin[part + 1];
    const T* const first = static_cast<const T*>(parts.data[part]) + column;
    PIPEX_UNROLL_BY_4
    for (; row < stop; row += lanes)
      sum.add(load<width, aligned>(first + (row - parts.begin[part]) * columns, columns - column));
  }
  return sum;
}

/// Where a block's sums go: one row of partial sums per chunk.
struct PartialSums {
  float* to;

  PIPEX_BOTH void take(float sum, Index chunk, Index column, Index columns) const {
    to[chunk * columns + column] = sum;
  }
};

/// Where a block's sums go if there is one chunk only: added to the gradient, rounded once.
template <typename T>
struct Gradient {
  T* to;

  PIPEX_BOTH void take(float sum, Index, Index column, Index) const {
    to[column] = from_float<T>(to_float(to[column]) + sum);
  }
};

template <typename T_, typename Sink_, int width_, int lanes_, bool aligned_>
struct ColumnSums {
  using T = T_;
  using Sink = Sink_;
  static constexpr int width = width_, lanes = lanes_;
  static constexpr int threads = kPlaces * lanes;
  static constexpr int tile = kPlaces * width;  // columns per block

  Parts parts;
  Index columns, chunk_rows;
  Sink sink;

  /// `lane_sums` has lanes × tile members, shared by the block.
  PIPEX_BOTH void gather(Index chunk, Index tile_number, int thread, float* lane_sums) const {
    const int lane = thread / kPlaces, place = thread % kPlaces;
    const Index column = tile_number * tile + place * width;
    Floats<width> sum;
    sum.clear();
    if (column < columns) {
      const Index begin = chunk * chunk_rows;
      const Index end = begin + chunk_rows < parts.rows() ? begin + chunk_rows : parts.rows();
      sum = sum_rows<width, aligned_, T>(parts, columns, column, begin, end, lane, lanes);
    }
    PIPEX_UNROLL
    for (int i = 0; i < width; ++i) lane_sums[lane * tile + place * width + i] = sum.at[i];
  }

  PIPEX_BOTH void finish(Index chunk, Index tile_number, int thread, const float* lane_sums) const {
    const Index column = tile_number * tile + thread;
    if (thread >= tile || column >= columns) return;
    float sum = lane_sums[thread];
    PIPEX_UNROLL
    for (int lane = 1; lane < lanes; ++lane) sum += lane_sums[lane * tile + thread];
    sink.take(sum, chunk, column, columns);
  }
};

/// First pass over gradients of outputs: 128 rows per block, so that even one micro-batch of 2048 tokens and 4096
/// columns fills a GPU; the partial sums are then 1/64 (fp32) or 1/32 (16 bits) of what was read.
constexpr Index kChunkRows = 128;
template <typename T, bool aligned>
using ChunkSums = ColumnSums<T, PartialSums, kVectorBytes / static_cast<int>(sizeof(T)), 8, aligned>;
static_assert(ChunkSums<float, true>::threads >= ChunkSums<float, true>::tile, "finish has a thread per column");
static_assert(ChunkSums<__half, true>::threads >= ChunkSums<__half, true>::tile, "finish has a thread per column");

/// Pass over rows of partial sums: few rows, so few columns per block and many lanes (with 32, ptxas spills).
template <typename T>
using PartialRowSums = ColumnSums<float, Gradient<T>, 1, 16, false>;

PIPEX_BOTH Index chunks_of(Index rows) { return (rows + kChunkRows - 1) / kChunkRows; }

}  // namespace pipex::cuda
