// How facts that are known at run time become template arguments.
#pragma once

#include <type_traits>

#include "cuda/gradients.hpp"
#include "cuda/kernels/numbers.hpp"

namespace pipex::cuda {

/// Calls `body` with a value of the C++ type that `type` stands for.
template <typename Body>
void with_type(NumberType type, Body&& body) {
  switch (type) {
    case NumberType::float32:
      return body(float{});
    case NumberType::float16:
      return body(__half{});
    case NumberType::bfloat16:
      return body(__nv_bfloat16{});
  }
}

/// Calls `body` with std::true_type or std::false_type.
template <typename Body>
void with_flag(bool flag, Body&& body) {
  if (flag)
    body(std::true_type{});
  else
    body(std::false_type{});
}

}  // namespace pipex::cuda
