// AVX2: codes by kernels of their own, everything else in the compiler's vectors.
#include "activate.h"
#include "attend.h"
#include "coded_avx2.h"
#include "decode.h"

namespace offmoe {
const Level kAvx2 = {"avx2", coded_prepared_bytes, coded_prepare<Avx2Vectors>, coded_multiply<Avx2Vectors>,
    general_activate, norm_row, rotate, attend_any, delta_rule, mamba_rule};
}  // namespace offmoe
