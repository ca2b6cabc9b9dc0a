// What a weight format asks of a node's tensors, the same for both ops.
#pragma once

#include <string>

#include "ops/weights.h"

namespace qmoe_plugin::ort {

/// A projection's format, and what of the node says so, for messages: `quant_type "fp4"`.
struct FormatChoice {
  const Format* format = nullptr;
  std::string says;
};

/// "int2", "int4" or "int8".
const Format& IntFormat(int64_t bits);

/// The quantised formats of this build, "int4, int8, ...". Plain ones are for MoE, which goes by the
/// type of the weights, so no attribute names them.
std::string QuantizedFormats();

/// The format that a string attribute names; throws Error that lists those that there are.
FormatChoice NamedFormat(const char* attribute, const std::string& name);

/// Whether an expert's weights have a factor of their own beside scales of this kind.
constexpr bool NeedsGlobalScale(ScaleKind kind) {
  return kind == ScaleKind::kE8M0 || kind == ScaleKind::kE4M3;
}

/// Throws Error for scales of a type that the format does not have. `input` names them: "input 3
/// (scales)".
void CheckScaleType(const FormatChoice& choice, const std::string& input, const TensorView& scales);

/// Throws Error if the format takes its values from a codebook that is not there, or the other way
/// round. `input` names it: "input 21 (fc1_codebook)".
void CheckCodebook(const FormatChoice& choice, const std::string& input,
                   const TensorView& codebook);

}  // namespace qmoe_plugin::ort
