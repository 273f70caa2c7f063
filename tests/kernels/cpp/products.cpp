// Linears, experts and norms: every format, odd sizes, few and many threads.
#include "calls.h"

namespace made {
namespace {

constexpr int64_t kRows[] = {1, 7, 31, 33, 130, 600}, kColumns[] = {1, 7, 31, 33, 95, 160, 257, 520};
constexpr int32_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33};
constexpr int32_t kTypes[] = {F32, BF16, F16};

// Dense weights are multiplied in their own type or in float32.
bool goes_with(const Format& format, int32_t type) {
    if (format.kind == PACKED) return type != F16;
    if (!is_dense(format) || type == F32) return true;
    return format.kind == (type == BF16 ? DENSE_BF16 : DENSE_F16);
}

int64_t rounded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// One linear by one thread, by several, and its rows one by one: three times the same bits.
void try_linear(const Handles& handles, Random& random, const Format& format, const Variant& variant, int64_t rows, int64_t columns, int32_t type, int64_t turn) {
    const int32_t num_x = kTokens[turn % 12], x_type = turn % 5 ? type : F32;
    Weights weights(random, format, variant, rows, columns);
    const Buffer x = random_numbers(random, x_type, num_x * columns), bias = random_numbers(random, type, rows);
    const Buffer y(num_x * rows * bytes_of(type)), again(y.size());
    Linear call = {};
    call.matrix = &weights.matrix;
    call.bias = turn % 3 ? nullptr : bias.at();
    call.x = x.at();
    call.y = y.at();
    call.x_row_bytes = columns * bytes_of(x_type);
    call.y_row_bytes = rows * bytes_of(type);
    call.num_x = num_x;
    call.type = type;
    call.x_type = x_type;
    require(offmoe_linear(handles.alone, &call) == 0, "a linear", format.name, rows, columns, num_x);
    show("linear", format.name, type, y);
    call.y = again.at();
    require(offmoe_linear(handles.several(turn), &call) == 0, "a linear of several threads", format.name, rows, columns, num_x);
    require(std::memcmp(y.at(), again.at(), static_cast<size_t>(y.size())) == 0, "bits depend on threads", format.name, rows, columns, num_x);
    const Buffer x_row(call.x_row_bytes), y_row(call.y_row_bytes);
    call.num_x = 1;
    call.x = x_row.at();
    call.y = y_row.at();
    for (int32_t row : {0, num_x - 1}) {
        std::memcpy(x_row.at(), x.at() + row * call.x_row_bytes, static_cast<size_t>(x_row.size()));
        require(offmoe_linear(handles.alone, &call) == 0, "a row", format.name, rows, columns, row);
        require(std::memcmp(y.at() + row * call.y_row_bytes, y_row.at(), static_cast<size_t>(y_row.size())) == 0, "bits depend on company", format.name, rows, columns, row);
    }
}

// An expert's matrices, in one part or in gate and up.
struct MadeExpert {
    MadeExpert(Random& random, const Format& format, const Variant& variant, int64_t width, int64_t hidden, bool gated, bool apart, int32_t type, bool biased)
        : down(random, format, variant, width, hidden), up_bias(random_numbers(random, type, hidden * (gated ? 2 : 1))), down_bias(random_numbers(random, type, width)) {
        const int64_t rows = gated && !apart ? 2 * hidden : hidden;
        for (int64_t part = 0; part < (gated && apart ? 2 : 1); ++part) {
            ups.push_back(std::make_unique<Weights>(random, format, variant, rows, width));
            parts.push_back(ups.back()->matrix);
        }
        expert.up = parts.data();
        expert.down = &down.matrix;
        expert.num_up = static_cast<int32_t>(parts.size());
        expert.num_down = 1;
        expert.up_bias = biased ? up_bias.at() : nullptr;
        expert.down_bias = biased ? down_bias.at() : nullptr;
    }

