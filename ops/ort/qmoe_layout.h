// How the weights of a QMoE node are laid out, which its attributes say only half. (Those that were
// packed before say it themselves: ops/ort/packed_node.h.)
//
// All projections of a node share one layout, and only one with N != K shows it by its shape:
//
//   raw        [E, N, K * bits / 8]   any format; the only one of those that com.microsoft lacks
//   fpa_intb   [E, K, N * bits / 8]   "int" of 4 and 8 bits, prepacked for the stock CUDA op
//   k_major    [E, K, N * bits / 8]   the 4-bit floats, as the stock CUDA op wants them
//
// The first of these rules that says something counts:
//   1. weights_layout, an attribute of ours, names one of the three;
//   2. weights_prepacked (only "int" has it) is 0, raw, or 1, fpa_intb;
//   3. only one of the layouts that quant_type allows fits the shapes of all projections;
//   4. "int" is raw and a 4-bit float K-major, with a warning. (Most exporters write integers raw
//      and say nothing; models with 4-bit floats are made for CUDA only.)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/ort/qmoe_formats.h"
#include "ops/ort/qmoe_node.h"
#include "ops/stored_layout.h"

namespace qmoe_plugin::ort {

/// The weights of one projection.
struct Matrix {
  size_t input;  // a QMoeInput
  int64_t n, k;  // rows and columns
  const Format* format;
};

struct LayoutDecision {
  StoredLayout layout = StoredLayout::kRaw;
  std::string warning;  // of rule 4; empty = nothing to say
};

/// Throws Error for attributes that contradict each other, and for weights that no layout fits.
LayoutDecision DecideLayout(const QMoeAttributes& attributes, const QMoeFormats& formats,
                            const std::vector<TensorView>& inputs, int64_t experts,
                            const std::vector<Matrix>& matrices);

}  // namespace qmoe_plugin::ort
