// Which format the weights of each projection of a QMoE node have.
//
//   fc1_format, fc2_format  attributes of ours: the name of a registered format; "" = the next line.
//                           fc3 has the format of fc1.
//   quant_type              the same for all: the name of a registered format, or one of
//                           com.microsoft's: fp4 and wfp4afp8, mxfp4; fp8, fp8_e4m3; int, the
//                           integer format of the bits that expert_weight_bits or
//                           fc<i>_expert_weight_bits say.
//
// It also decides which layouts the weights may have (ops/ort/qmoe_layout.h): only a quant_type of
// com.microsoft has others than raw, and only where it says the formats of all projections.
#pragma once

#include <string>
#include <vector>

#include "ops/ort/qmoe_node.h"
#include "ops/ort/weight_rules.h"
#include "ops/stored_layout.h"

namespace qmoe_plugin::ort {

struct QMoeFormats {
  FormatChoice fc1, fc2;  // fc3 is like fc1
  std::string says;       // what says them all, for messages
  bool integers = false;  // quant_type "int" and nothing else
  /// Layouts that weights may have; what is taken without a word comes first.
  std::vector<StoredLayout> layouts;
};

/// Throws Error for unknown names, and for bits that the formats do not have.
QMoeFormats FindFormats(const QMoeAttributes& attributes);

}  // namespace qmoe_plugin::ort
