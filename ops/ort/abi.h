// The part of ONNX Runtime's C interface that we use, declared by ourselves because no package
// installs its header.
//
// OrtApi is a table of function pointers that only ever grows at its end, so a function is its
// position in the table: `slot::GetDimensions` below is number 62 with its signature. ops/ort/api.h
// calls them. Types and constants carry the names they have in onnxruntime_c_api.h;
// tests/test_abi.py compares all of this with that header where it finds one. Nothing outside
// ops/ort/ includes this file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qmoe_plugin::ort {

struct OrtApi;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtLogger;
struct OrtMemoryInfo;
struct OrtOpAttr;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

// Only the values that we use; with `int`, any other that the runtime gives us is legal, too.
enum OrtErrorCode : int {
  ORT_OK,
  ORT_FAIL,
  ORT_INVALID_ARGUMENT,
  ORT_RUNTIME_EXCEPTION = 6,
  ORT_NOT_IMPLEMENTED = 9
};

enum OrtLoggingLevel : int { ORT_LOGGING_LEVEL_INFO = 1, ORT_LOGGING_LEVEL_WARNING = 2 };

enum OrtAllocatorType : int { OrtArenaAllocator = 1 };

enum OrtMemType : int { OrtMemTypeCPUInput = -2, OrtMemTypeDefault = 0 };

enum OrtMemoryInfoDeviceType : int { OrtMemoryInfoDeviceType_CPU = 0 };

enum OrtOpAttrType : int { ORT_OP_ATTR_INT = 1 };

enum OrtCustomOpInputOutputCharacteristic : int { INPUT_OUTPUT_REQUIRED, INPUT_OUTPUT_OPTIONAL };

/// The values are those of qmoe_plugin::DType, which lists the ones we can use.
enum ONNXTensorElementDataType : int {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN = 17,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E8M0 = 26,
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

/// The first fields only: ONNX Runtime makes these objects, we never do.
struct OrtAllocator {
  uint32_t version;
  void* (*Alloc)(OrtAllocator* self, size_t size);
  void (*Free)(OrtAllocator* self, void* memory);
  const OrtMemoryInfo* (*Info)(const OrtAllocator* self);
};

/// A custom op as ONNX Runtime sees it. We make these objects; fields that we do not need stay
/// null.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                               void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*));

/// One function of the OrtApi table: its position and its type.
template <size_t Index, class Function>
struct Slot {
  static constexpr size_t kIndex = Index;
  using Pointer = Function*;
};

namespace slot {

// Errors
using CreateStatus = Slot<0, OrtStatus*(OrtErrorCode, const char* message)>;
using GetErrorMessage = Slot<2, const char*(const OrtStatus*)>;
using ReleaseStatus = Slot<93, void(OrtStatus*)>;

// Registration
using CreateCustomOpDomain = Slot<26, OrtStatus*(const char* domain, OrtCustomOpDomain** out)>;
using CustomOpDomain_Add = Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using HasSessionConfigEntry =
    Slot<237, OrtStatus*(const OrtSessionOptions*, const char* key, int* out)>;
using GetSessionConfigEntry =
    Slot<238, OrtStatus*(const OrtSessionOptions*, const char* key, char* out, size_t* size)>;

// Values
using IsTensor = Slot<50, OrtStatus*(const OrtValue*, int* out)>;
using GetTensorMutableData = Slot<51, OrtStatus*(OrtValue*, void** out)>;
using GetTensorMemoryInfo = Slot<194, OrtStatus*(const OrtValue*, const OrtMemoryInfo** out)>;
using GetTensorSizeInBytes = Slot<318, OrtStatus*(const OrtValue*, size_t* out)>;
using GetTensorData = Slot<378, OrtStatus*(const OrtValue*, const void** out)>;
using GetTensorElementTypeAndShapeDataReference =
    Slot<414, OrtStatus*(const OrtValue*, ONNXTensorElementDataType* type, const int64_t** shape,
                         size_t* rank)>;

// Types and shapes
using CreateTensorTypeAndShapeInfo = Slot<57, OrtStatus*(OrtTensorTypeAndShapeInfo** out)>;
using SetTensorElementType =
    Slot<58, OrtStatus*(OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType)>;
using SetDimensions =
    Slot<59, OrtStatus*(OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t rank)>;
using GetTensorElementType =
    Slot<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType* out)>;
using GetDimensionsCount = Slot<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t* out)>;
using GetDimensions =
    Slot<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t rank)>;
using GetSymbolicDimensions =
    Slot<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char** names, size_t rank)>;
