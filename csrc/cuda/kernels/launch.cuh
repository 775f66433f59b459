// How the kernels of this folder are launched.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "cuda/kernels/numbers.hpp"
#include "cuda/runtime.hpp"

namespace pipex::cuda {

/// A kernel's one parameter lies in constant memory: indexing the arrays in it copies nothing to a thread's stack.
template <typename Work>
void launch(void (*kernel)(Work), const char* name, const Work& work, Index blocks, Index blocks_across, int threads,
            cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_across));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, work),
        std::string("launch of ") + name + ", grid " + std::to_string(blocks) + " x " + std::to_string(blocks_across));
}

}  // namespace pipex::cuda
