// The plugin for the emulated GPU: the ops of ONNX Runtime's CPU run our CUDA kernels.
//
// QMOE_EMULATED_SM chooses the GPU generation (90 by default), QMOE_EMULATED_MULTIPROCESSORS its size.
#include <cstdlib>
#include <mutex>

#include "cuda_runtime.h"
#include "ops/matmul_nbits/matmul_nbits.h"
#include "ops/qmoe/qmoe.h"

namespace qmoe_plugin {
namespace {

/// The emulator has one GPU, and ONNX Runtime may run nodes at once.
std::recursive_mutex gpu_mutex;

int FromEnvironment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

Device Gpu() {
  const int sm = FromEnvironment("QMOE_EMULATED_SM", 90);
  const size_t kilobytes = sm == 80 ? 163 : sm >= 90 && sm < 120 ? 227 : 99;
  emulator::gpu = {sm, FromEnvironment("QMOE_EMULATED_MULTIPROCESSORS", 4), kilobytes << 10};
  return CudaDevice(0);
}

template <class Op>
class Emulated : public Op {
 public:
  template <class... Args>
  explicit Emulated(const Args&... args) : op_(Make(args...)) {}
  ~Emulated() override {
    const std::lock_guard lock(gpu_mutex);
    op_.reset();
  }

  size_t WorkspaceBytes(int64_t rows) const override { return op_->WorkspaceBytes(rows); }
  auto Packed() const -> decltype(std::declval<Op>().Packed()) override { return op_->Packed(); }

  template <class Tensors>
  void RunLocked(const Tensors& tensors, const ExecutionContext& context) const {
    const std::lock_guard lock(gpu_mutex);
    op_->Run(tensors, context);
  }

 private:
  static std::unique_ptr<QMoe> Make(const MoeConfig& config, const PackSource& fc1,
                                    const PackSource& fc2) {
    const std::lock_guard lock(gpu_mutex);
    return MakeCudaQMoe(Gpu(), config, fc1, fc2);
  }
  static std::unique_ptr<MatMulNBits> Make(const MatMulConfig& config, const PackSource& source) {
    const std::lock_guard lock(gpu_mutex);
    return MakeCudaMatMulNBits(Gpu(), config, source);
  }
  std::unique_ptr<Op> op_;
};

class EmulatedQMoe final : public Emulated<QMoe> {
 public:
  using Emulated::Emulated;
  void Run(const MoeTensors& tensors, const ExecutionContext& context) const override {
    RunLocked(tensors, context);
  }
};

class EmulatedMatMulNBits final : public Emulated<MatMulNBits> {
 public:
  using Emulated::Emulated;
  void Run(const MatMulTensors& tensors, const ExecutionContext& context) const override {
    RunLocked(tensors, context);
  }
};

}  // namespace

void RegisterCpuKernels() {}

std::unique_ptr<QMoe> MakeCpuQMoe(const MoeConfig& config, const PackSource& fc1,
                                  const PackSource& fc2) {
  return std::make_unique<EmulatedQMoe>(config, fc1, fc2);
}

std::unique_ptr<MatMulNBits> MakeCpuMatMulNBits(const MatMulConfig& config,
                                                const PackSource& source) {
  return std::make_unique<EmulatedMatMulNBits>(config, source);
}

}  // namespace qmoe_plugin
