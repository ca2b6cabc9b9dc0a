// Runs a model with qmoe_plugin's ops from C++: run_model <libonnxruntime.so> <model.onnx>
//
// Every input (float32, of fixed shape) is filled with 0.00, 0.37, 0.74, 0.11, ... - 0.5, and
// output 0 is printed, one number a line. What a program of yours needs of this is one call:
// RegisterCustomOpsLibrary_V2 on the session options.
//
// ONNX Runtime is loaded at run time, as it lies in the Python package onnxruntime
// (capi/libonnxruntime.so.*), and its functions are called by their number in its table, because no
// package brings its header. With the header at hand, include onnxruntime_cxx_api.h instead and
// write `options.RegisterCustomOpsLibrary(QMOE_PLUGIN_LIBRARY)`.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ops/ort/abi.h"
#include "ops/ort/versions.h"
#include "qmoe_plugin.h"

using namespace qmoe_plugin::ort;

struct OrtEnv;
struct OrtRunOptions;
struct OrtSession;
struct OrtTypeInfo;

// What the library itself never calls: making sessions and running them.
using CreateEnv = Slot<3, OrtStatus*(OrtLoggingLevel, const char* name, OrtEnv** out)>;
using CreateSession =
    Slot<7, OrtStatus*(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**)>;
using Run = Slot<9, OrtStatus*(OrtSession*, const OrtRunOptions*, const char* const* input_names,
                               const OrtValue* const* inputs, size_t input_count,
                               const char* const* output_names, size_t output_count, OrtValue**)>;
using CreateSessionOptions = Slot<10, OrtStatus*(OrtSessionOptions** out)>;
using SessionGetInputCount = Slot<30, OrtStatus*(const OrtSession*, size_t* out)>;
using SessionGetInputTypeInfo =
    Slot<33, OrtStatus*(const OrtSession*, size_t index, OrtTypeInfo** out)>;
using SessionGetInputName =
    Slot<36, OrtStatus*(const OrtSession*, size_t index, OrtAllocator*, char** out)>;
using SessionGetOutputName =
    Slot<37, OrtStatus*(const OrtSession*, size_t index, OrtAllocator*, char** out)>;
using CreateTensorWithDataAsOrtValue =
    Slot<49, OrtStatus*(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                        size_t rank, ONNXTensorElementDataType, OrtValue** out)>;
using CastTypeInfoToTensorInfo =
    Slot<55, OrtStatus*(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo** out)>;
using GetAllocatorWithDefaultOptions = Slot<78, OrtStatus*(OrtAllocator** out)>;
using ReleaseEnv = Slot<92, void(OrtEnv*)>;
using ReleaseSession = Slot<95, void(OrtSession*)>;
using ReleaseValue = Slot<96, void(OrtValue*)>;
using ReleaseTypeInfo = Slot<98, void(OrtTypeInfo*)>;
using ReleaseSessionOptions = Slot<100, void(OrtSessionOptions*)>;
using RegisterCustomOpsLibrary_V2 = Slot<228, OrtStatus*(OrtSessionOptions*, const char* path)>;

namespace {

const void* const* table = nullptr;  // ONNX Runtime's functions

[[noreturn]] void Fail(const std::string& message) {
  std::fprintf(stderr, "run_model: %s\n", message.c_str());
  std::exit(1);
}

template <class S>
typename S::Pointer Get() {
  return reinterpret_cast<typename S::Pointer>(const_cast<void*>(table[S::kIndex]));
}

/// Calls a function that returns a status, and ends the program if it fails.
template <class S, class... Args>
void Call(Args... args) {
  if (OrtStatus* status = Get<S>()(args...)) Fail(Get<slot::GetErrorMessage>()(status));
}

void LoadOnnxRuntime(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) Fail(dlerror());
  const auto get_base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  if (!get_base) Fail(dlerror());
  const OrtApi* api = get_base()->GetApi(kLowestApiVersion);
  if (!api) Fail("ONNX Runtime is too old");
  table = reinterpret_cast<const void* const*>(api);
}

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> data;
  OrtValue* value = nullptr;
};

