// Paged attention: cut the step into work items of similar size, and run them on all threads.
//
// The method is that of FlashAttention (Dao et al., 2022) and, for long contexts of few requests,
// Flash-Decoding (Dao et al., 2023), on the paged cache of vLLM (Kwon et al., SOSP 2023).
#include "attention.h"

#include "api.h"
#include "attention_decode.h"
#include "attention_prompt.h"
#include "parallel.h"

namespace manta {
namespace {

// A context in several items; which of them is done last folds their results.
struct Split {
    int64_t request, kv_head, count, left;
    float* partials;
};

struct Plan {
    std::vector<PromptItem> prompts;
    std::vector<DecodeItem> decodes;
    std::vector<Split> splits;
    std::vector<float> partials;
};

template <class T, class C>
void plan_decode(const Attention<T, C>& a, int64_t request, Plan& plan) {
    const int64_t end = a.context_lens[request];
    const int64_t begin = a.first_visible(end - 1);
    const int64_t first_part = begin / PART, count = (end - 1) / PART + 1 - first_part;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
        const int64_t split = count > 1 ? plan.splits.size() : -1;
        if (count > 1) plan.splits.push_back({request, head, count, count, nullptr});
        for (int64_t part = first_part; part < first_part + count; ++part)
            plan.decodes.push_back({request, head, std::max(part * PART, begin),
                                    std::min((part + 1) * PART, end), split, nullptr});
    }
}

// Equal tiles of whole registers; the last ones, which see most keys, come first.
template <class T, class C>
void plan_prompt(const Attention<T, C>& a, int64_t request, Plan& plan) {
    const int64_t rows = a.num_queries(request) * a.group();
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    const int64_t rows_each = ((rows + tiles - 1) / tiles + WIDTH - 1) / WIDTH * WIDTH;
    for (int64_t begin = (rows - 1) / rows_each * rows_each; begin >= 0; begin -= rows_each)
        for (int64_t head = 0; head < a.kv_heads; ++head)
            plan.prompts.push_back({request, head, begin, std::min(begin + rows_each, rows)});
}

template <class T, class C>
void make_plan(const Attention<T, C>& a, Plan& plan) {
    plan.prompts.clear();
    plan.decodes.clear();
    plan.splits.clear();
    for (int64_t i = 0; i < a.requests; ++i) {
        if (a.context_lens[i] == 0)  // it only pads the batch
            std::fill(a.out + a.row_offset(i, 0, 0), a.out + a.row_offset(i + 1, 0, 0), T{});
        else if (a.num_queries(i) == 1)
            plan_decode(a, i, plan);
        else if (a.num_queries(i) > 1)
            plan_prompt(a, i, plan);
    }
    const int64_t size = DecodeAttention<T, C>::partial_size(a);
    const int64_t parts = std::count_if(plan.decodes.begin(), plan.decodes.end(),
                                        [](const DecodeItem& item) { return item.split >= 0; });
    if (plan.partials.size() < static_cast<size_t>(parts * size)) plan.partials.resize(parts * size);
    float* next = plan.partials.data();
    for (DecodeItem& item : plan.decodes) {
        if (item.split < 0) continue;
        Split& split = plan.splits[item.split];
        if (split.partials == nullptr) split.partials = next;
        item.partial = std::exchange(next, next + size);
    }
}

template <class T, class C>
void paged_attention(const Attention<T, C>& a) {
    thread_local Plan plan_of_caller;  // kept for its memory
    Plan& plan = plan_of_caller;
    make_plan(a, plan);
    const int64_t prompts = plan.prompts.size(), decodes = plan.decodes.size();
    const DecodeAttention<T, C> decode(a);
    const PromptAttention<T, C> prompt(a);
    for_claimed(prompts + decodes, [&](int64_t i, int64_t) {
        if (i < prompts) return prompt.run(plan.prompts[i]);
        const DecodeItem& item = plan.decodes[i - prompts];
        decode.run(item);
        if (item.split < 0) return;
        Split& split = plan.splits[item.split];
        if (__atomic_sub_fetch(&split.left, 1, __ATOMIC_ACQ_REL) == 0)
            decode.combine(split.partials, split.count, split.request, split.kv_head);
    });
}

}  // namespace
}  // namespace manta

// q and out [tokens, heads, head_dim]; caches [blocks, kv_heads, block_size, head_dim], of q's dtype
// or Float8; head_dim a multiple of 16; window 0 sees everything, softcap 0 is none; sinks
// [heads] of q's dtype, or null. The rest is as in kernels.ops.Attention.attend.
MANTA_API void manta_paged_attention(int dtype, int has_float8_cache, const void* q,
                                     const void* k_cache, const void* v_cache,
                                     const int32_t* query_starts, const int32_t* context_lens,
                                     const int32_t* block_tables, void* out, int64_t requests,
                                     int64_t heads, int64_t kv_heads, int64_t head_dim,
                                     int64_t block_size, int64_t table_stride, int64_t window,
                                     float scale, float softcap, const void* sinks) {
    manta::dispatch_cache(dtype, has_float8_cache, [=](auto t, auto c) {
        using T = decltype(t);
        using C = decltype(c);
        manta::paged_attention<T, C>({(const T*)q, (const C*)k_cache, (const C*)v_cache,
                                      query_starts, context_lens, block_tables, (T*)out, requests,
                                      heads, kv_heads, head_dim, block_size, table_stride, window,
                                      scale, softcap, (const T*)sinks});
    });
}
