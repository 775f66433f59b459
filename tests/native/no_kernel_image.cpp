// csrc/cuda/runtime.cpp with a CUDA runtime that knows the names of errors only.
#include "common/named_error.hpp"
#include "cuda/runtime.hpp"

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "name"; }
const char* cudaGetErrorString(cudaError_t) { return "text"; }

/// Writes "class: fix" of what `check` throws.
void thrown_for(int error, char* to, unsigned long size) {
  try {
    pipex::cuda::check(static_cast<cudaError_t>(error), "launch");
  } catch (const pipex::NamedError& thrown) {
    const std::string text = std::string(thrown.python_class) + ": " + thrown.fix;
    to[text.copy(to, size - 1)] = '\0';
  }
}
}
