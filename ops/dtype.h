// Element types, and the conversions between float and the 16-bit floats that host code needs.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace qmoe_plugin {

/// Element type of a tensor. The values are ONNXTensorElementDataType's, so that ops/ort/ converts
/// by a cast.
enum class DType : int32_t {
  kUndefined = 0,
  kFloat32 = 1,
  kUint8 = 2,
  kInt32 = 6,
  kFloat16 = 10,
  kBFloat16 = 16,
  kFloat8E4M3 = 17,
  kFloat8E8M0 = 26,
};

constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kUint8:
      return "uint8";
    case DType::kInt32:
      return "int32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat8E4M3:
      return "float8e4m3fn";
    case DType::kFloat8E8M0:
      return "float8e8m0";
    case DType::kUndefined:
      break;
  }
  return "undefined or unsupported type";
}

/// Bytes of one element; 0 for a type we do not know.
constexpr size_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kUint8:
    case DType::kFloat8E4M3:
    case DType::kFloat8E8M0:
      return 1;
    case DType::kUndefined:
      break;
  }
  return 0;
}

/// float32, float16 or bfloat16: the types that activations, biases and router inputs may have.
constexpr bool IsFloat(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

/// The types that scales may have.
constexpr bool IsScale(DType dtype) {
  return IsFloat(dtype) || dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E8M0;
}

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact in float
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

/// Rounds to nearest, ties to even; overflows to infinity; NaN stays NaN.
inline uint16_t FloatToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                 // below 2^-14: subnormal half
    // Adding 0.5 lines the mantissa up so that the float adder rounds at 2^-24 for us.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

inline float BFloat16ToFloat(uint16_t value) { return std::bit_cast<float>(uint32_t(value) << 16); }

/// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t FloatToBFloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000u) return uint16_t((bits >> 16) | 0x0040);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/// 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinity; 0x7f and 0xff are NaN.
constexpr float Float8E4M3ToFloat(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80) << 24, exponent = (code >> 3) & 15,
                 mantissa = code & 7;
  if ((code & 0x7f) == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-9f;
  return std::bit_cast<float>(sign | ((exponent + 120) << 23) | (mantissa << 20));
}

/// 2^(code - 127); 255 is NaN. Code 0 is zero, as in onnxruntime's decoder, not 2^-127.
constexpr float Float8E8M0ToFloat(uint8_t code) {
  if (code == 0) return 0.0f;
  return code == 255 ? std::bit_cast<float>(0x7fc00000u)
                     : std::bit_cast<float>(uint32_t(code) << 23);
}

/// Element `index` of an array of any type of which IsScale() is true, as float.
inline float LoadFloat(const void* data, DType dtype, size_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return HalfToFloat(static_cast<const uint16_t*>(data)[index]);
    case DType::kBFloat16:
      return BFloat16ToFloat(static_cast<const uint16_t*>(data)[index]);
    case DType::kFloat8E4M3:
      return Float8E4M3ToFloat(static_cast<const uint8_t*>(data)[index]);
    case DType::kFloat8E8M0:
      return Float8E8M0ToFloat(static_cast<const uint8_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

/// Stores `value` as element `index` of a float32, float16 or bfloat16 array.
inline void StoreFloat(void* data, DType dtype, size_t index, float value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(data)[index] = FloatToHalf(value);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(data)[index] = FloatToBFloat16(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace qmoe_plugin
