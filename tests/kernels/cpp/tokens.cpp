// One token's attention, routing and layers: odd sizes, few and many threads.
#include <cmath>

#include "calls.h"

namespace made {
namespace {

constexpr int32_t kTypes[] = {F32, BF16, F16};
constexpr float kNone = -INFINITY;

// A token's attention to its own cache. What an Attend points to lives as long as this.
struct MadeAttend {
    MadeAttend(Random& random, int64_t groups, int64_t heads_a_group, int64_t width, int64_t value_width, int64_t num_rows, int32_t type, int64_t turn)
        : query(random_numbers(random, type, groups * heads_a_group * width)), key(random_numbers(random, type, groups * width)),
          value(random_numbers(random, type, groups * value_width)), query_norm(random_numbers(random, type, groups * heads_a_group * width)),
          key_norm(random_numbers(random, type, groups * width)), head_norm(random_numbers(random, type, width)),
          cos(random_numbers(random, type, width / 2 * 2)), sin(random_numbers(random, type, width / 2 * 2)), half_cos(random_numbers(random, type, width / 2)),
          half_sin(random_numbers(random, type, width / 2)), sinks(random_numbers(random, F32, groups * heads_a_group)),
          keys(random_numbers(random, type, groups * num_rows * width)), values(random_numbers(random, type, groups * num_rows * value_width)),
          output(groups * heads_a_group * value_width * bytes_of(type)) {
        const int64_t size = bytes_of(type), heads = groups * heads_a_group;
        const bool of_all = turn % 3 == 1, half = turn % 2 == 0;
        call.query = query.at();
        call.value = value.at();
        call.key = turn % 7 == 3 ? nullptr : key.at();
        // A norm of all heads together is of as many numbers for the key as for the query only where heads are as many.
        if (turn % 3 == 0) call.query_norm = call.key_norm = head_norm.at();
        if (of_all) {
            call.query_norm = query_norm.at();
            call.key_norm = key_norm.at();
        }
        call.norm_width = of_all ? heads * width : width;
        call.rotary = width / 2 * 2;
        call.num_angles = half ? width / 2 : call.rotary;
        if (width > 1 && turn % 5) {
            call.cos = half ? half_cos.at() : cos.at();
            call.sin = half ? half_sin.at() : sin.at();
        }
        if (turn % 4 == 1) call.sinks = reinterpret_cast<const float*>(sinks.at());
        call.keys = keys.at();
        call.values = values.at();
        call.output = output.at();
        call.num_heads = heads;
        call.num_groups = groups;
        call.width = width;
        call.value_width = value_width;
        call.key_row_bytes = width * size;
        call.key_group_bytes = num_rows * width * size;
        call.value_row_bytes = value_width * size;
        call.value_group_bytes = num_rows * value_width * size;
        call.num_rows = num_rows;
        call.eps = 1e-6f;
        call.scale = 0.3f;
        call.norm_kind = static_cast<int32_t>(turn % 3);
        call.type = call.angle_type = type;
        call.neighbours = turn % 6 == 2;
        call.cap = turn % 5 == 1 ? 1.5f : 0.0f;
        call.norm_last = turn % 3 == 0 && !of_all && turn % 2;
    }

