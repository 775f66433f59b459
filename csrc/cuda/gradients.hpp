// Gradients that are sums over the tokens of several micro-batches. Each function enqueues its kernels on a stream and
// adds to what the gradient holds. Sums are made in fp32, in an order that depends on sizes only: the same bits run
// after run, on every GPU. All throw NamedError: InputError before anything is enqueued, NativeUnavailable where there
// is no driver, CudaError where a launch fails.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pipex::cuda {

enum class NumberType { float32, float16, bfloat16 };

/// The type that torch calls so. Throws for any other name.
NumberType to_number_type(const std::string& name);

/// One micro-batch: `rows` rows, contiguous, on the GPU.
struct Part {
  const void* data;
  std::int64_t rows;
};

/// What is added to: float32, or the type of the parts (then rounded once per call).
struct GradientBuffer {
  void* data;
  NumberType type;
};

/// Memory on the GPU for the time of the kernels; a multiple of 16 in address.
struct Workspace {
  void* data;
  std::size_t bytes;
};

/// gradient [columns] += sum over all rows of all parts [rows, columns], for the bias of a linear layer.
void add_bias_gradient(const std::vector<Part>& parts, NumberType type, std::int64_t columns, GradientBuffer gradient,
                       Workspace workspace, cudaStream_t stream);
std::size_t bias_gradient_workspace(std::int64_t rows, std::int64_t columns);

/// gradient [columns] += sum over all rows of all parts [rows, columns] of fp32 partial sums, as the backward of a
/// norm leaves them (some hundred rows). `gradient` may be of any type.
void add_norm_gradient(const std::vector<Part>& parts, std::int64_t columns, GradientBuffer gradient,
                       cudaStream_t stream);

/// The tokens of all micro-batches, sorted by id; on the GPU. For a fixed order of sums, sort stably.
struct SortedTokens {
  const std::int64_t* ids;
  const std::int64_t* order;  // order[i]: the row, counted through all parts, that belongs to ids[i]
};

/// gradient [vocabulary, columns]: row `id` += sum of the rows of all parts whose token is `id`. `padding` is an id
/// without gradient, or -1.
void add_embedding_gradient(const std::vector<Part>& parts, NumberType type, std::int64_t columns, SortedTokens tokens,
                            GradientBuffer gradient, std::int64_t vocabulary, std::int64_t padding, Workspace workspace,
                            cudaStream_t stream);
std::size_t embedding_gradient_workspace(std::int64_t rows, std::int64_t columns);

/// main [count] (fp32) += gradient [count].
void add_to_main_gradient(const void* gradient, NumberType type, float* main, std::int64_t count, cudaStream_t stream);

/// gradient [count] = main [count] (fp32), rounded to nearest.
void cast_main_gradient(const float* main, void* gradient, NumberType type, std::int64_t count, cudaStream_t stream);

}  // namespace pipex::cuda
