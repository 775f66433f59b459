// What is known of a tensor before it is sent: its header but for three fields, and its shape for torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "host/dlpack.hpp"
#include "host/errors.hpp"

namespace pipex {

constexpr int kMaxDimensions = 8;

/// One announced tensor of an edge, made once per shape and dtype.
struct TensorTemplate {
  /// `header` as pipex/transport/header.py packs it; its micro-batch, step and sequence are patched for each message.
  TensorTemplate(const TensorHeader& header, const std::vector<std::int64_t>& sizes, dlpack::DataType dtype)
      : header(header), dtype(dtype), dimensions(static_cast<std::int32_t>(sizes.size())), bytes(dtype.bits / 8) {
    if (sizes.size() > kMaxDimensions) throw std::invalid_argument("too many dimensions for a header");
    std::int64_t stride = 1;
    for (int i = dimensions - 1; i >= 0; --i) {
      shape[i] = sizes[i];
      strides[i] = stride;
      stride *= sizes[i];
      bytes *= static_cast<std::size_t>(sizes[i]);
    }
  }

  TensorHeader header_for(std::uint64_t step, std::uint32_t microbatch, std::uint64_t sequence) const {
    TensorHeader patched = header;
    std::memcpy(patched.data() + 36, &microbatch, sizeof microbatch);
    std::memcpy(patched.data() + 40, &step, sizeof step);
    std::memcpy(patched.data() + 48, &sequence, sizeof sequence);
    return patched;
  }

  TensorHeader header;
  dlpack::DataType dtype;
  std::int32_t dimensions;
  std::size_t bytes;
  std::int64_t shape[kMaxDimensions];
  std::int64_t strides[kMaxDimensions];
};

}  // namespace pipex
