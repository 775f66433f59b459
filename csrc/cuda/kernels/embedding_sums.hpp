// The gradient of an embedding table: row `id` gets the sum of the output gradients of all tokens with that id. The
// caller sorts the ids, so equal ones are neighbours and every sum is made by one thread in one order, without atomics.
//
//   ids     3 3 3 5 | 5 5 5 5 | 5 8 9 9       windows of kWindow positions, one block each (here 4)
//   pass 1  └─3─┘ E₁   └─E₀─┘   E₀ 8 └9┘      runs inside a window go to the gradient at once; what a border cuts
//   pass 2        └── 5 = E₁ + E₀ + E₀ ──     is kept as the window's left (E₀) or right (E₁) edge, and is summed by
//                                             the block in whose window the run begins
//
// So a frequent token costs no more than a rare one. Both passes are plain functions of the thread's number.
#pragma once

#include "cuda/kernels/parts.hpp"

namespace pipex::cuda {

constexpr Index kWindow = 32;  // edges are then 1/16 (fp32) or 1/8 (16 bits) of what was read
constexpr int kEmbeddingThreads = 128;
constexpr int kRowsUnderWay = 4;  // loaded before the first of them is added

PIPEX_BOTH Index windows_of(Index count) { return (count + kWindow - 1) / kWindow; }

template <typename T_, typename Out, bool aligned>
struct EmbeddingSums {
  using T = T_;
  static constexpr int width = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int tile = kEmbeddingThreads * width;  // columns per block

  Parts gradients;     // of the outputs, one row per token
  Index columns;       // width of the table
  const Index* ids;    // sorted
  const Index* order;  // order[i] is the row of `gradients` that belongs to ids[i]
  Index count;         // of tokens
  Out* table;          // the gradient that is added to
  Index vocabulary;    // its rows
  Index padding;       // an id that gets no gradient, or -1
  float* edges;        // [windows][left, right][columns]

  PIPEX_BOTH void sum_window(Index window, Index tile_number, int thread) const {
    const Index column = tile_number * tile + static_cast<Index>(thread) * width;
    if (column >= columns) return;
    const Index begin = window * kWindow, end = end_of(window);
    Index start = begin;  // of the run under way
    Floats<width> sum;
    sum.clear();
    for (Index first = begin; first < end; first += kRowsUnderWay) {
      Vector<T, width> rows[kRowsUnderWay];
      PIPEX_UNROLL
      for (int i = 0; i < kRowsUnderWay; ++i)
        if (first + i < end)
          rows[i] = read<width, aligned>(gradients.row<T>(order[first + i], columns) + column, columns - column);
      PIPEX_UNROLL
      for (int i = 0; i < kRowsUnderWay; ++i) {
        const Index at = first + i;
        if (at >= end) break;
        sum.add(to_floats(rows[i]));
        if (at + 1 < end && ids[at + 1] == ids[at]) continue;
        finish_run(sum, window, start, at + 1, column);
        sum.clear();
        start = at + 1;
      }
    }
  }

  PIPEX_BOTH void join_edges(Index window, Index tile_number, int thread) const {
    const Index column = tile_number * tile + static_cast<Index>(thread) * width;
    const Index begin = window * kWindow, end = end_of(window);
    if (column >= columns || !cut_at(end) || (ids[begin] == ids[end] && cut_at(begin))) return;
    const Index last = (end_of_run(end) - 1) / kWindow;
    Floats<width> sum = load<width, aligned>(edge(window, 1) + column, columns - column);
    PIPEX_UNROLL_BY_4
    for (Index next = window + 1; next <= last; ++next)
      sum.add(load<width, aligned>(edge(next, 0) + column, columns - column));
    add_to_table(sum, ids[end], column);
  }

 private:
  PIPEX_BOTH Index end_of(Index window) const {
    const Index end = (window + 1) * kWindow;
    return end < count ? end : count;
  }

  /// Whether the border before position `at` cuts a run.
  PIPEX_BOTH bool cut_at(Index at) const { return at > 0 && at < count && ids[at - 1] == ids[at]; }

  /// The first position after `at` with another id.
  PIPEX_BOTH Index end_of_run(Index at) const {
    Index low = at + 1, high = count;
    while (low < high) {
      const Index middle = low + (high - low) / 2;
      if (ids[middle] == ids[at])
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  PIPEX_BOTH float* edge(Index window, int side) const { return edges + (2 * window + side) * columns; }

  PIPEX_BOTH void finish_run(const Floats<width>& sum, Index window, Index start, Index stop, Index column) const {
    if (start == window * kWindow && cut_at(start))
      store<aligned>(sum, edge(window, 0) + column, columns - column);
    else if (stop == end_of(window) && cut_at(stop))
      store<aligned>(sum, edge(window, 1) + column, columns - column);
    else
      add_to_table(sum, ids[start], column);
  }

  /// An id outside the table would be written somewhere else; the forward has refused it already.
  PIPEX_BOTH void add_to_table(const Floats<width>& sum, Index id, Index column) const {
    if (id < 0 || id >= vocabulary || id == padding) return;
    accumulate<aligned>(sum, table + id * columns + column, columns - column);
  }
};

}  // namespace pipex::cuda