    Weights down;
    Buffer up_bias, down_bias;
    std::vector<std::unique_ptr<Weights>> ups;
    std::vector<Matrix> parts;
    Expert expert = {};
};

void try_layer_of_experts(const Handles& handles, Random& random, const Format& format, const Variant& variant, int64_t width, int64_t hidden, int32_t type, int64_t turn) {
    const bool gated = turn % 4 != 0, interleaved = gated && turn % 5 == 0, apart = gated && !interleaved && turn % 3 == 0;
    const int32_t num_tokens = kTokens[turn % 12], top_k = 2, num_experts = 3;
    std::vector<std::unique_ptr<MadeExpert>> experts;
    std::vector<const Expert*> chosen;
    for (int32_t e = 0; e < num_experts; ++e) {
        experts.push_back(std::make_unique<MadeExpert>(random, format, variant, width, hidden, gated, apart, type, turn % 2 == 0));
        chosen.push_back(&experts.back()->expert);
    }
    // The second expert gets nothing; the others each token's two choices.
    std::vector<int32_t> begin = {0, num_tokens, num_tokens, 2 * num_tokens}, token, choice;
    for (int32_t e : {0, 1})
        for (int32_t t = 0; t < num_tokens; ++t) {
            token.push_back(t);
            choice.push_back(t * top_k + e);
        }
    const Activation activation = {static_cast<int32_t>(turn % 6), gated, interleaved, turn % 2 ? 1.0f : 1.702f, 7.0f, 7.0f, turn % 3 ? 0.0f : 1.0f};
    const int32_t weights_type = turn % 2 ? type : F32;
    // So large that no number on the way is infinite in float16.
    const float size = format.block_bytes ? 0x1p-12f : is_dense(format) ? 1.0f : 0x1p-8f;
    const Buffer x = random_numbers(random, type, num_tokens * width, size), weights = random_numbers(random, weights_type, num_tokens * top_k);
    const Buffer y(num_tokens * top_k * width * bytes_of(type)), total(num_tokens * width * bytes_of(type)), again(total.size());
    Call call = {};
    call.activation = &activation;
    call.experts = chosen.data();
    call.begin = begin.data();
    call.token = token.data();
    call.choice = choice.data();
    call.x = x.at();
    call.y = y.at();
    call.weights = weights.at();
    call.total = total.at();
    call.x_row_bytes = call.y_row_bytes = call.total_row_bytes = width * bytes_of(type);
    call.num_experts = num_experts;
    call.num_tokens = num_tokens;
    call.top_k = top_k;
    call.type = call.x_type = call.total_type = type;
    call.weights_type = weights_type;
    call.width = static_cast<int32_t>(width);
    call.hidden = static_cast<int32_t>(hidden);
    require(offmoe_experts(handles.alone, &call) == 0, "experts", format.name, width, hidden, num_tokens);
    if (hidden >= 8) {  // of few, one that is zero but for errors is all there is
        show("experts", format.name, type, y);
        show("experts summed", format.name, type, total);
    }
    call.total = again.at();
    require(offmoe_experts(handles.several(turn), &call) == 0, "experts of several threads", format.name, width, hidden, num_tokens);
    require(std::memcmp(total.at(), again.at(), static_cast<size_t>(total.size())) == 0, "bits depend on threads", format.name, width, hidden, num_tokens);
    call.total = nullptr;
    call.weights = nullptr;
    require(offmoe_experts(handles.several(turn), &call) == 0, "experts without a sum", format.name, width, hidden, num_tokens);
}

}  // namespace

int64_t try_linears(const Handles& handles, int64_t share) {
    Random random(1);
    int64_t turn = 0, made = 0;
    for (const Format& format : kFormats)
        for (const Variant& variant : variants_of(format))
            for (int64_t rows : kRows)
                for (int64_t given : kColumns) {
                    const int64_t columns = rounded(given, format.multiple);
                    for (int32_t type : kTypes) {
                        if (!goes_with(format, type) || ++turn % share) continue;
                        try_linear(handles, random, format, variant, rows, columns, type, turn / share);
                        ++made;
                    }
                }
    return made;
}

int64_t try_experts(const Handles& handles, int64_t share) {
    Random random(2);
    int64_t turn = 0, made = 0;
    for (const Format& format : kFormats)
        for (const Variant& variant : variants_of(format))
            for (int64_t width : {7, 33, 95, 520})
                for (int64_t hidden : {1, 31, 130}) {
                    for (int32_t type : kTypes) {
                        if (!goes_with(format, type) || ++turn % share) continue;
                        try_layer_of_experts(handles, random, format, variant, rounded(width, format.multiple), rounded(hidden, format.multiple), type, turn / share);
                        ++made;
                    }
                }
    return made;
}

