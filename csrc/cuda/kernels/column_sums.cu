#include "cuda/kernels/column_sums.hpp"
#include "cuda/kernels/dispatch.hpp"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/requirements.hpp"

namespace pipex::cuda {
namespace {

template <typename Sums>
__global__ void __launch_bounds__(Sums::threads) sum_columns(const __grid_constant__ Sums sums) {
  __shared__ float lane_sums[Sums::lanes * Sums::tile];
  sums.gather(blockIdx.x, blockIdx.y, threadIdx.x, lane_sums);
  __syncthreads();
  sums.finish(blockIdx.x, blockIdx.y, threadIdx.x, lane_sums);
}

template <typename Sums>
void enqueue(const Sums& sums, Index chunks, const char* name, cudaStream_t stream) {
  const Index tiles = (sums.columns + Sums::tile - 1) / Sums::tile;
  launch(sum_columns<Sums>, name, sums, chunks, tiles, Sums::threads, stream);
}

void add_partial_rows(const Parts& parts, Index columns, GradientBuffer gradient, cudaStream_t stream) {
  with_type(gradient.type, [&](auto number) {
    using T = decltype(number);
    const PartialRowSums<T> sums{parts, columns, parts.rows(), {static_cast<T*>(gradient.data)}};
    enqueue(sums, 1, "the sum of partial rows", stream);
  });
}

void require_partial_row_width(Index columns) { require_columns(columns, PartialRowSums<float>::tile); }

}  // namespace

std::size_t bias_gradient_workspace(std::int64_t rows, std::int64_t columns) {
  return static_cast<std::size_t>(chunks_of(rows) * columns) * sizeof(float);
}

void add_bias_gradient(const std::vector<Part>& parts, NumberType type, std::int64_t columns, GradientBuffer gradient,
                       Workspace workspace, cudaStream_t stream) {
  require_partial_row_width(columns);
  require_gradient(gradient, type);
  const Parts stacked = stack(parts, type, columns);
  const Index chunks = chunks_of(stacked.rows());
  require_blocks(chunks, "rows");
  require_workspace(workspace, bias_gradient_workspace(stacked.rows(), columns));
  if (chunks == 0) return;

  auto* const partial = static_cast<float*>(workspace.data);
  with_type(type, [&](auto number) {
    with_flag(is_vector_aligned(parts, type, columns), [&](auto aligned) {
      const ChunkSums<decltype(number), decltype(aligned)::value> sums{stacked, columns, kChunkRows, {partial}};
      enqueue(sums, chunks, "the sum of a bias gradient's rows", stream);
    });
  });
  Parts partial_rows{};
  partial_rows.data[0] = partial;
  partial_rows.begin[1] = chunks;
  partial_rows.count = 1;
  add_partial_rows(partial_rows, columns, gradient, stream);
}

void add_norm_gradient(const std::vector<Part>& parts, std::int64_t columns, GradientBuffer gradient,
                       cudaStream_t stream) {
  require_partial_row_width(columns);
  require_gradient(gradient, gradient.type);
  const Parts stacked = stack(parts, NumberType::float32, columns);
  if (stacked.rows() > 0) add_partial_rows(stacked, columns, gradient, stream);
}

}  // namespace pipex::cuda
