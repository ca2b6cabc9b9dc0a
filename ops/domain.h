// The names under which ONNX models and ONNX Runtime know us.
#pragma once

namespace qmoe_plugin {

inline constexpr char kDomain[] = "qmoe_plugin";
inline constexpr char kStockDomain[] = "com.microsoft";
inline constexpr char kQMoeOpName[] = "QMoE";
inline constexpr char kMoEOpName[] = "MoE";
inline constexpr char kMatMulNBitsOpName[] = "MatMulNBits";

}  // namespace qmoe_plugin
