// NEON: codes and dense rows by kernels of their own, everything else in the compiler's vectors.
#include "isa/generic/activate.h"
#include "isa/generic/attend.h"
#include "isa/generic/decode.h"
#include "isa/neon/coded.h"

namespace offmoe {

const Isa kNeon = {"neon", coded_prepared_bytes, coded_prepare<NeonVectors>, coded_multiply<NeonVectors>,
    general_activate, norm_row, rotate, attend_any, delta_rule, mamba_rule, encode_neon, pack_neon, unpack_neon};

}  // namespace offmoe
