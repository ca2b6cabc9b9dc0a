// Host memory for packed weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qmoe_plugin {

/// Memory that is not initialised, aligned to 64 bytes. From 2 MiB on it starts at a huge page, and on
/// Linux asks for huge pages: fewer address translations while weights stream by, and fewer page
/// faults while they are packed. Throws Error if there is not enough.
std::shared_ptr<uint8_t> AllocateHost(size_t bytes);

}  // namespace qmoe_plugin
