#include "isa/generic/pack.h"
#include "isa/isa.h"

namespace offmoe {
void pack_portable(const Pack& call) { pack_rows(call); }
void unpack_portable(const Unpack& call, int64_t begin, int64_t end) { unpack_rows(call, begin, end); }
}  // namespace offmoe
