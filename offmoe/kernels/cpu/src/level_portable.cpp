#include "activate.h"
#include "decode.h"
#include "general.h"

namespace offmoe {
const Level kPortable = {"portable", general_prepared_bytes, general_prepare, general_multiply, general_activate,
    norm_row, rotate, attend_floats, attend_any};
}  // namespace offmoe
