// nvfp4: e2m1 codes in blocks of 16 and a scale e4m3 each; a global scale an expert.
#pragma once

#include "ops/common/float_codes.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::formats {

struct nvfp4 : E2M1Fragment<nvfp4> {
  static constexpr char kName[] = "nvfp4";
  static constexpr float kDefaultZeroPoint = 0;
  static constexpr bool kZeroPoints = false;
  static constexpr ScaleKind kScales = ScaleKind::kE4M3;
  static constexpr int64_t kBlockSize = 16;

  QMOE_HOST_DEVICE static float Decode(uint32_t code) { return DecodeE2M1(code); }
};

}  // namespace qmoe_plugin::formats
