// OrtValue to TensorView, and checks that every tensor must pass.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "ops/ort/api.h"
#include "ops/weights.h"

namespace qmoe_plugin::ort {

/// Type and shape of a tensor; `data` stays null.
TensorView DescribeTensor(const Api& api, const OrtValue* value);

/// Throws Error unless the element type is one we know. `input` names the tensor: "input 2
/// (fc1_experts_weights)".
void CheckType(const TensorView& tensor, const std::string& input);

/// Throws Error unless the shape takes exactly `bytes` bytes.
void CheckSize(const TensorView& tensor, size_t bytes, const std::string& input);

/// Product of dimensions, for those of a tensor that exists. 0 as soon as one is 0.
int64_t Product(std::span<const int64_t> dims);

/// "[2, 16, 64]".
std::string ShapeText(std::span<const int64_t> dims);

}  // namespace qmoe_plugin::ort
