// The part of include/qmoe_plugin.h that packs weights without a session.
#include <array>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "include/qmoe_plugin.h"
#include "ops/device.h"
#include "ops/domain.h"
#include "ops/error.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/ort/attributes.h"
#include "ops/ort/matmul_block_quantized_node.h"
#include "ops/ort/matmul_nbits_node.h"
#include "ops/ort/moe_node.h"
#include "ops/ort/qmoe_node.h"
#include "ops/ort/tensors.h"
#include "ops/qmoe/qmoe.h"

namespace qmoe_plugin {
namespace {

/// Attributes that the caller lists.
class AttributeList : public ort::Attributes {
 public:
  explicit AttributeList(const qmoe_plugin_node& node) : node_(node) {}

  std::optional<int64_t> FindInt(const char* name) const override {
    const qmoe_plugin_attribute* found = Find(name, 'i');
    return found ? std::optional(found->i) : std::nullopt;
  }
  std::optional<float> FindFloat(const char* name) const override {
    const qmoe_plugin_attribute* found = Find(name, 'f');
    return found ? std::optional(found->f) : std::nullopt;
  }
  std::optional<std::string> FindString(const char* name) const override {
    const qmoe_plugin_attribute* found = Find(name, 's');
    return found ? std::optional<std::string>(found->s) : std::nullopt;
  }

 private:
  const qmoe_plugin_attribute* Find(const char* name, char type) const {
    for (size_t i = 0; i < node_.attribute_count; ++i) {
      const qmoe_plugin_attribute& attribute = node_.attributes[i];
      if (std::string_view(attribute.name) != name) continue;
      QMOE_REQUIRE(attribute.type == type, "attribute ", name, " is of type '", attribute.type,
                   "', but must be of type '", type, "' (i, f, s: integer, float, string)");
      return &attribute;
    }
    return nullptr;
  }

  const qmoe_plugin_node& node_;
};

DType FindDType(std::string_view name) {
  constexpr std::array kDTypes{DType::kFloat32,   DType::kUint8,    DType::kInt32,
                               DType::kFloat16,   DType::kBFloat16, DType::kFloat8E4M3,
                               DType::kFloat8E8M0};
  for (const DType dtype : kDTypes)
    if (name == Name(dtype)) return dtype;
  FailInvalid("a tensor is ", name, "; no input may be of that type");
}

std::vector<TensorView> Inputs(const qmoe_plugin_node& node, size_t count) {
  QMOE_REQUIRE(node.input_count <= count, "the node has ", node.input_count, " inputs; ", node.op,
               " has up to ", count);
  std::vector<TensorView> views(count);
  for (size_t i = 0; i < node.input_count; ++i) {
    const qmoe_plugin_tensor& tensor = node.inputs[i];
    if (!tensor.dtype) continue;
    views[i] = {
        tensor.data, FindDType(tensor.dtype), {tensor.shape, tensor.shape + tensor.rank}, true};
    ort::CheckSize(views[i], tensor.bytes, Concat("input ", i));
  }
  return views;
}

void PrepackNode(const qmoe_plugin_node& node, int sm, const AllocatePacked& allocate) {
  const Device device{sm ? DeviceType::kCuda : DeviceType::kCpu, 0, sm};
  const std::string_view op = node.op ? node.op : "";
  const DType dtype = FindDType(node.dtype ? node.dtype : "");
  const AttributeList attributes(node);
  const auto moe = [&](const ort::QMoeNode& read) {
    PrepackQMoe(device, read.config, read.weights, allocate);
  };
  const auto product = [&](const ort::MatMulNBitsNode& read) {
    PrepackMatMulNBits(device, read.config, read.weights, allocate);
  };
  if (op == kQMoeOpName) {
    const std::vector<TensorView> inputs = Inputs(node, ort::kQMoeInputs);
    return moe(ort::InterpretQMoe(ort::ReadQMoeAttributes(attributes), inputs, dtype));
  }
  if (op == kMoEOpName) {
    const std::vector<TensorView> inputs = Inputs(node, size_t(ort::MoEInput::kCount));
    return moe(ort::InterpretMoE(ort::ReadMoEAttributes(attributes), inputs, dtype));
  }
  if (op == kMatMulNBitsOpName) {
    const std::vector<TensorView> inputs = Inputs(node, ort::kMatMulNBitsInputs);
    return product(
        ort::InterpretMatMulNBits(ort::ReadMatMulNBitsAttributes(attributes), inputs, dtype));
  }
  if (op == kFp8WeightOpName) {
    const std::vector<TensorView> inputs = Inputs(node, size_t(ort::Fp8WeightInput::kCount));
    return product(
        ort::InterpretFp8Weight(ort::ReadBlockQuantizedAttributes(attributes), inputs, dtype));
  }
  if (op == kFp4WeightOpName) {
    const std::vector<TensorView> inputs = Inputs(node, size_t(ort::Fp4WeightInput::kCount));
    return product(
        ort::InterpretFp4Weight(ort::ReadBlockQuantizedAttributes(attributes), inputs, dtype));
  }
  FailInvalid("op is \"", op, "\"; allowed are ", kQMoeOpName, ", ", kMoEOpName, ", ",
              kMatMulNBitsOpName, ", ", kFp8WeightOpName, " and ", kFp4WeightOpName);
}

/// Calls body(), and fail(message) if it throws.
template <class Body>
int Guard(void (*fail)(void* user, const char* message), void* user, const Body& body) {
  try {
    body();
    return 0;
  } catch (const Error& error) {
    fail(user, error.what());
    return error.code() == ErrorCode::kRuntime ? -1 : 1;
  } catch (const std::exception& error) {
    fail(user, error.what());
  } catch (...) {
    fail(user, "unknown exception");
  }
  return -1;
}

}  // namespace
}  // namespace qmoe_plugin

using namespace qmoe_plugin;

int qmoe_plugin_prepack(const qmoe_plugin_node* node, int sm,
                        void* (*allocate)(void* user, const char* projection, size_t bytes),
                        void (*fail)(void* user, const char* message), void* user) {
  return Guard(fail, user, [&] {
    PrepackNode(*node, sm, [&](const std::string& projection, size_t bytes) {
      void* memory = allocate(user, projection.c_str(), bytes);
      if (!memory) FailRuntime("no memory for the ", bytes, " bytes of packed ", projection);
      return memory;
    });
  });
}

int qmoe_plugin_read_packed(const void* header, size_t bytes, qmoe_plugin_packed* out,
                            void (*fail)(void* user, const char* message), void* user) {
  return Guard(fail, user, [&] {
    const PackedHeader h = ReadPackedHeader(header, bytes);
    const bool cpu = h.layout == Layout::kCpuPanel16;
    *out = {GetFormat(h.FormatName()).name,
            Name(h.layout),
            cpu ? "CPU" : "CUDA",
            Name(DType(h.scale_dtype)),
            h.experts,
            h.rows,
            h.k,
            h.block_size,
            (h.flags & PackedHeader::kGated) != 0,
            (h.flags & PackedHeader::kZeroOffsets) != 0,
            (h.flags & PackedHeader::kSumScale) != 0};
  });
}
