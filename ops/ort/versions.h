// The ONNX Runtime releases that the library works with, as API versions: API version N came with
// ONNX Runtime 1.N.
#pragma once

#include <cstdint>

namespace qmoe_plugin::ort {

/// The oldest one that has every table slot in ops/ort/abi.h.
inline constexpr uint32_t kLowestApiVersion = 24;

/// The newest one that this code was written for. Later releases keep its slots and are asked for
/// this version.
inline constexpr uint32_t kHighestApiVersion = 31;

/// The oldest one that has tensors of float8e8m0.
inline constexpr uint32_t kE8M0Version = 27;

}  // namespace qmoe_plugin::ort
