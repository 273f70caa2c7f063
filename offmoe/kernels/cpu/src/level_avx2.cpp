#include "activate.h"
#include "decode.h"
#include "general.h"
#include "int8_avx2.h"

namespace offmoe {
const Level kAvx2 = {"avx2", general_prepared_bytes, general_prepare, general_multiply, general_activate,
    norm_row, rotate, attend_floats, attend_any};
const Rounding kAvx2Int8 = {int8_prepared_bytes, int8_prepare, int8_multiply<Avx2Unit>};
}  // namespace offmoe
