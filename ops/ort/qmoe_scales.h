// What quant_type says of a QMoE node's weights: their format, and the scales that come with them.
//
//   quant_type  format    block_size            scales (inputs 3, 6, 9)      factor an expert
//   int         intN      0, or 16 to 65536     float types [E, N(, K / bs)]  none
//   fp4         mxfp4     32                    float8e8m0 or uint8           inputs 15 and 16
//   nvfp4       nvfp4     16                    float8e4m3fn                  inputs 15 and 16
//   fp8         fp8_e4m3  0                     none                          inputs 15 and 16
//   fp8         fp8_e4m3  squares, 16 to 65536  float types, one a square     none
//   wfp4afp8    mxfp4     as fp4; activations become e4m3, by blocks or by inputs 17 and 18
#pragma once

#include <cstdint>
#include <vector>

#include "ops/ort/qmoe_node.h"

namespace qmoe_plugin::ort {

struct QuantType {
  const char* name;
  const char* format;  // null: int and the bits of the projection
  DType scales;        // kFloat8E8M0, kFloat8E4M3, or kFloat32 for any float type
  int64_t block_size;  // the only one it has; 0 = the attribute says
  bool square_blocks;  // block_size counts rows, too, and 0 means a factor an expert
};

/// The scales of a node, the same for all its projections.
struct ScalePlan {
  const QuantType* type = nullptr;
  int64_t block_size = 0;  // along K; 0 = one scale a row, or an expert
  int64_t scale_rows = 1;
  bool has_scales = true;
  bool has_global_scales = false;
};

/// Checks quant_type, block_size, and which scales are there in which types. Throws Error.
ScalePlan PlanScales(const QMoeAttributes& attributes, const std::vector<TensorView>& inputs,
                     bool has_fc3);

/// The format of a projection. `bits` is what its own attribute says, or expert_weight_bits.
const Format& WeightFormat(const ScalePlan& plan, const char* attribute,
                           std::optional<int64_t> bits);

/// Sets how `config` quantises activations, from inputs 17 to 20. Throws Error.
void PlanActivationQuant(const ScalePlan& plan, const std::vector<TensorView>& inputs,
                         MoeConfig& config);

}  // namespace qmoe_plugin::ort
