#include "ops/ort/qmoe_formats.h"

#include "ops/error.h"

namespace qmoe_plugin::ort {
namespace {

using enum StoredLayout;

/// The values of quant_type that com.microsoft has.
struct QuantType {
  const char* name;
  const char* format;  // null: the integer format of the bits
  std::vector<StoredLayout> layouts;
};

const QuantType* FindQuantType(const std::string& name) {
  static const QuantType kQuantTypes[] = {
      {"int", nullptr, {kRaw, kFpAIntB}},     {"fp4", "mxfp4", {kKMajor, kRaw}},
      {"nvfp4", "nvfp4", {kKMajor, kRaw}},    {"fp8", "fp8_e4m3", {kRaw}},
      {"wfp4afp8", "mxfp4", {kKMajor, kRaw}},
  };
  for (const QuantType& type : kQuantTypes)
    if (name == type.name) return &type;
  return nullptr;
}

/// The format that quant_type names, but for "int".
FormatChoice OfQuantType(const std::string& name, const QuantType* type) {
  if (type != nullptr) return {&GetFormat(type->format), Concat("quant_type \"", name, "\"")};
  const Format* format = FindFormat(name);
  if (format == nullptr || format->plain()) {
    FailInvalid(
        "quant_type is \"", name,
        "\"; allowed are int, fp4, nvfp4, fp8 and wfp4afp8, and the formats of this build, ",
        QuantizedFormats());
  }
  return NamedFormat("quant_type", name);
}

/// The integer format of `bits`, 4 if they are not said.
FormatChoice OfBits(const char* attribute, std::optional<int64_t> bits) {
  const int64_t width = bits.value_or(4);
  QMOE_REQUIRE(width == 2 || width == 4 || width == 8, attribute, " is ", width,
               "; allowed are 2, 4 and 8");
  return {&IntFormat(width), "quant_type \"int\""};
}

class Finder {
 public:
  explicit Finder(const QMoeAttributes& a) : attributes_(a), type_(FindQuantType(a.quant_type)) {
    if (!integers()) common_ = OfQuantType(a.quant_type, type_);
  }

  bool integers() const { return type_ != nullptr && type_->format == nullptr; }
  const QuantType* type() const { return type_; }

  /// The format by quant_type and bits.
  FormatChoice ByBits(const char* attribute, std::optional<int64_t> bits) const {
    return integers() ? OfBits(attribute, bits) : WithBits(common_, attribute, bits);
  }

  /// The format of a projection: `own` is what its format attribute says, `own_bits` what its bits.
  FormatChoice Find(const char* format_attribute, const std::string& own,
                    const char* bits_attribute, std::optional<int64_t> own_bits) const {
    if (!own.empty()) return WithBits(NamedFormat(format_attribute, own), bits_attribute, own_bits);
    return own_bits ? ByBits(bits_attribute, own_bits)
                    : ByBits("expert_weight_bits", attributes_.expert_weight_bits);
  }

 private:
  static FormatChoice WithBits(const FormatChoice& choice, const char* attribute,
                               std::optional<int64_t> bits) {
    QMOE_REQUIRE(bits.value_or(choice.format->bits) == choice.format->bits, attribute, " is ",
                 *bits, "; ", choice.says, " has ", choice.format->bits, " bits a weight");
    return choice;
  }

  const QMoeAttributes& attributes_;
  const QuantType* type_;
  FormatChoice common_;
};

}  // namespace

QMoeFormats FindFormats(const QMoeAttributes& a) {
  const Finder finder(a);
  finder.ByBits("expert_weight_bits", a.expert_weight_bits);  // whoever goes by it
  QMoeFormats formats;
  formats.fc1 =
      finder.Find("fc1_format", a.fc1_format, "fc1_expert_weight_bits", a.fc1_expert_weight_bits);
  const auto fc3_bits =
      a.fc3_expert_weight_bits ? a.fc3_expert_weight_bits : a.fc1_expert_weight_bits;
  const FormatChoice fc3 =
      finder.Find("fc1_format", a.fc1_format, "fc3_expert_weight_bits", fc3_bits);
  QMOE_REQUIRE(fc3.format == formats.fc1.format, "fc3_expert_weight_bits is ", fc3.format->bits,
               " and fc1 has ", formats.fc1.format->bits,
               " bits; gates and ups must have the same");
  formats.fc2 =
      finder.Find("fc2_format", a.fc2_format, "fc2_expert_weight_bits", a.fc2_expert_weight_bits);

  const bool own = !a.fc1_format.empty() || !a.fc2_format.empty();
  formats.says = own ? "fc1_format or fc2_format" : Concat("quant_type \"", a.quant_type, "\"");
  formats.integers = finder.integers() && !own;
  if (own || finder.type() == nullptr)
    formats.layouts = {kRaw};
  else
    formats.layouts = finder.type()->layouts;
  return formats;
}

}  // namespace qmoe_plugin::ort
