#include "activate.h"
#include "decode.h"
#include "general.h"
#include "int8.h"

namespace offmoe {
const Level kPortable = {"portable", general_prepared_bytes, general_prepare, general_multiply, general_activate,
    norm_row, rotate, attend_floats, attend_any};
const Rounding kPortableInt8 = {int8_prepared_bytes, int8_prepare, int8_multiply<AnyUnit>};
}  // namespace offmoe
