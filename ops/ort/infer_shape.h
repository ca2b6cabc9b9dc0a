// The output's type and shape, for ONNX Runtime's graph optimizer and memory planner.
#pragma once

#include <cstddef>
#include <optional>

#include "ops/ort/api.h"

namespace qmoe_plugin::ort {

/// Output 0 = type and shape of input 0, with the last dimension taken from the integer attribute
/// `last_dim_attribute` unless that is null, or, where it is missing, the first one of input
/// `last_dim_input` if that is given. Leaves the output unknown where input 0 is.
void InferOutputShape(const Api& api, const char* last_dim_attribute,
                      std::optional<size_t> last_dim_input, OrtShapeInferContext* context);

}  // namespace qmoe_plugin::ort
