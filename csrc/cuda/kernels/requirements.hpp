// What must hold before a kernel may be launched; the boundary at which the arguments of all kernels are checked.
#pragma once

#include <string>

#include "cuda/gradients.hpp"
#include "cuda/kernels/parts.hpp"

namespace pipex::cuda {

std::size_t size_of(NumberType type);

/// Whether `address` is a multiple of 16, so that threads may load 16 bytes at once.
bool is_vector_aligned(const void* address);

// Each throws NamedError (InputError) unless what its name says holds.

/// The gradient is float32 or of `part_type`, and at a usable address.
void require_gradient(const GradientBuffer& gradient, NumberType part_type);
/// Not null, and a multiple of `alignment`.
void require_pointer(const void* data, std::size_t alignment, const char* what);
void require_columns(std::int64_t columns, std::int64_t columns_per_block);
void require_workspace(const Workspace& workspace, std::size_t needed);
void require_count(std::int64_t count);
void require_blocks(std::int64_t blocks, const char* what);

/// The parts as one matrix. Throws NamedError (InputError) for too many parts, negative rows, null or odd pointers.
Parts stack(const std::vector<Part>& parts, NumberType type, std::int64_t columns);

/// Whether every row of every part starts at a multiple of 16 bytes.
bool is_vector_aligned(const std::vector<Part>& parts, NumberType type, std::int64_t columns);

}  // namespace pipex::cuda
