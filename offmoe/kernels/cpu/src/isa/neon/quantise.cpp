#include "isa/generic/quantise.h"

namespace offmoe {
bool encode_neon(const Encode& call, int64_t begin, int64_t end) { return encode_groups(call, begin, end); }
}  // namespace offmoe
