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

struct Split {
    int64_t request, kv_head, first_item, count;
};

struct Plan {
    std::vector<PromptItem> prompts;
    std::vector<DecodeItem> decodes;
    std::vector<Split> splits;
    std::vector<float> partials;
};

// Keys per decode item: a whole context, unless that leaves threads without work.
template <class T, class C>
int64_t keys_per_item(const Attention<T, C>& a, int threads) {
    constexpr int64_t MIN_KEYS = 256, ITEMS_PER_THREAD = 4;
    int64_t keys = 0;
    for (int64_t i = 0; i < a.requests; ++i)
        if (a.num_queries(i) == 1)
            keys += a.context_lens[i] - a.first_visible(a.context_lens[i] - 1);
    const int64_t fair = keys * a.kv_heads / (threads * ITEMS_PER_THREAD);
    return std::max(MIN_KEYS, (fair + TILE - 1) / TILE * TILE);
}

template <class T, class C>
void plan_decode(const Attention<T, C>& a, int64_t request, int64_t keys_each, Plan& plan) {
    const int64_t end = a.context_lens[request];
    const int64_t begin = a.first_visible(end - 1);
    const int64_t count = (end - begin + keys_each - 1) / keys_each;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
        const int64_t first = plan.decodes.size();
        if (count > 1) plan.splits.push_back({request, head, first, count});
        for (int64_t at = begin; at < end; at += keys_each)
            plan.decodes.push_back({request, head, at, std::min(at + keys_each, end), nullptr});
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
void make_plan(const Attention<T, C>& a, int threads, Plan& plan) {
    plan.prompts.clear();
    plan.decodes.clear();
    plan.splits.clear();
    const int64_t keys_each = keys_per_item(a, threads);
    for (int64_t i = 0; i < a.requests; ++i) {
        if (a.context_lens[i] == 0)  // it only pads the batch
            std::fill(a.out + a.row_offset(i, 0, 0), a.out + a.row_offset(i + 1, 0, 0), T{});
        else if (a.num_queries(i) == 1)
            plan_decode(a, i, keys_each, plan);
        else if (a.num_queries(i) > 1)
            plan_prompt(a, i, plan);
    }
    const int64_t size = DecodeAttention<T, C>::partial_size(a);
    int64_t parts = 0;
    for (const Split& split : plan.splits) parts += split.count;
    if (plan.partials.size() < static_cast<size_t>(parts * size)) plan.partials.resize(parts * size);
    float* next = plan.partials.data();
    for (const Split& split : plan.splits)
        for (int64_t i = 0; i < split.count; ++i, next += size)
            plan.decodes[split.first_item + i].partial = next;
}

template <class T, class C>
void paged_attention(const Attention<T, C>& a) {
    thread_local Plan plan_of_caller;  // kept for its memory
    Plan& plan = plan_of_caller;
    make_plan(a, num_threads(), plan);
    const int64_t prompts = plan.prompts.size(), decodes = plan.decodes.size();
    const int64_t splits = plan.splits.size();
    const DecodeAttention<T, C> decode(a);
    const PromptAttention<T, C> prompt(a);
    for_claimed(prompts + decodes, [&](int64_t i, int64_t) {
        if (i < prompts)
            prompt.run(plan.prompts[i]);
        else
            decode.run(plan.decodes[i - prompts]);
    });
    for_claimed(splits, [&](int64_t i, int64_t) {
        const Split& split = plan.splits[i];
        decode.combine(plan.decodes[split.first_item].partial, split.count, split.request,
                       split.kv_head);
    });
}

}  // namespace
}  // namespace manta

// q and out [tokens, heads, head_dim]; caches [blocks, kv_heads, block_size, head_dim], of q's dtype
// or Float8; head_dim a multiple of 16; window 0 sees everything. The rest is as in
// kernels.ops.Attention.attend.
MANTA_API void manta_paged_attention(int dtype, int has_float8_cache, const void* q,
                                     const void* k_cache, const void* v_cache,
                                     const int32_t* query_starts, const int32_t* context_lens,
                                     const int32_t* block_tables, void* out, int64_t requests,
                                     int64_t heads, int64_t kv_heads, int64_t head_dim,
                                     int64_t block_size, int64_t table_stride, int64_t window,
                                     float scale) {
    manta::dispatch_cache(dtype, has_float8_cache, [=](auto t, auto c) {
        using T = decltype(t);
        using C = decltype(c);
        manta::paged_attention<T, C>({(const T*)q, (const C*)k_cache, (const C*)v_cache,
                                      query_starts, context_lens, block_tables, (T*)out, requests,
                                      heads, kv_heads, head_dim, block_size, table_stride, window,
                                      scale});
    });
}
