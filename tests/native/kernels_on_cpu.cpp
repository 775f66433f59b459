// The kernels of csrc/cuda/kernels with blocks and threads as loops: the same arithmetic and indexing, on the CPU.
// Threads run in falling order within a phase; nothing may depend on that.
#include <cstdint>
#include <vector>

#include "cuda/kernels/casts.hpp"
#include "cuda/kernels/column_sums.hpp"
#include "cuda/kernels/dispatch.hpp"
#include "cuda/kernels/embedding_sums.hpp"
#include "cuda/kernels/requirements.hpp"

using namespace pipex::cuda;

namespace {

template <typename Body>
void for_grid(Index blocks, Index blocks_across, Body&& body) {
  for (Index y = blocks_across; y-- > 0;)
    for (Index x = blocks; x-- > 0;) body(x, y);
}

template <typename Sums>
void run(const Sums& sums, Index chunks) {
  for_grid(chunks, (sums.columns + Sums::tile - 1) / Sums::tile, [&](Index chunk, Index tile) {
    std::vector<float> lane_sums(Sums::lanes * Sums::tile);
    for (int thread = Sums::threads; thread-- > 0;) sums.gather(chunk, tile, thread, lane_sums.data());
    for (int thread = Sums::threads; thread-- > 0;) sums.finish(chunk, tile, thread, lane_sums.data());
  });
}

std::vector<Part> list(const void* const* data, const Index* rows, int count) {
  std::vector<Part> parts;
  for (int i = 0; i < count; ++i) parts.push_back({data[i], rows[i]});
  return parts;
}

}  // namespace

extern "C" void sum_chunks(const void* const* data, const Index* rows, int count, const char* type, Index columns,
                           bool aligned, float* partial) {
  const NumberType number_type = to_number_type(type);
  const Parts parts = stack(list(data, rows, count), number_type, columns);
  with_type(number_type, [&](auto number) {
    with_flag(aligned, [&](auto flag) {
      run(ChunkSums<decltype(number), decltype(flag)::value>{parts, columns, kChunkRows, {partial}},
          chunks_of(parts.rows()));
    });
  });
}

extern "C" void sum_partial_rows(const void* const* data, const Index* rows, int count, Index columns, void* gradient,
                                 const char* type) {
  const Parts parts = stack(list(data, rows, count), NumberType::float32, columns);
  with_type(to_number_type(type), [&](auto number) {
    using T = decltype(number);
    run(PartialRowSums<T>{parts, columns, parts.rows(), {static_cast<T*>(gradient)}}, 1);
  });
}

extern "C" void sum_embedding(const void* const* data, const Index* rows, int count, const char* type, Index columns,
                              const Index* ids, const Index* order, void* gradient, const char* gradient_type,
                              Index vocabulary, Index padding, bool aligned, float* edges) {
  const NumberType number_type = to_number_type(type);
  const Parts parts = stack(list(data, rows, count), number_type, columns);
  with_type(number_type, [&](auto number) {
    with_flag(aligned, [&](auto flag) {
      const auto run_into = [&](auto* table) {
        using Sums = EmbeddingSums<decltype(number), std::remove_pointer_t<decltype(table)>, decltype(flag)::value>;
        const Sums sums{parts, columns, ids, order, parts.rows(), table, vocabulary, padding, edges};
        const Index windows = windows_of(sums.count), tiles = (columns + Sums::tile - 1) / Sums::tile;
        for_grid(windows, tiles, [&](Index window, Index tile) {
          for (int thread = kEmbeddingThreads; thread-- > 0;) sums.sum_window(window, tile, thread);
        });
        for_grid(windows, tiles, [&](Index window, Index tile) {
          for (int thread = kEmbeddingThreads; thread-- > 0;) sums.join_edges(window, tile, thread);
        });
      };
      if (to_number_type(gradient_type) == NumberType::float32)
        run_into(static_cast<float*>(gradient));
      else
        run_into(static_cast<decltype(number)*>(gradient));
    });
  });
}

extern "C" void add_to_main(const void* gradient, const char* type, float* main, Index count, bool aligned) {
  with_type(to_number_type(type), [&](auto number) {
    with_flag(aligned, [&](auto flag) {
      using T = decltype(number);
      const AddToMain<T, decltype(flag)::value> cast{static_cast<const T*>(gradient), main, count};
      for (Index vector = vectors_of(count, cast.width); vector-- > 0;) cast.apply(vector);
    });
  });
}

extern "C" void cast_from_main(const float* main, void* gradient, const char* type, Index count, bool aligned) {
  with_type(to_number_type(type), [&](auto number) {
    with_flag(aligned, [&](auto flag) {
      using T = decltype(number);
      const CastFromMain<T, decltype(flag)::value> cast{main, static_cast<T*>(gradient), count};
      for (Index vector = vectors_of(count, cast.width); vector-- > 0;) cast.apply(vector);
    });
  });
}
