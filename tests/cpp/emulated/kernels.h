// Kernels of instruction sets that few machines have, by other means: see CMakeLists.txt.
#pragma once

namespace qmoe_plugin {

/// Registers emulated_amx, emulated_amx_bf16 and emulated_avxvnni for every format that the real ones
/// take. They run where there is AVX-512 (and for avxvnni AVX512_VNNI), and refuse what the real ones
/// do. `priority` is added to that of the real ones. Does nothing on other processors than x86-64.
#if defined(__x86_64__)
void RegisterEmulatedKernels(int priority);
#else
inline void RegisterEmulatedKernels(int) {}
#endif

}  // namespace qmoe_plugin
