// Gives memory of memory-mapped model files back to the system.
#pragma once

#include <span>

#include "ops/weights.h"

namespace qmoe_plugin::ort {

/// Drops the resident pages of these tensors, where the system can read them again from the file
/// that they are mapped from: whole pages inside a tensor, in a mapping of a file, that nobody has
/// written to. All other memory is left as it is. The tensors stay readable. Does nothing where it
/// cannot be sure, and on other systems than Linux.
void ReleaseMappedPages(std::span<const TensorView> tensors);

}  // namespace qmoe_plugin::ort
