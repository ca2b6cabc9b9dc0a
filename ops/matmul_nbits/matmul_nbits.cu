// MatMulNBits on CUDA: one GEMM with one expert; a permuted K (g_idx) gathers the activations
// first, a scale of them quantises them first.
#include "ops/matmul_nbits/matmul_nbits.h"

#include "ops/common/cuda_host.h"
#include "ops/common/types.cuh"
#include "ops/gemm/packed_gemm.cuh"
#include "ops/qmoe/activation_quant.cuh"

namespace qmoe_plugin {
namespace {

constexpr int kThreads = 256;

/// out[m, i] = a[m, order[i]], or 0 where order[i] is -1. a is [M, k], out is [M, packed_k].
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_k(const T* a, const int* order, int64_t rows, int k, int packed_k, T* out) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows * packed_k) return;
  const int64_t row = index / packed_k;
  const int source = order[index % packed_k];
  out[index] = source < 0 ? FromFloat<T>(0.0f) : a[row * k + source];
}

GemmProblem Problem(const MatMulConfig& config, const PackSource& weights) {
  GemmProblem problem;
  problem.stage = GemmStage::kDense;
  problem.dtype = config.dtype;
  problem.format = &weights.format();
  problem.n = weights.rows();
  problem.k = weights.k();
  problem.block_size = weights.block_size();
  problem.zero_points = weights.has_zero_points();
  problem.accuracy_level = config.accuracy_level;
  return problem;
}

class CudaMatMulNBits final : public MatMulNBits {
 public:
  CudaMatMulNBits(const Device& device, const MatMulConfig& config, const PackSource& weights)
      : device_(device),
        config_(config),
        gemm_(device, Problem(config, weights), {.type = Activation::kIdentity}, weights) {
    if (config.act_scale) PrepareQuantize();
    const std::vector<int32_t>& order = weights.k_order();
    if (order.empty()) return;
    const DeviceScope scope(device.index);
    WithType(config.dtype, [](auto type) {
      PrepareKernel("gather_k", reinterpret_cast<const void*>(&gather_k<decltype(type)>));
    });
    packed_k_ = int64_t(order.size());
    const size_t bytes = order.size() * sizeof(int32_t);
    k_order_ = AllocateOnDevice(device.index, bytes, "g_idx");
    CopyToDevice(device.index, k_order_.get(), order.data(), bytes);
  }

  size_t WorkspaceBytes(int64_t m) const override {
    const int64_t columns = k_order_ ? packed_k_ : config_.act_scale ? config_.k : 0;
    return size_t(m * columns) * SizeOf(config_.dtype);
  }

  PackedHeader Packed() const override { return gemm_.header(); }

  void Run(const MatMulTensors& tensors, const ExecutionContext& context) const override {
    if (tensors.m == 0) return;
    QMOE_REQUIRE(tensors.m <= INT32_MAX / 2, "A has ", tensors.m,
                 " rows; the CUDA kernels take up to ", INT32_MAX / 2);
    const DeviceScope scope(device_.index);
    const auto stream = static_cast<cudaStream_t>(context.stream);
    const PackedGemm::Choice choice = gemm_.Choose(tensors.m);
    CudaGemmArgs args = gemm_.Args(choice);
    args.x = tensors.a;
    args.x_stride = config_.k;
    if (k_order_) {
      GatherK(tensors, context.workspace, stream);
      args.x = context.workspace;
      args.x_stride = packed_k_;
    } else if (choice.gemm().quantizes_x) {
      args.x_quant = config_.activation_quant();
      args.x_scales = reinterpret_cast<const float*>(act_scale_.get());
    } else if (config_.act_scale) {
      Quantize(tensors, context.workspace, stream);
      args.x = context.workspace;
    }
    args.rows = tensors.m;
    args.max_tiles = (tensors.m + choice.tile_rows - 1) / choice.tile_rows;
    args.y = tensors.y;
    args.y_stride = config_.n;
    args.overlap = OverlapOn(device_.sm);
    gemm_.Launch(choice, args, stream);
  }

 private:
  void PrepareQuantize() {
    const DeviceScope scope(device_.index);
    PrepareActivationQuant(config_.dtype);
    act_scale_ = AllocateOnDevice(device_.index, sizeof(float), "activation scale");
    CopyToDevice(device_.index, act_scale_.get(), &*config_.act_scale, sizeof(float));
  }

  void Quantize(const MatMulTensors& tensors, void* out, cudaStream_t stream) const {
    LaunchActivationQuant({.dtype = config_.dtype,
                           .mode = config_.activation_quant(),
                           .x = tensors.a,
                           .x_rows = nullptr,
                           .rows = tensors.m,
                           .k = int(config_.k),
                           .scales = reinterpret_cast<const float*>(act_scale_.get()),
                           .expert_offsets = nullptr,
                           .experts = 1,
                           .y = out,
                           .overlap = Overlap::kNone},
                          stream);
  }

  void GatherK(const MatMulTensors& tensors, void* out, cudaStream_t stream) const {
    WithType(config_.dtype, [&](auto type) {
      using T = decltype(type);
      Launch("gather_k", &gather_k<T>, (tensors.m * packed_k_ + kThreads - 1) / kThreads, kThreads,
             0, stream, static_cast<const T*>(tensors.a),
             reinterpret_cast<const int*>(k_order_.get()), tensors.m, int(config_.k),
             int(packed_k_), static_cast<T*>(out));
    });
  }

  Device device_;
  MatMulConfig config_;
  PackedGemm gemm_;
  std::shared_ptr<uint8_t> k_order_;  // int32 [packed K] on the device; null if K is as stored
  int64_t packed_k_ = 0;
  std::shared_ptr<uint8_t> act_scale_;  // float32 on the device; null if A is not quantised
};

}  // namespace

std::unique_ptr<MatMulNBits> MakeCudaMatMulNBits(const Device& device, const MatMulConfig& config,
                                                 const PackSource& weights) {
  return std::make_unique<CudaMatMulNBits>(device, config, weights);
}

}  // namespace qmoe_plugin
