// The names under which ONNX models and ONNX Runtime know us.
#pragma once

namespace qmoe_plugin {

inline constexpr char kDomain[] = "qmoe_plugin";
inline constexpr char kStockDomain[] = "com.microsoft";
inline constexpr char kQMoeOpName[] = "QMoE";
inline constexpr char kMoEOpName[] = "MoE";
inline constexpr char kMatMulNBitsOpName[] = "MatMulNBits";
inline constexpr char kFp8WeightOpName[] = "MatMulBlockQuantizedFp8Weight";
inline constexpr char kFp4WeightOpName[] = "MatMulBlockQuantizedFp4Weight";

}  // namespace qmoe_plugin
