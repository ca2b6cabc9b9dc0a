// Weights that were packed before (qmoe_plugin.prepack): weights_layout="packed", of both ops.
//
// A weight input is then uint8[bytes], which say themselves what they are (ops/packed_weights.h).
// Scales, zero points, biases and global scales are in them, and fc3 is in fc1, so all these inputs
// are left out. The attributes stay as they were and must say the same as the bytes.
#pragma once

#include <cstdint>

#include "ops/weights.h"

namespace qmoe_plugin::ort {

inline constexpr char kPackedLayout[] = "packed";

/// The projection of packed bytes, its sizes taken from their header. Throws Error if the header is
/// not intact, or of another format or block size than the node's attributes say.
Projection PackedProjection(const char* name, const TensorView& bytes, const Format& format,
                            int64_t block_size);

}  // namespace qmoe_plugin::ort
