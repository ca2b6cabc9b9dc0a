#include "ops/ort/tensors.h"

#include <algorithm>

namespace qmoe_plugin::ort {
namespace {

/// Name of any ONNX element type, for messages about types that we do not take.
std::string TypeName(int32_t type) {
  static constexpr const char* kNames[] = {
      "undefined",      "float32",    "uint8",          "int8",       "uint16",   "int16",
      "int32",          "int64",      "string",         "bool",       "float16",  "float64",
      "uint32",         "uint64",     "complex64",      "complex128", "bfloat16", "float8e4m3fn",
      "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz", "uint4",      "int4",     "float4e2m1",
      "uint2",          "int2",       "float8e8m0"};
  return type >= 0 && size_t(type) < std::size(kNames) ? kNames[type] : Concat("type ", type);
}

}  // namespace

TensorView DescribeTensor(const Api& api, const OrtValue* value) {
  ONNXTensorElementDataType type;
  const int64_t* dims = nullptr;
  size_t rank = 0;
  api.Call<slot::GetTensorElementTypeAndShapeDataReference>(value, &type, &dims, &rank);
  TensorView view;
  view.dtype = DType(type);
  view.shape.assign(dims, dims + rank);
  view.present = true;
  return view;
}

void CheckType(const TensorView& tensor, const std::string& input) {
  QMOE_REQUIRE(SizeOf(tensor.dtype) > 0, input, " has element type ",
               TypeName(int32_t(tensor.dtype)),
               "; allowed are uint8 for weights and zero points, int32 for g_idx, and float32, "
               "float16 or bfloat16 for scales, biases and typed zero points");
}

void CheckSize(const TensorView& tensor, size_t bytes, const std::string& input) {
  const int64_t limit = int64_t(bytes) / int64_t(SizeOf(tensor.dtype));
  const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
  int64_t elements = empty ? 0 : 1;
  for (const int64_t dim : tensor.shape) {
    // Every partial product of a non-empty tensor is at most its element count, so this also guards
    // against overflow.
    QMOE_REQUIRE(dim >= 0 && (empty ? dim <= INT32_MAX : elements <= limit / dim), input,
                 " has shape ", ShapeText(tensor.shape), ", which its ", bytes, " bytes of ",
                 Name(tensor.dtype), " data cannot fill; the model file is damaged or truncated");
    elements *= dim;
  }
  QMOE_REQUIRE(size_t(elements) * SizeOf(tensor.dtype) == bytes, input, " has shape ",
               ShapeText(tensor.shape), " but ", bytes, " bytes of ", Name(tensor.dtype),
               " data; the model file is damaged or truncated");
}

int64_t Product(std::span<const int64_t> dims) {
  if (std::find(dims.begin(), dims.end(), 0) != dims.end()) return 0;
  int64_t product = 1;
  for (const int64_t dim : dims) product *= dim;
  return product;
}

std::string ShapeText(std::span<const int64_t> dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

}  // namespace qmoe_plugin::ort
