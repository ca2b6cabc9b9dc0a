// Block scales on their way into the packed form (ops/packed_weights.h).
#pragma once

#include <cstdint>

#include "ops/weights.h"

namespace qmoe_plugin {

/// The power of two that leaves a row's largest |scale| in [16, 32) when divided out; 1 for a row of
/// zeros. Neither it nor its inverse overflows or loses bits.
float RowFactor(const float* scales, int64_t groups);

/// Whether float16 holds all block scales, divided by their row's factor, and all zero offsets
/// exactly. Reads them on all cores. Throws Error for those that are not finite.
bool ScalesFitHalf(const RowReader& reader);

/// Whether all block scales, divided by their row's factor and rounded to float16, are multiples of 2^-13. As the largest of a row are
/// 16 or more, those are all scales of rows that have none less than 1/128 of it.
bool ScalesAreCoarse(const RowReader& reader);

/// Stores scales[g] / row_factor (which is a power of two) at place 16 g of `out`, float16 or float32.
void StoreScales(const float* scales, float row_factor, int64_t groups, DType dtype, void* out);

}  // namespace qmoe_plugin
