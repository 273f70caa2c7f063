// Any processor.
#include "isa/generic/activate.h"
#include "isa/generic/attend.h"
#include "isa/generic/decode.h"
#include "isa/portable/coded.h"

namespace offmoe {
const Isa kPortable = {"portable", coded_prepared_bytes, coded_prepare<AnyVectors>, coded_multiply<AnyVectors>,
    general_activate, norm_row, rotate, attend_any, delta_rule, mamba_rule, encode_portable, pack_portable, unpack_portable};
}  // namespace offmoe
