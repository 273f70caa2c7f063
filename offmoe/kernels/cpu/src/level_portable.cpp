// Any processor.
#include "activate.h"
#include "attend.h"
#include "coded_any.h"
#include "decode.h"
#include "int8.h"

namespace offmoe {
const Level kPortable = {"portable", coded_prepared_bytes, coded_prepare<AnyVectors>, coded_multiply<AnyVectors>,
    general_activate, norm_row, rotate, attend_any, delta_rule};
const Rounding kPortableInt8 = {int8_prepared_bytes<kPortable>, int8_prepare<kPortable>, int8_multiply<AnyUnit, kPortable>};
}  // namespace offmoe
