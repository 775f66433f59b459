#include "cuda/kernels/dispatch.hpp"
#include "cuda/kernels/embedding_sums.hpp"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/requirements.hpp"

namespace pipex::cuda {
namespace {

template <typename Sums>
__global__ void __launch_bounds__(kEmbeddingThreads) sum_windows(const __grid_constant__ Sums sums) {
  sums.sum_window(blockIdx.x, blockIdx.y, threadIdx.x);
}

template <typename Sums>
__global__ void __launch_bounds__(kEmbeddingThreads) join_edges(const __grid_constant__ Sums sums) {
  sums.join_edges(blockIdx.x, blockIdx.y, threadIdx.x);
}

template <typename Sums>
void enqueue(const Sums& sums, cudaStream_t stream) {
  const Index windows = windows_of(sums.count), tiles = (sums.columns + Sums::tile - 1) / Sums::tile;
  launch(sum_windows<Sums>, "the sum of an embedding's windows", sums, windows, tiles, kEmbeddingThreads, stream);
  launch(join_edges<Sums>, "the sum of an embedding's edges", sums, windows, tiles, kEmbeddingThreads, stream);
}

}  // namespace

std::size_t embedding_gradient_workspace(std::int64_t rows, std::int64_t columns) {
  return static_cast<std::size_t>(2 * windows_of(rows) * columns) * sizeof(float);
}

void add_embedding_gradient(const std::vector<Part>& parts, NumberType type, std::int64_t columns, SortedTokens tokens,
                            GradientBuffer gradient, std::int64_t vocabulary, std::int64_t padding, Workspace workspace,
                            cudaStream_t stream) {
  require_columns(columns, EmbeddingSums<float, float, true>::tile);
  require_gradient(gradient, type);
  const Parts stacked = stack(parts, type, columns);
  const Index rows = stacked.rows();
  require_blocks(windows_of(rows), "tokens");
  require_workspace(workspace, embedding_gradient_workspace(rows, columns));
  if (rows == 0) return;
  require_pointer(tokens.ids, sizeof(std::int64_t), "the list of ids");
  require_pointer(tokens.order, sizeof(std::int64_t), "the order of tokens");

  const bool vectors = is_vector_aligned(parts, type, columns) && is_vector_aligned(gradient.data);
  with_type(type, [&](auto number) {
    with_flag(vectors, [&](auto aligned) {
      using T = decltype(number);
      const auto enqueue_into = [&](auto* table) {
        using Out = std::remove_pointer_t<decltype(table)>;
        enqueue(
            EmbeddingSums<T, Out, decltype(aligned)::value>{stacked, columns, tokens.ids, tokens.order, rows, table,
                                                            vocabulary, padding, static_cast<float*>(workspace.data)},
            stream);
      };
      if (gradient.type == NumberType::float32)
        enqueue_into(static_cast<float*>(gradient.data));
      else
        enqueue_into(static_cast<T*>(gradient.data));
    });
  });
}

}  // namespace pipex::cuda
