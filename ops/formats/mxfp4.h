// mxfp4: e2m1 codes in blocks of 32 and a scale e8m0 each (OCP microscaling); a global scale an expert.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct mxfp4 : E2M1Fragment<mxfp4> {
  static constexpr char kName[] = "mxfp4";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr ScaleKind kScales = ScaleKind::kE8M0;
  static constexpr int64_t kBlockSize = 32;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) { return DecodeE2M1(code); }
};

}  // namespace qmoe_plugin::formats
