// Any processor.
#include "activate.h"
#include "attend.h"
#include "coded_any.h"
#include "decode.h"

namespace offmoe {
const Level kPortable = {"portable", coded_prepared_bytes, coded_prepare<AnyVectors>, coded_multiply<AnyVectors>,
    general_activate, norm_row, rotate, attend_any, delta_rule, mamba_rule, encode_portable};
}  // namespace offmoe
