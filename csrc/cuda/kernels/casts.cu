#include <algorithm>

#include "cuda/kernels/casts.hpp"
#include "cuda/kernels/dispatch.hpp"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/requirements.hpp"

namespace pipex::cuda {
namespace {

constexpr Index kMaxBlocks = Index{1} << 20;  // a grid may be larger, but each thread then takes several vectors

template <typename Cast>
__global__ void __launch_bounds__(kCastThreads) cast_elements(const __grid_constant__ Cast cast) {
  const Index vectors = vectors_of(cast.count, Cast::width);
  const Index step = static_cast<Index>(gridDim.x) * kCastThreads;
  for (Index vector = static_cast<Index>(blockIdx.x) * kCastThreads + threadIdx.x; vector < vectors; vector += step)
    cast.apply(vector);
}

template <typename Cast>
void enqueue(const Cast& cast, const char* name, cudaStream_t stream) {
  const Index blocks = (vectors_of(cast.count, Cast::width) + kCastThreads - 1) / kCastThreads;
  launch(cast_elements<Cast>, name, cast, std::min(blocks, kMaxBlocks), 1, kCastThreads, stream);
}

/// Whether there is anything to do.
bool check_cast(const void* gradient, NumberType type, const float* main, std::int64_t count) {
  require_count(count);
  if (count == 0) return false;
  require_pointer(gradient, size_of(type), "the gradient");
  require_pointer(main, sizeof(float), "the main gradient");
  return true;
}

}  // namespace

void add_to_main_gradient(const void* gradient, NumberType type, float* main, std::int64_t count, cudaStream_t stream) {
  if (!check_cast(gradient, type, main, count)) return;
  with_type(type, [&](auto number) {
    with_flag(is_vector_aligned(gradient) && is_vector_aligned(main), [&](auto aligned) {
      using T = decltype(number);
      enqueue(AddToMain<T, decltype(aligned)::value>{static_cast<const T*>(gradient), main, count},
              "the sum into a main gradient", stream);
    });
  });
}

void cast_main_gradient(const float* main, void* gradient, NumberType type, std::int64_t count, cudaStream_t stream) {
  if (!check_cast(gradient, type, main, count)) return;
  with_type(type, [&](auto number) {
    with_flag(is_vector_aligned(gradient) && is_vector_aligned(main), [&](auto aligned) {
      using T = decltype(number);
      enqueue(CastFromMain<T, decltype(aligned)::value>{main, static_cast<T*>(gradient), count},
              "the cast of a main gradient", stream);
    });
  });
}

}  // namespace pipex::cuda
