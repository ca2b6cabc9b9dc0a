// The loops of packing for every processor, and the choice between them.
#include "ops/pack_loops.h"

namespace qmoe_plugin {
namespace {
#include "ops/pack_loops.inc"
}  // namespace

extern const PackLoops kPackLoopsPortable = kLoops;

const PackLoops& GetPackLoops() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2")) return kPackLoopsAvx2;
#endif
  return kPackLoopsPortable;
}

}  // namespace qmoe_plugin
