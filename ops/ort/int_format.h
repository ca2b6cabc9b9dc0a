// The weight format that an integer width names.
#pragma once

#include "ops/error.h"
#include "ops/formats/format.h"

namespace qmoe_plugin::ort {

/// "int2", "int4" or "int8"; throws Error if this build does not have it.
inline const Format& IntFormat(int bits) { return GetFormat(Concat("int", bits)); }

}  // namespace qmoe_plugin::ort
