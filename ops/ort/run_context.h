// What a kernel gets for one run: tensors, scratch memory, the stream or the thread pool.
#pragma once

#include <span>

#include "ops/device.h"
#include "ops/ort/api.h"
#include "ops/problem.h"

namespace qmoe_plugin::ort {

/// ONNX Runtime's name for the memory that a kernel's scratch buffers come from. Made once a
/// kernel.
class RunMemory {
 public:
  RunMemory(const Api& api, const Device& device);
  ~RunMemory();
  RunMemory(const RunMemory&) = delete;
  RunMemory& operator=(const RunMemory&) = delete;

  const OrtMemoryInfo* info() const { return info_; }
  DeviceType device() const { return device_; }

 private:
  Api api_;
  DeviceType device_;
  OrtMemoryInfo* info_ = nullptr;
};

/// A tensor of one run, in the device's memory. `data` null = the input was left out.
struct Input {
  const void* data = nullptr;
  DType dtype = DType::kUndefined;
  std::span<const int64_t> shape;
  bool present = false;
};

class RunContext {
 public:
  RunContext(const Api& api, const RunMemory& memory, OrtKernelContext* context)
      : api_(api), memory_(memory), context_(context) {}

  Input GetInput(size_t index) const;
  /// Allocates output 0.
  void* Output(std::span<const int64_t> shape) const;

  /// Calls run(ExecutionContext) with a workspace of that size, on ONNX Runtime's stream or
  /// threads.
  template <class Run>
  void Execute(size_t workspace_bytes, Run&& run) const {
    const Scratch scratch(*this, workspace_bytes);
    run(MakeExecutionContext(scratch.aligned()));
  }

 private:
  /// Scratch memory from ONNX Runtime's arena. It goes back right away: the arena hands memory that
  /// a stream still works on to later work of the same stream only.
  class Scratch {
   public:
    Scratch(const RunContext& run, size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* aligned() const;

   private:
    const RunContext& run_;
    void* memory_ = nullptr;
  };

  ExecutionContext MakeExecutionContext(void* workspace) const;
  void ForEach(size_t total, const std::function<void(size_t)>& fn) const;

  const Api& api_;
  const RunMemory& memory_;
  OrtKernelContext* context_;
};

}  // namespace qmoe_plugin::ort
