#include "ops/ort/weight_rules.h"

#include "ops/error.h"

namespace qmoe_plugin::ort {

const Format& IntFormat(int64_t bits) { return GetFormat(Concat("int", bits)); }

std::string QuantizedFormats() {
  std::string names;
  for (const Format* format : Formats())
    if (!format->plain()) names += Concat(names.empty() ? "" : ", ", format->name);
  return names;
}

FormatChoice NamedFormat(const char* attribute, const std::string& name) {
  const Format* format = FindFormat(name);
  if (format == nullptr || format->plain())
    FailInvalid(attribute, " is \"", name, "\"; the formats of this build are ",
                QuantizedFormats());
  return {format, Concat(attribute, " \"", name, "\"")};
}

void CheckScaleType(const FormatChoice& choice, const std::string& input,
                    const TensorView& scales) {
  const DType dtype = scales.dtype;
  const std::string given = Concat(input, " is ", scales.Describe());
  switch (choice.format->scales) {
    case ScaleKind::kE8M0:
      if (IsFloat(dtype)) {
        FailInvalid(
            choice.says, " is given, but ", given,
            ", not float8e8m0. The model builder of onnxruntime-genai 0.18 writes such nodes with "
            "moe_quant_type=mxfp4 for every model but gpt-oss: they hold prepacked int4 weights. "
            "Export the model again with moe_quant_type=int4");
      }
      QMOE_REQUIRE(dtype == DType::kFloat8E8M0 || dtype == DType::kUint8, given, "; scales of ",
                   choice.says, " must be float8e8m0, or uint8 with the same bytes");
      return;
    case ScaleKind::kE4M3:
      QMOE_REQUIRE(dtype == DType::kFloat8E4M3, given, "; scales of ", choice.says,
                   " must be float8e4m3fn", dtype == DType::kUint8 ? ", not bytes" : "");
      return;
    case ScaleKind::kAny:
      QMOE_REQUIRE(IsScale(dtype), given, "; allowed with ", choice.says,
                   " are float32, float16, bfloat16, float8e4m3fn and float8e8m0",
                   dtype == DType::kUint8 ? ", not bytes" : "");
      return;
    case ScaleKind::kFloat:
      QMOE_REQUIRE(IsFloat(dtype), given, "; allowed with ", choice.says,
                   " are float32, float16 and bfloat16");
      return;
  }
}

void CheckCodebook(const FormatChoice& choice, const std::string& input,
                   const TensorView& codebook) {
  QMOE_REQUIRE(choice.format->codebook || !codebook.present, input, " is ", codebook.Describe(),
               ", but ", choice.says, " has values of its own; leave it out");
  QMOE_REQUIRE(!choice.format->codebook || codebook.present, input, " is missing; ", choice.says,
               " needs the value of each code, a float tensor of shape [", 1 << choice.format->bits,
               "]");
}

}  // namespace qmoe_plugin::ort
