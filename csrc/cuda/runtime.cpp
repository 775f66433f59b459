#include "cuda/runtime.hpp"

#include "common/named_error.hpp"

namespace pipex::cuda {

void check(cudaError_t error, const std::string& call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next, unrelated call would report it again
  const bool unavailable =
      error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary;
  throw NamedError(unavailable ? "NativeUnavailable" : "CudaError",
                   call + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")", "", "",
                   unavailable ? "this needs an NVIDIA GPU and its driver; nvidia-smi shows both" : "");
}

}  // namespace pipex::cuda
