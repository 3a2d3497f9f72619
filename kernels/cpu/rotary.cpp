// Query and key norm, rotary embedding and the store into the paged cache, in one pass over qkv.
#include "api.h"
#include "parallel.h"
#include "row.h"

namespace manta {
namespace {

constexpr int MAX_HEAD_DIM = 1024;

// T is the type of qkv, C that of the cache: T or Float8.
template <class T, class C>
struct Rotary {
    const T* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]
    int64_t heads, kv_heads, head_dim, block_size;
    const T *q_weight, *k_weight;  // [head_dim], or both null
    float eps;
    const int64_t* positions;  // [tokens]
    const float* cos_sin;      // [max position, head_dim]
    const int64_t* slots;      // [tokens]
    T* q_out;
    C *k_cache, *v_cache;

    // out = x, normed if there is a weight, its halves rotated.
    template <class Out>
    void rotate_head(const T* x, const T* weight, const float* cos, Out* out) const {
        float head[MAX_HEAD_DIM];
        const int64_t half = head_dim / 2;
        for_lanes(head_dim, [&](int64_t i, auto lanes) { lanes.store(head + i, lanes.load(x + i)); });
        if (weight) {
            scale_row(head, inverse_rms(head, head_dim, eps), weight, head, head_dim);
            for_lanes(head_dim, [&](int64_t i, auto lanes) {
                lanes.store(head + i, round_to<T>(lanes.load(head + i)));
            });
        }
        for_lanes(half, [&](int64_t i, auto lanes) {
            const Floats first = lanes.load(head + i), second = lanes.load(head + half + i);
            const Floats c = lanes.load(cos + i), s = lanes.load(cos + half + i);
            lanes.store(out + i, round_to<T>(first * c - second * s));
            lanes.store(out + half + i, round_to<T>(second * c + first * s));
        });
    }

    void run_token(int64_t token) const {
        const T* q = qkv + token * (heads + 2 * kv_heads) * head_dim;
        const T* k = q + heads * head_dim;
        const T* v = k + kv_heads * head_dim;
        const float* cos = cos_sin + positions[token] * head_dim;
        for (int64_t h = 0; h < heads; ++h)
            rotate_head(q + h * head_dim, q_weight, cos, q_out + (token * heads + h) * head_dim);
        if (slots[token] < 0) return;  // its keys and values are kept nowhere
        const int64_t block = slots[token] / block_size, offset = slots[token] % block_size;
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t row = ((block * kv_heads + h) * block_size + offset) * head_dim;
            rotate_head(k + h * head_dim, k_weight, cos, k_cache + row);
            for_lanes(head_dim, [&](int64_t i, auto lanes) {
                lanes.store(v_cache + row + i, lanes.load(v + h * head_dim + i));
            });
        }
    }
};

}  // namespace
}  // namespace manta

// See Rotary for the shapes; q_out [tokens, heads, head_dim]; the caches are
// [blocks, kv_heads, block_size, head_dim].
MANTA_API void manta_norm_rotary_store(int dtype, int has_float8_cache, const void* qkv,
                                       int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t block_size,
                                       const void* q_weight, const void* k_weight, float eps,
                                       const int64_t* positions, const float* cos_sin,
                                       const int64_t* slots, void* q_out, void* k_cache,
                                       void* v_cache) {
    manta::dispatch_cache(dtype, has_float8_cache, [=](auto t, auto c) {
        using T = decltype(t);
        using C = decltype(c);
        const manta::Rotary<T, C> rotary{(const T*)qkv, heads, kv_heads, head_dim, block_size,
                                      (const T*)q_weight, (const T*)k_weight, eps, positions,
                                      cos_sin, slots, (T*)q_out, (C*)k_cache, (C*)v_cache};
        manta::parallel_for(tokens, (heads + 2 * kv_heads) * head_dim,
                            [&](int64_t token) { rotary.run_token(token); });
    });
}
