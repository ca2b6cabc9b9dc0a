// int2: unsigned 2-bit codes, w = (q - zero_point) * scale, zero point 2 unless the model gives one.
#pragma once

#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct int2 : FormatBase<int2, 2> {
  static constexpr char kName[] = "int2";
  static constexpr float kDefaultZeroPoint = 2;
  static constexpr bool kZeroPoints = true;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) { return float(code); }
};

}  // namespace qmoe_plugin::formats
