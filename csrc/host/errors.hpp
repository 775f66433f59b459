// Errors of the host transport that become Python exceptions of pipex.errors.
#pragma once

#include <array>
#include <cstddef>
#include <exception>
#include <string>
#include <utility>

namespace pipex {

/// An error that `pipex.errors` has a class for; the binding raises `pipex.errors.<python_class>`.
class NamedError : public std::exception {
 public:
  NamedError(const char* python_class, std::string problem, std::string got, std::string needed, std::string fix)
      : python_class(python_class),
        problem(std::move(problem)),
        got(std::move(got)),
        needed(std::move(needed)),
        fix(std::move(fix)) {}

  const char* what() const noexcept override { return problem.c_str(); }

  const char* python_class;
  std::string problem, got, needed, fix;
};

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
