// How much memory this process may still take before the kernel would kill somebody.
#pragma once

#include <cstdint>

namespace pipex {

/// Bytes that the machine and this process's memory control group (version 2) can still give.
std::uint64_t available_memory();

}  // namespace pipex
