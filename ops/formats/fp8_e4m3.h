// fp8_e4m3: 8-bit floats (e4m3fn), scaled by a factor an expert, or by a float a square block.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct fp8_e4m3 : E4M3Fragment<fp8_e4m3> {
  static constexpr char kName[] = "fp8_e4m3";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr bool kSquareBlocks = true;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) { return DecodeE4M3(code); }
};

}  // namespace qmoe_plugin::formats
