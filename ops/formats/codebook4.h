// codebook4: 4-bit codes, indices into 16 values that the model gives for each projection (NF4, AF4,
// IQ4_NL or learned ones), w = value * scale. Scales of any type, a global scale where one is given.
#pragma once

#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct codebook4 : FormatBase<codebook4, 4> {
  static constexpr char kName[] = "codebook4";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr bool kCodebook = true;
  static constexpr ScaleKind kScales = ScaleKind::kAny;

  QMOE_HOST_DEVICE static float Decode(uint32_t) { return 0; }  // the model says it
};

}  // namespace qmoe_plugin::formats
