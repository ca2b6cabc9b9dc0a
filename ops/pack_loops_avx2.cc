// The loops of packing for processors with AVX2.
#include "ops/pack_loops.h"

namespace qmoe_plugin {
namespace {
#include "ops/pack_loops.inc"
}  // namespace

extern const PackLoops kPackLoopsAvx2 = kLoops;

}  // namespace qmoe_plugin