/// Input `index` of the session, filled with numbers.
Tensor MakeInput(const OrtSession* session, size_t index, const OrtMemoryInfo* memory,
                 OrtAllocator* allocator) {
  Tensor tensor;
  char* name = nullptr;
  Call<SessionGetInputName>(session, index, allocator, &name);
  tensor.name = name;
  allocator->Free(allocator, name);

  OrtTypeInfo* type = nullptr;
  const OrtTensorTypeAndShapeInfo* info = nullptr;  // part of `type`
  size_t rank = 0;
  Call<SessionGetInputTypeInfo>(session, index, &type);
  Call<CastTypeInfoToTensorInfo>(type, &info);
  Call<slot::GetDimensionsCount>(info, &rank);
  tensor.shape.resize(rank);
  Call<slot::GetDimensions>(info, tensor.shape.data(), rank);
  Get<ReleaseTypeInfo>()(type);

  size_t size = 1;
  for (const int64_t dim : tensor.shape) {
    if (dim < 0) Fail("input " + tensor.name + " has no fixed shape");
    size *= size_t(dim);
  }
  for (size_t i = 0; i < size; ++i) tensor.data.push_back(float(i * 37 % 100) / 100.0f - 0.5f);
  Call<CreateTensorWithDataAsOrtValue>(memory, static_cast<void*>(tensor.data.data()),
                                       size * sizeof(float), tensor.shape.data(), rank,
                                       ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &tensor.value);
  return tensor;
}

void PrintOutput(OrtValue* output) {
  void* data = nullptr;
  size_t bytes = 0;
  Call<slot::GetTensorMutableData>(output, &data);
  Call<slot::GetTensorSizeInBytes>(static_cast<const OrtValue*>(output), &bytes);
  for (size_t i = 0; i < bytes / sizeof(float); ++i)
    std::printf("%.9g\n", double(static_cast<const float*>(data)[i]));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) Fail("usage: run_model <libonnxruntime.so> <model.onnx>");
  LoadOnnxRuntime(argv[1]);
  std::fprintf(stderr, "qmoe_plugin %s with %zu kernels\n", qmoe_plugin_version(),
               qmoe_plugin_kernel_count());

  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  Call<CreateEnv>(ORT_LOGGING_LEVEL_WARNING, "run_model", &env);
  Call<CreateSessionOptions>(&options);
  Call<RegisterCustomOpsLibrary_V2>(options, QMOE_PLUGIN_LIBRARY);  // this is all it takes
  Call<CreateSession>(env, argv[2], options, &session);

  OrtMemoryInfo* memory = nullptr;
  OrtAllocator* allocator = nullptr;
  Call<slot::CreateMemoryInfo>("Cpu", OrtArenaAllocator, 0, OrtMemTypeDefault, &memory);
  Call<GetAllocatorWithDefaultOptions>(&allocator);
  size_t count = 0;
  Call<SessionGetInputCount>(session, &count);
  std::vector<Tensor> inputs;
  for (size_t i = 0; i < count; ++i) inputs.push_back(MakeInput(session, i, memory, allocator));
  std::vector<const char*> names;
  std::vector<const OrtValue*> values;
  for (const Tensor& input : inputs) {
    names.push_back(input.name.c_str());
    values.push_back(input.value);
  }

  char* output_name = nullptr;
  OrtValue* output = nullptr;
  Call<SessionGetOutputName>(session, size_t(0), allocator, &output_name);
  Call<Run>(session, nullptr, names.data(), values.data(), count, &output_name, size_t(1), &output);
  PrintOutput(output);

  Get<ReleaseValue>()(output);
  for (const Tensor& input : inputs) Get<ReleaseValue>()(input.value);
  allocator->Free(allocator, output_name);
  Get<slot::ReleaseMemoryInfo>()(memory);
  Get<ReleaseSession>()(session);
  Get<ReleaseSessionOptions>()(options);
  Get<ReleaseEnv>()(env);
}