using SetSymbolicDimensions =
    Slot<271, OrtStatus*(OrtTensorTypeAndShapeInfo*, const char** names, size_t rank)>;
using ReleaseTensorTypeAndShapeInfo = Slot<99, void(OrtTensorTypeAndShapeInfo*)>;

// Memory
using CreateMemoryInfo = Slot<68, OrtStatus*(const char* name, OrtAllocatorType, int id, OrtMemType,
                                             OrtMemoryInfo** out)>;
using MemoryInfoGetId = Slot<72, OrtStatus*(const OrtMemoryInfo*, int* out)>;
using MemoryInfoGetDeviceType = Slot<225, void(const OrtMemoryInfo*, OrtMemoryInfoDeviceType* out)>;
using ReleaseMemoryInfo = Slot<94, void(OrtMemoryInfo*)>;
using ReleaseAllocator = Slot<132, void(OrtAllocator*)>;

// Creating a kernel
using KernelInfoGetAttribute_float =
    Slot<85, OrtStatus*(const OrtKernelInfo*, const char* name, float* out)>;
using KernelInfoGetAttribute_int64 =
    Slot<86, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out)>;
using KernelInfoGetAttribute_string =
    Slot<87, OrtStatus*(const OrtKernelInfo*, const char* name, char* out, size_t* size)>;
using KernelInfoGetAttributeArray_float =
    Slot<162, OrtStatus*(const OrtKernelInfo*, const char* name, float* out, size_t* size)>;
using KernelInfoGetAttributeArray_int64 =
    Slot<163, OrtStatus*(const OrtKernelInfo*, const char* name, int64_t* out, size_t* size)>;
using KernelInfo_GetInputCount = Slot<230, OrtStatus*(const OrtKernelInfo*, size_t* out)>;
using KernelInfo_GetInputName =
    Slot<232, OrtStatus*(const OrtKernelInfo*, size_t index, char* out, size_t* size)>;
using KernelInfo_GetOutputName =
    Slot<233, OrtStatus*(const OrtKernelInfo*, size_t index, char* out, size_t* size)>;
using KernelInfo_GetNodeName = Slot<244, OrtStatus*(const OrtKernelInfo*, char* out, size_t* size)>;
using KernelInfo_GetLogger = Slot<245, OrtStatus*(const OrtKernelInfo*, const OrtLogger** out)>;
using KernelInfoGetConstantInput_tensor =
    Slot<249,
         OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue** out)>;
using KernelInfoGetAllocator =
    Slot<278, OrtStatus*(const OrtKernelInfo*, OrtMemType, OrtAllocator** out)>;
using Logger_LogMessage =
    Slot<247, OrtStatus*(const OrtLogger*, OrtLoggingLevel, const char* message, const char* file,
                         int line, const char* function)>;
using Logger_GetLoggingSeverityLevel =
    Slot<248, OrtStatus*(const OrtLogger*, OrtLoggingLevel* out)>;

// Running a kernel
using KernelContext_GetInputCount = Slot<88, OrtStatus*(const OrtKernelContext*, size_t* out)>;
using KernelContext_GetInput =
    Slot<90, OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue** out)>;
using KernelContext_GetOutput =
    Slot<91, OrtStatus*(OrtKernelContext*, size_t index, const int64_t* dims, size_t rank,
                        OrtValue** out)>;
using KernelContext_GetGPUComputeStream =
    Slot<193, OrtStatus*(const OrtKernelContext*, void** out)>;
using KernelContext_GetAllocator =
    Slot<253, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator** out)>;
using KernelContext_ParallelFor =
    Slot<274, OrtStatus*(const OrtKernelContext*, void (*function)(void* user, size_t index),
                         size_t total, size_t batches, void* user)>;
using KernelContext_GetScratchBuffer =
    Slot<277, OrtStatus*(const OrtKernelContext*, const OrtMemoryInfo*, size_t bytes, void** out)>;

// Inferring shapes
using ShapeInferContext_GetInputTypeShape =
    Slot<268,
         OrtStatus*(const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo** out)>;
using ShapeInferContext_GetAttribute =
    Slot<269, OrtStatus*(const OrtShapeInferContext*, const char* name, const OrtOpAttr** out)>;
using ShapeInferContext_SetOutputTypeShape =
    Slot<270,
         OrtStatus*(const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*)>;
using ReadOpAttr =
    Slot<272, OrtStatus*(const OrtOpAttr*, OrtOpAttrType, void* data, size_t size, size_t* out)>;

}  // namespace slot
}  // namespace qmoe_plugin::ort
