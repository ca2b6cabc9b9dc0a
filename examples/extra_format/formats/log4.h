// log4: a sign and seven powers of two, 2^-6 to 1, or zero. Blocks of 32 with an e8m0 scale each, and
// a factor an expert.
#pragma once

#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct log4 : FormatBase<log4, 4> {
  static constexpr char kName[] = "log4";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr ScaleKind kScales = ScaleKind::kE8M0;
  static constexpr int64_t kBlockSize = 32;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) {
    const uint32_t power = code & 7;
    const float magnitude = power == 0 ? 0.0f : 0x1p-7f * float(1u << power);
    return code & 8 ? -magnitude : magnitude;
  }
};

}  // namespace qmoe_plugin::formats
