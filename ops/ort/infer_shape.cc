#include "ops/ort/infer_shape.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace qmoe_plugin::ort {
namespace {

/// A name for a dimension that has none. Each use gets its own: the memory planner takes dimensions
/// of the same name for equal.
std::string NewSymbol() {
  static std::atomic<uint64_t> count{0};
  return "qmoe_plugin_dim_" + std::to_string(count.fetch_add(1));
}

/// Attribute `name`, or -1 when it is missing or no integer (the kernel reports that).
int64_t ReadInt(const Api& api, const OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = -1;
  size_t size = 0;
  if (!api.Try<slot::ShapeInferContext_GetAttribute>(context, name, &attribute)) return -1;
  if (!api.Try<slot::ReadOpAttr>(attribute, ORT_OP_ATTR_INT, static_cast<void*>(&value),
                                 sizeof value, &size))
    return -1;
  return value;
}

/// First dimension of an input, or -1 where it is not known.
int64_t ReadFirstDim(const Api& api, const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* input = nullptr;  // belongs to the context
  size_t rank = 0;
  if (!api.Try<slot::ShapeInferContext_GetInputTypeShape>(context, index, &input)) return -1;
  api.Call<slot::GetDimensionsCount>(input, &rank);
  if (rank == 0) return -1;
  std::vector<int64_t> dims(rank);
  api.Call<slot::GetDimensions>(input, dims.data(), rank);
  return dims[0];
}

}  // namespace

void InferOutputShape(const Api& api, const char* last_dim_attribute,
                      std::optional<size_t> last_dim_input, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* input = nullptr;  // belongs to the context
  api.Call<slot::ShapeInferContext_GetInputTypeShape>(context, size_t(0), &input);
  ONNXTensorElementDataType type;
  size_t rank = 0;
  api.Call<slot::GetTensorElementType>(input, &type);
  api.Call<slot::GetDimensionsCount>(input, &rank);
  if (rank == 0) return;  // how an unknown rank looks; a scalar is no input for any of our ops

  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank);
  api.Call<slot::GetDimensions>(input, dims.data(), rank);
  api.Call<slot::GetSymbolicDimensions>(input, symbols.data(), rank);
  if (last_dim_attribute || last_dim_input) {
    dims.back() = last_dim_attribute ? ReadInt(api, context, last_dim_attribute) : -1;
    if (dims.back() < 0 && last_dim_input)
      dims.back() = ReadFirstDim(api, context, *last_dim_input);
    symbols.back() = "";
  }
  std::vector<std::string> names(rank);
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] >= 0) {
      symbols[i] = "";
    } else if (!symbols[i] || !*symbols[i]) {
      names[i] = NewSymbol();
      symbols[i] = names[i].c_str();
    }
  }

  OrtTensorTypeAndShapeInfo* output = nullptr;
  api.Call<slot::CreateTensorTypeAndShapeInfo>(&output);
  std::unique_ptr<OrtTensorTypeAndShapeInfo, slot::ReleaseTensorTypeAndShapeInfo::Pointer> owner(
      output, api.Get<slot::ReleaseTensorTypeAndShapeInfo>());
  api.Call<slot::SetTensorElementType>(output, type);
  api.Call<slot::SetDimensions>(output, dims.data(), rank);
  api.Call<slot::SetSymbolicDimensions>(output, symbols.data(), rank);
  api.Call<slot::ShapeInferContext_SetOutputTypeShape>(context, size_t(0), output);
}

}  // namespace qmoe_plugin::ort
