#include "ops/ort/qmoe_layout.h"

#include <span>

#include "ops/error.h"

namespace qmoe_plugin::ort {
namespace {

using Tensors = std::vector<TensorView>;

/// What weights_layout calls a layout.
const char* AttributeName(StoredLayout layout) {
  switch (layout) {
    case StoredLayout::kRaw:
      return "raw";
    case StoredLayout::kKMajor:
      return "k_major";
    default:
      return "fpa_intb";
  }
}

/// What the attributes leave of the allowed layouts: rules 1 and 2.
std::vector<StoredLayout> StatedLayouts(const QMoeAttributes& a, const QMoeFormats& formats) {
  const std::vector<StoredLayout>& allowed = formats.layouts;
  QMOE_REQUIRE(a.weights_prepacked >= -1 && a.weights_prepacked <= 1, "weights_prepacked is ",
               a.weights_prepacked, "; allowed are 0 (raw), 1 (SM80 fpA_intB) and -1 (not said)");
  QMOE_REQUIRE(a.weights_prepacked < 1 || formats.integers,
               "weights_prepacked is 1, which belongs to quant_type \"int\"; with ", formats.says,
               " leave it out");
  const bool says = a.weights_prepacked >= 0 && formats.integers;
  const StoredLayout said = a.weights_prepacked == 1 ? StoredLayout::kFpAIntB : StoredLayout::kRaw;
  if (a.weights_layout.empty()) return says ? std::vector{said} : allowed;
  for (const StoredLayout layout : allowed) {
    if (a.weights_layout != AttributeName(layout)) continue;
    QMOE_REQUIRE(!says || said == layout, "weights_layout is \"", a.weights_layout,
                 "\", but weights_prepacked=", a.weights_prepacked, " says \"", AttributeName(said),
                 "\"; leave one of them out");
    return {layout};
  }
  std::string names;
  for (const StoredLayout layout : allowed) names += Concat(", \"", AttributeName(layout), "\"");
  FailInvalid("weights_layout is \"", a.weights_layout, "\"; allowed with ", formats.says,
              " are \"\" (not said)", names, " and, for weights packed before, \"packed\"");
}

/// Why these weights cannot be laid out so; empty if they can.
std::string Refuse(StoredLayout layout, const Tensors& inputs, int64_t experts,
                   std::span<const Matrix> matrices) {
  for (const Matrix& m : matrices) {
    const bool raw = layout == StoredLayout::kRaw;
    const int bits = m.format->bits;
    const int64_t rows = raw ? m.n : m.k, columns = raw ? m.k : m.n;
    const std::vector<int64_t> wanted{experts, rows, columns * bits / 8};
    const std::string subject =
        Concat("input ", m.input, " (weights) is ", inputs[m.input].Describe());
    if (inputs[m.input].shape != wanted) {
      return Concat(subject, "; ", Name(layout), " ", m.format->name,
                    " weights of this node must be uint8[", wanted[0], ", ", wanted[1], ", ",
                    wanted[2], "]");
    }
    const std::string refusal = RefuseStoredLayout(layout, m.n, m.k, bits);
    if (!refusal.empty()) return Concat(subject, ", which cannot be ", Name(layout), ": ", refusal);
  }
  return "";
}

}  // namespace

LayoutDecision DecideLayout(const QMoeAttributes& a, const QMoeFormats& formats,
                            const Tensors& inputs, int64_t experts,
                            const std::vector<Matrix>& matrices) {
  const std::vector<StoredLayout> stated = StatedLayouts(a, formats);
  std::vector<StoredLayout> fitting;
  std::string refusals;
  for (const StoredLayout layout : stated) {
    const std::string refusal = Refuse(layout, inputs, experts, matrices);
    if (refusal.empty()) {
      fitting.push_back(layout);
    } else {
      refusals += (refusals.empty() ? "" : ". Or: ") + refusal;
    }
  }
  if (fitting.empty()) {
    const bool one_of_two = stated.size() < formats.layouts.size();
    FailInvalid(refusals, one_of_two
                              ? Concat(", as ",
                                       a.weights_layout.empty()
                                           ? Concat("weights_prepacked=", a.weights_prepacked)
                                           : "weights_layout",
                                       " says ", Name(stated[0]))
                              : "");
  }
  if (fitting.size() == 1) return {fitting[0], ""};
  const bool raw = fitting[0] == StoredLayout::kRaw;
  return {
      fitting[0],
      Concat("the node does not say whether its weights are ", Name(fitting[0]), " or ",
             Name(fitting[1]), ", and both have the same shapes; they are read as ",
             Name(fitting[0]), ". Write ",
             raw ? "weights_prepacked=0" : "weights_layout=\"k_major\"", " if that is right, and ",
             raw ? "weights_prepacked=1" : "weights_layout=\"raw\"", " if it is not")};
}

}  // namespace qmoe_plugin::ort
