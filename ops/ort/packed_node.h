// Weights that were packed before (qmoe_plugin.prepack): weights_layout="packed", of all ops.
//
// A weight input is then uint8[bytes], which say themselves what they are (ops/packed_weights.h).
// Scales, zero points, biases and global scales are in them, and fc3 is in fc1, so all these inputs
// are left out. The attributes stay as they were and must say the same as the bytes. MoE has none
// that say the type of its weights, so there the bytes do; MatMulBlockQuantized... has N and K.
#pragma once

#include <cstdint>
#include <string>

#include "ops/weights.h"

namespace qmoe_plugin::ort {

inline constexpr char kPackedLayout[] = "packed";

/// Whether weights_layout says so. Throws Error if it is neither "packed" nor empty; `otherwise` says
/// what tells other layouts.
bool IsPacked(const std::string& weights_layout, const char* otherwise);

/// The projection of packed bytes, its sizes taken from their header. Throws Error if the header is
/// not intact, or of another format or block size than the node's attributes say.
Projection PackedProjection(const char* name, const TensorView& bytes, const Format& format,
                            int64_t block_size);

/// Likewise for float weights, whose type the header says.
Projection PackedPlainProjection(const char* name, const TensorView& bytes);

}  // namespace qmoe_plugin::ort