    Buffer query, key, value, query_norm, key_norm, head_norm, cos, sin, half_cos, half_sin, sinks, keys, values, output;
    Attend call = {};
};

Variant plain() { return {}; }

const Format& dense_format(int32_t type) { return kFormats[type == F32 ? 0 : type == BF16 ? 1 : 2]; }

// A router's rule with a correction and groups by turns.
struct MadeRoute {
    MadeRoute(Random& random, int32_t num_experts, int32_t top_k, int32_t num_groups, int64_t turn)
        : correction(random_numbers(random, F32, num_experts)), scale(random_numbers(random, F32, num_experts)), ids(8 * top_k), weights(4 * top_k) {
        route.correction = turn % 2 ? reinterpret_cast<const float*>(correction.at()) : nullptr;
        route.expert_scale = turn % 3 == 1 ? reinterpret_cast<const float*>(scale.at()) : nullptr;
        route.ids = reinterpret_cast<int64_t*>(ids.at());
        route.weights = weights.at();
        route.scale = 2.5f;
        route.added = 1e-20f;
        route.hidden_score = turn % 3 ? 0.0f : kNone;
        route.scoring = static_cast<int32_t>(turn % 5);
        route.jitter = 0.02f;
        route.num_experts = num_experts;
        route.top_k = top_k;
        route.num_groups = num_groups;
        route.top_groups = (num_groups + 1) / 2;
        route.best_of_group = num_experts / num_groups > 1 ? 2 : 1;
        route.normalised = turn % 2;
        route.sorted = turn % 4 < 2;
        route.logits_type = F32;
        route.weights_type = turn % 5 ? F32 : BF16;
        route.rounded = turn % 6 > 3;
    }

