// The scales of a QMoE node: of each projection what its format has, and those of activations.
//
//   format            block_size            scales (inputs 3, 6, 9)       factor an expert
//   int2, int4, int8  0, or 16 to 65536     float types [E, N(, K / bs)]  none
//   mxfp4             32                    float8e8m0 or uint8           inputs 15 and 16
//   nvfp4             16                    float8e4m3fn                  inputs 15 and 16
//   fp8_e4m3          0                     none                          inputs 15 and 16
//   fp8_e4m3          squares, 16 to 65536  float types, one a square     none
//   codebook4         0, or 16 to 65536     any of these but uint8        inputs 15 and 16, or none
//
// A format with one block size of its own does not look at the attribute where another projection
// needs it. Formats from outside this tree have what their headers say (ops/formats/format.h).
// quant_type "wfp4afp8": activations become e4m3, by blocks or by inputs 17 and 18.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/ort/qmoe_formats.h"
#include "ops/ort/qmoe_node.h"

namespace qmoe_plugin::ort {

/// The scales of a projection.
struct ScalePlan {
  const Format* format = nullptr;
  int64_t block_size = 0;  // along K; 0 = one scale a row, or an expert
  int64_t scale_rows = 1;
  bool has_scales = true;

  /// What its columns must be a multiple of.
  int64_t unit() const { return format->square_blocks || block_size == 0 ? 8 : block_size; }
};

/// The scales of fc1, which are those of fc3 too, and of fc2.
struct ScalePlans {
  ScalePlan fc1, fc2;
};

/// Checks block_size, and which scales and codebooks are there in which types. Throws Error.
ScalePlans PlanScales(const QMoeAttributes& attributes, const QMoeFormats& formats,
                      const std::vector<TensorView>& inputs, bool has_fc3);

/// Sets how `config` quantises activations, from inputs 17 to 20. Throws Error.
void PlanActivationQuant(const QMoeAttributes& attributes, const std::vector<TensorView>& inputs,
                         MoeConfig& config);

}  // namespace qmoe_plugin::ort
