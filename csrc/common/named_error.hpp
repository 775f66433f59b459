// The errors of all native code that become Python exceptions of pipex.errors.
#pragma once

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

}  // namespace pipex
