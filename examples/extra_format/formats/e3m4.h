// e3m4: 8-bit floats of 1 sign, 3 exponent (bias 3) and 4 mantissa bits, all of them numbers, up to
// 31. Float scales, a row or a block.
#pragma once

#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct e3m4 : FormatBase<e3m4, 8> {
  static constexpr char kName[] = "e3m4";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) {
    const uint32_t exponent = (code >> 4) & 7, mantissa = code & 15;
    const float magnitude = exponent == 0 ? float(mantissa) * 0x1p-6f
                                          : float(16 + mantissa) * 0x1p-7f * float(1u << exponent);
    return code & 0x80 ? -magnitude : magnitude;
  }
};

}  // namespace qmoe_plugin::formats
