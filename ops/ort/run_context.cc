#include "ops/ort/run_context.h"

#include <atomic>
#include <exception>

namespace qmoe_plugin::ort {
namespace {

constexpr size_t kWorkspaceAlignment = 256;  // ExecutionContext promises it; arenas promise less

/// One parallel loop. ONNX Runtime's threads must not see an exception: the first one is kept for
/// the caller.
struct Loop {
  const std::function<void(size_t)>& fn;
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  static void Step(void* user, size_t index) noexcept {
    Loop& loop = *static_cast<Loop*>(user);
    try {
      loop.fn(index);
    } catch (...) {
      if (!loop.failed.exchange(true)) loop.error = std::current_exception();
    }
  }
};

}  // namespace

RunMemory::RunMemory(const Api& api, const Device& device) : api_(api), device_(device.type) {
  const char* name = device.type == DeviceType::kCuda ? "Cuda" : "Cpu";
  api_.Call<slot::CreateMemoryInfo>(name, OrtArenaAllocator, device.index, OrtMemTypeDefault,
                                    &info_);
}

RunMemory::~RunMemory() { api_.Get<slot::ReleaseMemoryInfo>()(info_); }

Input RunContext::GetInput(size_t index) const {
  size_t count = 0;
  api_.Call<slot::KernelContext_GetInputCount>(context_, &count);
  const OrtValue* value = nullptr;
  if (index < count) api_.Call<slot::KernelContext_GetInput>(context_, index, &value);
  if (!value) return {};

  ONNXTensorElementDataType type;
  const int64_t* dims = nullptr;
  size_t rank = 0;
  Input input;
  api_.Call<slot::GetTensorElementTypeAndShapeDataReference>(value, &type, &dims, &rank);
  api_.Call<slot::GetTensorData>(value, &input.data);
  input.dtype = DType(type);
  input.shape = {dims, rank};
  input.present = true;
  return input;
}

void* RunContext::Output(std::span<const int64_t> shape) const {
  OrtValue* value = nullptr;
  void* data = nullptr;
  api_.Call<slot::KernelContext_GetOutput>(context_, size_t(0), shape.data(), shape.size(), &value);
  if (!value) FailRuntime("ONNX Runtime gave no output tensor");
  api_.Call<slot::GetTensorMutableData>(value, &data);
  return data;
}

RunContext::Scratch::Scratch(const RunContext& run, size_t bytes) : run_(run) {
  if (bytes == 0) return;
  run.api_.Call<slot::KernelContext_GetScratchBuffer>(run.context_, run.memory_.info(),
                                                      bytes + kWorkspaceAlignment - 1, &memory_);
  if (!memory_) FailRuntime("ONNX Runtime gave no scratch buffer of ", bytes, " bytes");
}

RunContext::Scratch::~Scratch() {
  OrtAllocator* allocator = nullptr;
  if (!memory_ || !run_.api_.Try<slot::KernelContext_GetAllocator>(run_.context_,
                                                                   run_.memory_.info(), &allocator))
    return;
  allocator->Free(allocator, memory_);
  run_.api_.Get<slot::ReleaseAllocator>()(allocator);
}

void* RunContext::Scratch::aligned() const {
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory_);
  return reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
                                 kWorkspaceAlignment);
}

ExecutionContext RunContext::MakeExecutionContext(void* workspace) const {
  ExecutionContext execution;
  execution.workspace = workspace;
  if (memory_.device() == DeviceType::kCuda) {
    api_.Call<slot::KernelContext_GetGPUComputeStream>(context_, &execution.stream);
  } else {
    execution.parallel_for = [this](size_t total, const std::function<void(size_t)>& fn) {
      ForEach(total, fn);
    };
  }
  return execution;
}

void RunContext::ForEach(size_t total, const std::function<void(size_t)>& fn) const {
  if (total == 1) return fn(0);
  Loop loop{fn, {}, {}};
  // 0 batches: threads take one index after the other, which balances uneven work.
  api_.Call<slot::KernelContext_ParallelFor>(context_, Loop::Step, total, size_t(0),
                                             static_cast<void*>(&loop));
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace qmoe_plugin::ort