    Buffer correction, scale, ids, weights;
    Route route = {};
};

}  // namespace

int64_t try_attention(const Handles& handles, int64_t share) {
    Random random(4);
    int64_t turn = 0, made = 0;
    for (int64_t width : {1, 7, 16, 31, 33, 64, 128})
        for (int64_t value_width : {1, 15, 33, 128})
            for (int64_t heads : {1, 2, 3, 7, 13})
                for (int64_t groups : {1, 3})
                    for (int64_t num_rows : {1, 2, 31, 255, 256, 257, 700})
                        for (int32_t type : kTypes) {
                            if (++turn % share) continue;
                            const int64_t way = turn / share;
                            MadeAttend one(random, groups, heads, width, value_width, num_rows, type, way);
                            require(offmoe_attend(handles.alone, &one.call) == 0, "attention", "", width, heads, num_rows);
                            show("attention", "", type, one.output);
                            const Buffer again(one.output.size());
                            one.call.output = again.at();
                            require(offmoe_attend(handles.several(way), &one.call) == 0, "attention of several threads", "", width, heads, num_rows);
                            require(std::memcmp(again.at(), one.output.at(), static_cast<size_t>(again.size())) == 0, "bits depend on threads", "attention", width, heads, num_rows);
                            ++made;
                        }
    // More rows than the most chunks of the usual size hold.
    MadeAttend longest(random, 1, 2, 8, 8, 256 * 64 + 1, BF16, 0);
    require(offmoe_attend(handles.many, &longest.call) == 0, "long attention", "", 8, 2, 256 * 64 + 1);
    return made + 1;
}

int64_t try_latent(const Handles& handles, int64_t share) {
    Random random(5);
    int64_t turn = 0, made = 0;
    for (int64_t heads : {1, 3, 8})
        for (int64_t key_width : {1, 12, 33})
            for (int64_t rotated : {2, 8, 34})
                for (int64_t latent : {7, 16, 100, 520})
                    for (int64_t value_width : {1, 10, 520})
                        for (int32_t type : kTypes) {
                            if (++turn % share) continue;
                            const int64_t way = turn / share, num_rows = way % 4 == 0 ? 300 : 1 + way % 9, size = bytes_of(type);
                            const int64_t row_bytes = (latent + rotated + way % 3) * size;
                            const Buffer query = random_numbers(random, type, heads * (key_width + rotated)), compressed = random_numbers(random, type, latent + rotated);
                            const Buffer norm = random_numbers(random, type, latent), cos = random_numbers(random, F32, rotated / 2), sin = random_numbers(random, F32, rotated / 2);
                            const Buffer cache = random_numbers(random, type, (num_rows - 1) * row_bytes / size + latent + rotated);
                            const Buffer output(heads * value_width * size), again(output.size());
                            std::vector<std::unique_ptr<Weights>> kept;
                            std::vector<Matrix> keys, values;
                            Variant turned = plain();
                            turned.transposed = true;  // as the loader has them: columns side by side
                            for (int64_t head = 0; head < heads; ++head) {
                                kept.push_back(std::make_unique<Weights>(random, dense_format(type), turned, latent, key_width));
                                keys.push_back(kept.back()->matrix);
                                kept.push_back(std::make_unique<Weights>(random, dense_format(type), plain(), value_width, latent));
                                values.push_back(kept.back()->matrix);
                            }
                            Latent call = {query.at(), compressed.at(), norm.at(), reinterpret_cast<const float*>(cos.at()), reinterpret_cast<const float*>(sin.at()),
                                           keys.data(), values.data(), cache.at(), output.at(), heads, key_width, rotated, latent, value_width, row_bytes, num_rows,
                                           1e-6f, 0.2f, static_cast<int32_t>(way % 3), static_cast<int32_t>(way % 3), type};
                            require(offmoe_latent(handles.alone, &call) == 0, "latent attention", "", heads, latent, num_rows);
                            show("latent attention", "", type, output);
                            call.output = again.at();
                            require(offmoe_latent(handles.several(way), &call) == 0, "latent attention of several threads", "", heads, latent, num_rows);
                            require(std::memcmp(again.at(), output.at(), static_cast<size_t>(again.size())) == 0, "bits depend on threads", "latent attention", heads, latent, num_rows);
                            ++made;
                        }
    return made;
}

int64_t try_routes() {
    Random random(6);
    int64_t turn = 0;
    for (int32_t num_experts : {1, 2, 7, 33, 64, 256})
        for (int32_t num_groups : {1, 2, 8})
            for (int32_t top_k : {1, 2, 6, 8})
                for (int32_t bad : {0, 1}) {
                    if (num_experts % num_groups || top_k > num_experts) continue;
                    const Buffer logits = random_numbers(random, F32, num_experts), scores(12 * num_experts);
                    const float nan = NAN;
                    if (bad) std::memcpy(logits.at() + 4 * (num_experts / 2), &nan, 4);
                    for (int64_t way = 0; way < 12; ++way, ++turn) {
                        MadeRoute made(random, num_experts, top_k, num_groups, way);
                        offmoe_route(&made.route, reinterpret_cast<const float*>(logits.at()), reinterpret_cast<float*>(scores.at()));
                        for (int32_t k = 0; k < top_k; ++k)
                            require(made.route.ids[k] >= 0 && made.route.ids[k] < num_experts, "a route", "", num_experts, top_k, way);
                    }
                }
    return turn;
}

// Whole layers, and runs of them in which the experts of one are not there.
int64_t try_layers(const Handles& handles) {
    Random random(7);
    int64_t made = 0;
    for (int64_t width : {7, 33, 96})
        for (int64_t heads : {1, 3})
            for (int32_t type : kTypes)
                for (int64_t way = 0; way < 6; ++way, ++made) {
                    const int64_t head_width = 2 + 6 * way, size = bytes_of(type), num_rows = 1 + 40 * way, num_experts = 5, top_k = 2, hidden = 31;
                    // In turns without a norm of all heads, for which the key would have as many.
                    MadeAttend attend(random, 1, heads, head_width, head_width, num_rows, type, way % 2 ? 0 : 2);
                    attend.call.key = attend.key.at();
                    Weights query(random, dense_format(type), plain(), heads * head_width, width), key(random, dense_format(type), plain(), head_width, width);
                    Weights value(random, dense_format(type), plain(), head_width, width), out(random, dense_format(type), plain(), width, heads * head_width);
                    Weights router(random, dense_format(type), plain(), num_experts, width);
                    const Buffer x = random_numbers(random, type, width), norm = random_numbers(random, type, width), bias = random_numbers(random, type, heads * head_width);
                    const Buffer state(width * size), normed(width * size), output(width * size), again(width * size), y(top_k * width * size), total(width * size);
                    MadeRoute route(random, num_experts, top_k, 1, way);
                    route.route.logits_type = type;
                    route.route.weights_type = type;
                    Layer layer = {};
                    layer.attend = attend.call;
                    layer.x = x.at();
                    layer.input_norm = layer.output_norm = norm.at();
                    layer.projections[0] = &query.matrix;
                    layer.projections[1] = &key.matrix;
                    layer.projections[2] = &value.matrix;
                    layer.projections[3] = &out.matrix;
                    layer.biases[0] = way % 2 ? bias.at() : nullptr;
                    layer.state = state.at();
                    layer.normed = normed.at();
                    layer.router = way == 5 ? nullptr : &router.matrix;
                    layer.route = route.route;
                    layer.width = width;
                    layer.input_eps = layer.output_eps = 1e-6f;
                    layer.input_kind = layer.output_kind = static_cast<int32_t>(way % 3);
                    require(offmoe_layer(handles.few, &layer) == 0, "a layer", "", width, heads, way);
                    show("layer: attention", "", type, state);
                    show("layer: normed", "", type, normed);
                    if (layer.router) show("layer: ids", "", kIds, route.ids);

                    const Activation activation = {SILU, 1, 0, 1.0f, INFINITY, INFINITY, 0.0f};
                    std::vector<std::unique_ptr<Weights>> kept;
                    std::vector<Expert> experts(num_experts);
                    std::vector<const Expert*> table, chosen(top_k);
                    for (Expert& expert : experts) {
                        kept.push_back(std::make_unique<Weights>(random, dense_format(type), plain(), 2 * hidden, width));
                        kept.push_back(std::make_unique<Weights>(random, dense_format(type), plain(), width, hidden));
                        expert = {&kept[kept.size() - 2]->matrix, &kept.back()->matrix, nullptr, nullptr, 1, 1};
                        table.push_back(&expert);
                    }
                    const int32_t begin[] = {0, 1, 2}, token[] = {0, 0}, choice[] = {0, 1};
                    Call call = {};
                    call.activation = &activation;
                    call.experts = chosen.data();
                    call.begin = begin;
                    call.token = token;
                    call.choice = choice;
                    call.x = normed.at();
                    call.y = y.at();
                    call.weights = route.weights.at();
                    call.total = total.at();
                    call.x_row_bytes = call.y_row_bytes = call.total_row_bytes = width * size;
                    call.num_experts = call.top_k = static_cast<int32_t>(top_k);
                    call.num_tokens = 1;
                    call.type = call.x_type = call.weights_type = call.total_type = type;
                    call.width = static_cast<int32_t>(width);
                    call.hidden = static_cast<int32_t>(hidden);
                    const Expert* always = &experts[0];
                    Call mlp = call;
                    mlp.experts = &always;
                    mlp.num_experts = 1;
                    mlp.weights = nullptr;
                    mlp.total = nullptr;
                    const Buffer mlp_y(width * size);
                    mlp.y = mlp_y.at();
                    Lookup lookup = {&call, layer.route.ids, table.data(), chosen.data()};
                    const int64_t rows[] = {num_rows};
                    std::vector<Op> ops = {{&layer, rows, 0, OP_LAYER}};
                    const void* added = total.at();
                    if (layer.router) ops.push_back({&lookup, nullptr, 0, OP_EXPERTS});
                    const bool has_mlp = way % 2 || !layer.router;
                    if (has_mlp) ops.push_back({&mlp, nullptr, 0, OP_MLP});
                    Numbers gate = {mlp_y.at(), normed.at(), mlp_y.at(), width, 1, 1.0f, GATE, type};
                    Numbers both = {total.at(), mlp_y.at(), total.at(), width, width, 0.5f, SUM, type};
                    Numbers cap = {total.at(), nullptr, total.at(), width, 0, 30.0f, CAP, type};
                    Numbers clamp = {total.at(), nullptr, total.at(), width, 0, 2.0f, CLAMP, type};
                    Numbers scale = {total.at(), nullptr, total.at(), width, 0, 3.0f, SCALE, type};
                    if (has_mlp && !layer.router) added = mlp_y.at();
                    if (has_mlp) ops.push_back({&gate, nullptr, 0, OP_NUMBERS});
                    if (has_mlp && layer.router)
                        for (Numbers* numbers : {&both, &cap, &clamp, &scale}) ops.push_back({numbers, nullptr, 0, OP_NUMBERS});
                    Numbers sum = {state.at(), added, output.at(), width, width, 1.0f, SUM, type};
                    ops.push_back({&sum, nullptr, 0, OP_NUMBERS});
                    const Buffer parts = random_numbers(random, type, 3 * width), taps = random_numbers(random, type, 4 * width), last = random_numbers(random, type, 4 * width);
                    const Buffer mixed(width * size);
                    ShortConv conv = {parts.at(), taps.at(), way % 2 ? norm.at() : nullptr, last.at(), mixed.at(), width, 4, type};
                    Activate curve = {&activation, mixed.at(), x.at(), mixed.at(), width, type};
                    Numbers soft = {mixed.at(), norm.at(), mixed.at(), width, width % 3 ? 1 : width / 3, 1.0f, GATE_SOFTPLUS, type};
                    Numbers times = {mixed.at(), x.at(), mixed.at(), width, width, 1.0f, MULTIPLY, type};
                    Norm centred = {mixed.at(), norm.at(), way % 2 ? x.at() : nullptr, mixed.at(), 1, width, 1e-6f, CENTRED, type};
                    const int64_t mamba_heads = 2 * heads, mamba_values = mamba_heads * width, channels = mamba_values + 2 * heads * hidden;
                    const Buffer mamba_x = random_numbers(random, type, mamba_values + channels + mamba_heads), mamba_conv = random_numbers(random, type, 4 * channels);
                    const Buffer mamba_last = random_numbers(random, type, 4 * channels), mamba_norm = random_numbers(random, type, mamba_values);
                    const Buffer mamba_state = random_numbers(random, F32, mamba_values * hidden), by_head = random_numbers(random, F32, mamba_heads);
                    const Buffer mamba_y(mamba_values * size), mamba_bias = random_numbers(random, type, channels);
                    const float* numbers_by_head = reinterpret_cast<const float*>(by_head.at());
                    Mamba mamba = {mamba_x.at(), mamba_conv.at(), way % 2 ? mamba_bias.at() : nullptr, mamba_last.at(), reinterpret_cast<float*>(mamba_state.at()), numbers_by_head,
                                   numbers_by_head, numbers_by_head, mamba_norm.at(), mamba_y.at(), mamba_heads, heads, width, hidden, 4, 1e-6f, type};
                    ops.push_back({&mamba, nullptr, 0, OP_MAMBA});
                    ops.push_back({&conv, nullptr, 0, OP_CONV});
                    ops.push_back({&curve, nullptr, 0, OP_ACTIVATE});
                    for (Numbers* numbers : {&soft, &times}) ops.push_back({numbers, nullptr, 0, OP_NUMBERS});
                    ops.push_back({&centred, nullptr, 0, OP_NORM});
                    Program program = {ops.data(), 0, static_cast<int64_t>(ops.size())};
                    require(offmoe_program(handles.alone, &program) == program.end, "a program", "", width, heads, way);
                    show("program", "", type, output);
                    show("program: mixers", "", type, mixed);
                    show("program: mamba", "", type, mamba_y);
                    sum.to = again.at();
                    require(offmoe_program(handles.many, &program) == program.end, "a program of several threads", "", width, heads, way);
                    require(std::memcmp(again.at(), output.at(), static_cast<size_t>(again.size())) == 0, "bits depend on threads", "a program", width, heads, way);
                    if (!layer.router) continue;
                    for (const Expert*& expert : table) expert = nullptr;
                    require(offmoe_program(handles.many, &program) == 1, "a program that lacks experts", "", width, heads, way);
                }
    return made;
}

}  // namespace made
