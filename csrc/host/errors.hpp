// Errors of the host transport that become Python exceptions.
#pragma once

#include <array>
#include <cstddef>
#include <exception>

#include "common/named_error.hpp"

namespace pipex {

constexpr std::size_t kTensorHeaderBytes = 128;  // pipex/transport/header.py
using TensorHeader = std::array<std::byte, kTensorHeaderBytes>;

/// The header at the front of a ring is not the expected one. The message stays where it is.
class HeaderMismatch : public std::exception {
 public:
  HeaderMismatch(const TensorHeader& got, const TensorHeader& needed) : got(got), needed(needed) {}

  const char* what() const noexcept override { return "header mismatch"; }

  TensorHeader got, needed;
};

}  // namespace pipex
