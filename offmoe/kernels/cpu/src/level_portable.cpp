#include "activate.h"
#include "general.h"

namespace offmoe {
const Level kPortable = {"portable", general_prepared_bytes, general_prepare, general_multiply, general_activate};
}  // namespace offmoe
