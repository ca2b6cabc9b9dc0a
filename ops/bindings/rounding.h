// The functions of _native that round weights to codes.
#pragma once

#include <pybind11/pybind11.h>

namespace qmoe_plugin {

/// Defines `round_to_codes` and `rounding_errors`.
void DefineRounding(pybind11::module_& module);

}  // namespace qmoe_plugin
