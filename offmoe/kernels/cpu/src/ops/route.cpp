// A router's rule, from logits to experts. Orders and breaks ties as torch.topk on the CPU does (ATen/native/cpu,
// topk_impl_loop: partial_sort of pairs where k is small, else nth_element), so that the experts are the same ones.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "ops/jobs.h"

namespace offmoe {
namespace {

typedef std::pair<float, int64_t> Scored;

void best(const float* scores, int64_t count, int64_t k, bool sorted, std::vector<Scored>& queue) {
    queue.resize(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) queue[i] = {scores[i], i};
    const auto before = [](const Scored& x, const Scored& y) {
        return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
    };
    if (k * 64 <= count) {
        std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), before);
        return;
    }
    std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), before);
    if (sorted) std::sort(queue.begin(), queue.begin() + k - 1, before);
}

void soften(float* values, int64_t count) {
    const float most = *std::max_element(values, values + count);
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i] = std::exp(values[i] - most);
    for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

// Experts in groups that are not among the best get `hidden_score`.
void hide_groups(const Route& route, float* scores, std::vector<Scored>& queue) {
    const int64_t size = route.num_experts / route.num_groups;
    std::vector<float> of_group(static_cast<size_t>(route.num_groups));
    for (int64_t group = 0; group < route.num_groups; ++group) {
        best(scores + group * size, size, route.best_of_group, true, queue);
        of_group[group] = 0;
        for (int32_t i = 0; i < route.best_of_group; ++i) of_group[group] += queue[i].first;
    }
    best(of_group.data(), route.num_groups, route.top_groups, false, queue);
    std::vector<bool> kept(static_cast<size_t>(route.num_groups), false);
    for (int32_t i = 0; i < route.top_groups; ++i) kept[queue[i].second] = true;
    for (int64_t i = 0; i < route.num_experts; ++i)
        if (!kept[i / size]) scores[i] = route.hidden_score;
}

// Ids and weights of SPARSE_MIXER; `gates` has room for as many as there are scores.
void mix(const Route& route, float* scores, float* gates, float* weights) {
    const int64_t count = route.num_experts;
    const auto rounded = [&](float value) {
        if (route.rounded) round_row(route.logits_type, &value, 1);
        return value;
    };
    const float furthest = rounded(route.jitter);
    std::vector<bool> taken(static_cast<size_t>(count), false);
    for (int64_t k = 0; k < route.top_k; ++k) {
        int64_t best = -1;
        for (int64_t i = 0; i < count; ++i)
            if (!taken[i] && (best < 0 || scores[i] > scores[best] || (std::isnan(scores[i]) && !std::isnan(scores[best])))) best = i;
        const float most = scores[best];
        float total = 0;
        for (int64_t i = 0; i < count; ++i) {
            const float distance = rounded(rounded(most - scores[i]) / std::max(std::fabs(scores[i]), most));
            gates[i] = taken[i] || distance > furthest ? 0.0f : std::exp(scores[i] - most);
            total += gates[i];
        }
        route.ids[k] = best;
        weights[k] = rounded(gates[best] / total);
        taken[best] = true;
    }
}

}  // namespace

void run_route(const Route& route, const float* logits, float* scores) {
    const int64_t count = route.num_experts, k = route.top_k;
    float *chosen_by = scores + count, *weights = scores + 2 * count;
    std::copy_n(logits, count, scores);
    if (route.scoring == SPARSE_MIXER) {
        mix(route, scores, chosen_by, weights);
        write_row(route.weights_type, weights, k, route.weights);
        return;
    }
    if (route.scoring == SOFTMAX) soften(scores, count);
    if (route.scoring == SIGMOID)
        for (int64_t i = 0; i < count; ++i) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
    const auto round = [&](float* values, int64_t num) {
        if (route.rounded) round_row(route.logits_type, values, num);
    };
    round(scores, count);
    for (int64_t i = 0; i < count; ++i) chosen_by[i] = scores[i] + (route.correction ? route.correction[i] : 0.0f);
    std::vector<Scored> queue;
    if (route.num_groups > 1) hide_groups(route, chosen_by, queue);
    best(chosen_by, count, k, route.sorted != 0, queue);
    for (int64_t i = 0; i < k; ++i) {
        route.ids[i] = queue[i].second;
        weights[i] = scores[queue[i].second];
    }
    if (route.scoring == SOFTMAX_OF_CHOSEN) soften(weights, k);
    if (route.scoring == SIGMOID_OF_CHOSEN)
        for (int64_t i = 0; i < k; ++i) weights[i] = 1.0f / (1.0f + std::exp(-weights[i]));
    round(weights, k);
    if (route.normalised) {
        float total = 0;
        for (int64_t i = 0; i < k; ++i) total += weights[i];
        round(&total, 1);
        total += route.added;
        round(&total, 1);
        for (int64_t i = 0; i < k; ++i) weights[i] /= total;
        round(weights, k);
    }
    for (int64_t i = 0; i < k; ++i) {
        weights[i] *= route.scale;
        if (route.expert_scale != nullptr) weights[i] *= route.expert_scale[route.ids[i]];
    }
    write_row(route.weights_type, weights, k, route.weights);
}

}  // namespace offmoe
