#include "isa/generic/pack.h"
#include "isa/isa.h"

namespace offmoe {
void pack_avx512(const Pack& call) { pack_rows(call); }
void unpack_avx512(const Unpack& call, int64_t begin, int64_t end) { unpack_rows(call, begin, end); }
}  // namespace offmoe
