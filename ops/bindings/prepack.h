// The functions of _native that pack weights.
#pragma once

#include <pybind11/pybind11.h>

namespace qmoe_plugin {

/// Adds them to the module.
void DefinePrepack(pybind11::module_& module);

}  // namespace qmoe_plugin
