// Copies a message into its slot.
#pragma once

#include <cstddef>

namespace pipex {

/// memcpy, but past the caches where the message is too large to stay in them until it is read. `to` is aligned to 64.
void copy_message(std::byte* to, const std::byte* from, std::size_t bytes);

}  // namespace pipex
