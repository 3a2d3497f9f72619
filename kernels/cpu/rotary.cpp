// What lies between the qkv projection and attention: head norms, rotary embedding and the store
// into the paged cache, in one pass over qkv, and the last two each on its own.
#include "api.h"
#include "parallel.h"
#include "row.h"

namespace manta {
namespace {

constexpr int MAX_HEAD_DIM = 1024;

// out = x, normed if there is a weight, its halves rotated. cos: cosines, then sines.
template <class T, class Out>
void rotate_head(const T* x, int64_t head_dim, const T* weight, float eps, const float* cos,
                 Out* out) {
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

template <class T, class C>
void copy_head(const T* x, int64_t head_dim, C* out) {
    for_lanes(head_dim, [&](int64_t i, auto lanes) { lanes.store(out + i, lanes.load(x + i)); });
}

struct CacheShape {
    int64_t kv_heads, head_dim, block_size;

    // Where a cache has the row of a slot's first head; those of the others follow `head_step` on.
    int64_t row(int64_t slot) const {
        return (slot / block_size * kv_heads * block_size + slot % block_size) * head_dim;
    }
    int64_t head_step() const { return block_size * head_dim; }
};

// T is the type of qkv, C that of the cache: T or Float8.
template <class T, class C>
struct NormRotaryStore {
    const T* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]
    int64_t heads;
    CacheShape shape;
    const T *q_weight, *k_weight;  // [head_dim], or both null
    float eps;
    const int64_t* positions;  // [tokens]
    const float* cos_sin;      // [max position, head_dim]
    const int64_t* slots;      // [tokens]
    T* q_out;
    C *k_cache, *v_cache;

    void run_token(int64_t token) const {
        const int64_t dim = shape.head_dim;
        const T* q = qkv + token * (heads + 2 * shape.kv_heads) * dim;
        const T* k = q + heads * dim;
        const T* v = k + shape.kv_heads * dim;
        const float* cos = cos_sin + positions[token] * dim;
        for (int64_t h = 0; h < heads; ++h)
            rotate_head(q + h * dim, dim, q_weight, eps, cos, q_out + (token * heads + h) * dim);
        if (slots[token] < 0) return;  // its keys and values are kept nowhere
        int64_t row = shape.row(slots[token]);
        for (int64_t h = 0; h < shape.kv_heads; ++h, row += shape.head_step()) {
            rotate_head(k + h * dim, dim, k_weight, eps, cos, k_cache + row);
            copy_head(v + h * dim, dim, v_cache + row);
        }
    }
};

}  // namespace
}  // namespace manta

// See NormRotaryStore for the shapes; q_out [tokens, heads, head_dim]; the caches are
// [blocks, kv_heads, block_size, head_dim].
MANTA_API void manta_norm_rotary_store(int dtype, int has_float8_cache, const void* qkv,
                                       int64_t tokens, int64_t heads, int64_t kv_heads,
                                       int64_t head_dim, int64_t block_size, const void* q_weight,
                                       const void* k_weight, float eps, const int64_t* positions,
                                       const float* cos_sin, const int64_t* slots, void* q_out,
                                       void* k_cache, void* v_cache) {
    manta::dispatch_cache(dtype, has_float8_cache, [=](auto t, auto c) {
        using T = decltype(t);
        using C = decltype(c);
        const manta::NormRotaryStore<T, C> work{
            (const T*)qkv, heads, {kv_heads, head_dim, block_size}, (const T*)q_weight,
            (const T*)k_weight, eps, positions, cos_sin, slots, (T*)q_out, (C*)k_cache,
            (C*)v_cache};
        manta::parallel_for(tokens, (heads + 2 * kv_heads) * head_dim,
                            [&](int64_t token) { work.run_token(token); });
    });
}

// out [tokens, heads, head_dim] = x, whose tokens are `stride` apart, rotated.
MANTA_API void manta_rotary(int dtype, const void* x, int64_t stride, int64_t tokens,
                            int64_t heads, int64_t head_dim, const int64_t* positions,
                            const float* cos_sin, void* out) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::parallel_for(tokens, heads * head_dim, [=](int64_t token) {
            for (int64_t h = 0; h < heads; ++h)
                manta::rotate_head<T>((const T*)x + token * stride + h * head_dim, head_dim,
                                      nullptr, 0.0f, cos_sin + positions[token] * head_dim,
                                      (T*)out + (token * heads + h) * head_dim);
        });
    });
}

// k and v [tokens, kv_heads, head_dim], tokens k_stride and v_stride apart, into the caches.
MANTA_API void manta_store(int dtype, int has_float8_cache, const void* k, int64_t k_stride,
                           const void* v, int64_t v_stride, int64_t tokens, int64_t kv_heads,
                           int64_t head_dim, int64_t block_size, const int64_t* slots,
                           void* k_cache, void* v_cache) {
    manta::dispatch_cache(dtype, has_float8_cache, [=](auto t, auto c) {
        using T = decltype(t);
        using C = decltype(c);
        const manta::CacheShape shape{kv_heads, head_dim, block_size};
        manta::parallel_for(tokens, 2 * kv_heads * head_dim, [=](int64_t token) {
            if (slots[token] < 0) return;  // kept nowhere
            int64_t row = shape.row(slots[token]);
            for (int64_t h = 0; h < kv_heads; ++h, row += shape.head_step()) {
                manta::copy_head((const T*)k + token * k_stride + h * head_dim, head_dim,
                                 (C*)k_cache + row);
                manta::copy_head((const T*)v + token * v_stride + h * head_dim, head_dim,
                                 (C*)v_cache + row);
            }
        });
    });
}
