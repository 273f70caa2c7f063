// One token through gated delta nets: odd widths, few and many threads.
#include "calls.h"

namespace made {

int64_t try_deltas(const Handles& handles) {
    Random random(8);
    int64_t made = 0;
    for (int64_t key_width : {1, 7, 32, 130})
        for (int64_t value_width : {1, 16, 33, 300})
            for (int64_t heads_a_key : {1, 3})
                for (int32_t type : {F32, BF16, F16}) {
                    const int64_t keys = 2, values = keys * heads_a_key, taps = 4, channels = 2 * keys * key_width + values * value_width;
                    const Buffer query = random_numbers(random, type, keys * key_width), key = random_numbers(random, type, keys * key_width);
                    const Buffer value = random_numbers(random, type, values * value_width), gate = random_numbers(random, type, values * value_width);
                    const Buffer beta = random_numbers(random, type, values), decay = random_numbers(random, type, values);
                    const Buffer conv = random_numbers(random, type, channels * taps), last = random_numbers(random, type, channels * taps);
                    const Buffer state = random_numbers(random, F32, values * key_width * value_width), by_head = random_numbers(random, F32, values);
                    const Buffer norm = random_numbers(random, type, value_width), output(values * value_width * bytes_of(type));
                    const float* numbers_by_head = reinterpret_cast<const float*>(by_head.at());
                    Delta delta = {query.at(), key.at(), value.at(), gate.at(), beta.at(), decay.at(), conv.at(), last.at(),
                                   reinterpret_cast<float*>(state.at()), numbers_by_head, numbers_by_head, norm.at(), output.at(),
                                   key_width, key_width, heads_a_key * value_width, heads_a_key * value_width, heads_a_key, heads_a_key,
                                   keys, values, key_width, value_width, taps, 1e-6f, type};
                    Op op = {&delta, nullptr, 0, OP_DELTA};
                    const Program program = {&op, 0, 1};
                    const std::vector<uint8_t> before(state.at(), state.at() + state.size()), taken(last.at(), last.at() + last.size());
                    require(offmoe_program(handles.alone, &program) == 1, "a delta net", "", key_width, value_width, type);
                    show("delta net", "", type, output);
                    show("delta net: state", "", F32, state);
                    const std::vector<uint8_t> first(output.at(), output.at() + output.size());
                    std::memcpy(state.at(), before.data(), before.size());
                    std::memcpy(last.at(), taken.data(), taken.size());
                    require(offmoe_program(handles.several(made), &program) == 1, "a delta net of several threads", "", key_width, value_width, type);
                    require(std::memcmp(first.data(), output.at(), first.size()) == 0, "bits depend on threads", "a delta net", key_width, value_width, type);
                    ++made;
                }
    return made;
}

}  // namespace made