int64_t try_norms(const Handles& handles) {
    Random random(3);
    int64_t made = 0;
    for (int64_t width : {1, 7, 15, 16, 17, 31, 33, 64, 100})
        for (int64_t rows : {1, 3})
            for (int32_t type : kTypes)
                for (int32_t kind : {WEIGHT_LAST, WEIGHT_FIRST, ONE_PLUS_WEIGHT, CENTRED}) {
                    const Buffer x = random_numbers(random, type, rows * width), weight = random_numbers(random, type, width), bias = random_numbers(random, type, width), y(x.size());
                    Norm call = {x.at(), weight.at(), kind == CENTRED && rows > 1 ? bias.at() : nullptr, y.at(), rows, width, 1e-6f, kind, type};
                    require(offmoe_norm(handles.alone, &call) == 0, "a norm", "", width, rows, type);
                    show("norm", "", type, y);
                    call.y = x.at();
                    require(offmoe_norm(handles.many, &call) == 0, "a norm in place", "", width, rows, type);
                    require(std::memcmp(x.at(), y.at(), static_cast<size_t>(y.size())) == 0, "a norm in place differs", "", width, rows, type);
                    ++made;
                }
    return made;
}

// Every group, format and type, with a last block that is not full.
int64_t try_encodes(const Handles& handles) {
    Random random(11);
    int64_t made = 0;
    const float divisors[] = {6.8f, 8.0f};
    for (int32_t group : {32, 64, 128})
        for (int32_t bits : {4, 8})
            for (int32_t type : {F32, BF16, F16})
                for (int64_t groups : {1, 8, 611}) {
                    const Buffer values = random_numbers(random, type, groups * group);
                    Buffer codes[2] = {Buffer(groups * group * bits / 8), Buffer(groups * group * bits / 8)};
                    Buffer scales[2] = {Buffer(groups * bytes_of(type)), Buffer(groups * bytes_of(type))};
                    for (int i = 0; i < 2; ++i, ++made) {
                        Encode call = {values.at(), codes[i].at(), scales[i].at(), divisors, groups, 2, group, bits, 1 << (bits - 1), type, type, 0};
                        require(offmoe_encode(i ? handles.several(made) : handles.alone, &call) == 0, "codes", "", group, bits, type);
                        require(call.is_finite == 1, "finite numbers", "", group, bits, type);
                    }
                    show("codes", "", kBytes, codes[0]);
                    show("scales", "", kBytes, scales[0]);
                    require(std::memcmp(codes[0].at(), codes[1].at(), codes[0].size()) == 0, "codes by threads", "", group, bits, type);
                    require(std::memcmp(scales[0].at(), scales[1].at(), scales[0].size()) == 0, "scales by threads", "", group, bits, type);
                }
    return made;
}

// Rows are packed and come back, whatever their numbers; by one thread, by pieces, and where they do not fit.
int64_t try_packing(const Handles& handles) {
    Random random(13);
    int64_t made = 0;
    for (int64_t columns : {1, 31, 33, 64, 95, 128, 160, 257, 520})
        for (int64_t rows : {1, 7, 33})
            for (int32_t mix : {0, 1, 2}) {
                Buffer numbers = mix == 2 ? random_bytes(random, 2 * rows * columns) : random_numbers(random, BF16, rows * columns);
                for (int64_t i = 0; mix == 1 && i < rows * columns; i += 37) put_number(BF16, std::ldexp(1.0f, static_cast<int>(random.below(200)) - 100), numbers.at() + 2 * i);
                const int64_t row_bytes = (columns + 31) / 32 * 48, most = mix == 2 && columns % 2 ? 3 : rows * columns;
                Buffer codes(rows * row_bytes), heads(8 * rows), escapes(4 * most), back(2 * rows * columns);
                uint32_t num_escapes = 0;
                for (int64_t begin = 0, end; begin < rows; begin = end) {
                    end = begin + 5 < rows ? begin + 5 : rows;
                    const Pack call = {numbers.at() + 2 * begin * columns, codes.at() + begin * row_bytes, heads.at() + 8 * begin, reinterpret_cast<uint32_t*>(escapes.at()), &num_escapes, end - begin, columns, row_bytes, most};
                    offmoe_pack(handles.alone, &call);
                }
                ++made;
                if (num_escapes > most) continue;
                Matrix matrix = {};
                matrix.codes = codes.at();
                matrix.scales = heads.at();
                matrix.zeros = escapes.at();
                matrix.rows = rows;
                matrix.columns = columns;
                matrix.row_bytes = row_bytes;
                matrix.scale_row_bytes = 8;
                matrix.kind = PACKED;
                const Unpack call = {&matrix, back.at(), 0, rows, 2 * columns};
                require(offmoe_unpack(handles.several(made), &call) == 0, "unpacking", "packed", rows, columns, mix);
                require(std::memcmp(back.at(), numbers.at(), static_cast<size_t>(back.size())) == 0, "numbers do not come back", "packed", rows, columns, mix);
                show("packed: codes", "", kBytes, codes);
            }
    return made;
}

}  // namespace made
