// Sampling by inverse CDF, a few reads of each row of logits and no copy of it.
//
// min_p, top_k and top_p all keep a prefix of the tokens ordered by logit (ties by id). So each is
// a cutoff: the last token of that order which stays. Finding it takes no sort of the vocabulary.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "parallel.h"
#include "row.h"

namespace manta {
namespace {

// Tokens are looked at in chunks, whose maxima and masses tell which ones matter.
constexpr int64_t CHUNK = 256;

struct Candidate {
    float logit;
    int32_t token;
    // Whether it comes before another in the order from most to least probable.
    bool operator<(const Candidate& other) const {
        return logit > other.logit || (logit == other.logit && token < other.token);
    }
};

uint64_t mix(uint64_t x) {  // the finalizer of splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// In [0, 1), as kernels.reference.uniform.
double uniform(int64_t seed, int64_t position) {
    const uint64_t step = (static_cast<uint64_t>(position) + 1) * 0x9E3779B97F4A7C15u;
    return static_cast<double>(mix(mix(seed) + step) >> 11) * 0x1p-53;
}

struct Params {
    float temperature;
    int64_t top_k;
    float top_p, min_p;
};

template <class T>
class Row {
public:
    Row(const T* logits, int64_t vocab) : logits(logits), vocab(vocab) {
        chunk_maxima.resize((vocab + CHUNK - 1) / CHUNK);
        masses.resize(chunk_maxima.size());
        int64_t best = 0;
        for (int64_t c = 0; c < num_chunks(); ++c) {
            chunk_maxima[c] = chunk_maximum(c);
            if (chunk_maxima[c] > chunk_maxima[best]) best = c;
        }
        highest = chunk_maxima[best];
        best_token = find_highest(best);
    }

    int64_t greedy() const { return best_token; }

    // As kernels.reference.top_logprobs, for one row; `ids` and `logprobs` have 1 + count places.
    void top_logprobs(int64_t token, int64_t count, int64_t* ids, float* logprobs, int64_t* rank) {
        scale = LOG2_E;
        last = {-INFINITY, INT32_MAX};
        const double log_sum = highest + std::log(weigh_chunks());
        const float own = logit(token);
        ids[0] = token;
        logprobs[0] = static_cast<float>(own - log_sum);
        *rank = 1 + count_above(own);
        if (count == 0) return;
        const std::vector<Candidate> top = find_top(count);
        for (int64_t i = 0; i < count; ++i) {
            ids[1 + i] = top[i].token;
            logprobs[1 + i] = static_cast<float>(top[i].logit - log_sum);
        }
    }

    int64_t sample(const Params& params, double uniform) {
        scale = std::min(LOG2_E / params.temperature, 1e30f);  // finite, for 0 * scale to be 0
        min_weight = params.min_p;
        last = {-INFINITY, INT32_MAX};
        if (params.top_k > 0 && params.top_k < vocab) last = find_top_k(params.top_k);
        double mass = weigh_chunks();
        if (params.top_p < 1.0f) {
            last = find_top_p(params.top_p * mass);
            mass = weigh_chunks();
        }
        return draw(uniform * mass);
    }

private:
    int64_t num_chunks() const { return chunk_maxima.size(); }
    int64_t chunk_size(int64_t c) const { return std::min(CHUNK, vocab - c * CHUNK); }

    float logit(int64_t token) const { return to_float(logits[token]); }

    float chunk_maximum(int64_t c) const {
        Floats best = broadcast(-INFINITY);
        for_lanes(chunk_size(c), [&](int64_t i, auto lanes) {
            const Floats x = lanes.load(logits + c * CHUNK + i);
            best = max(best, mask_tail(x, lanes, -INFINITY));
        });
        return maximum(best);
    }

    static Floats mask_tail(Floats x, AllLanes, float) { return x; }
    static Floats mask_tail(Floats x, FirstLanes lanes, float rest) {
        return iota() < static_cast<int32_t>(lanes.count) ? x : broadcast(rest);
    }

    int64_t find_highest(int64_t c) const {
        for (int64_t token = c * CHUNK; token < c * CHUNK + chunk_size(c); ++token)
            if (logit(token) == highest) return token;
        return c * CHUNK;  // nothing but NaN
    }

    int64_t count_above(float bound) const {
        int64_t count = 0;
        for (int64_t c = 0; c < num_chunks(); ++c) {
            if (!(chunk_maxima[c] > bound)) continue;
            for (int64_t token = c * CHUNK; token < c * CHUNK + chunk_size(c); ++token)
                count += logit(token) > bound;
        }
        return count;
    }

    // The k-th token.
    Candidate find_top_k(int64_t k) const {
        std::vector<Candidate> candidates = top_candidates(k);
        if (k > static_cast<int64_t>(candidates.size())) return last;  // NaN among the logits
        std::nth_element(candidates.begin(), candidates.begin() + k - 1, candidates.end());
        return candidates[k - 1];
    }

    // The first k tokens, in order.
    std::vector<Candidate> find_top(int64_t k) const {
        std::vector<Candidate> candidates = top_candidates(k);
        while (static_cast<int64_t>(candidates.size()) < k)  // NaN among the logits
            candidates.push_back({-INFINITY, 0});
        std::partial_sort(candidates.begin(), candidates.begin() + k, candidates.end());
        return candidates;
    }

    // Tokens among which the first k are. At least k tokens are as high as the k-th highest chunk
    // maximum, and only the chunks that reach it can hold one of the first k.
    std::vector<Candidate> top_candidates(int64_t k) const {
        float bound = -INFINITY;
        if (k <= num_chunks()) {
            std::vector<float> maxima = chunk_maxima;
            std::nth_element(maxima.begin(), maxima.begin() + k - 1, maxima.end(),
                             std::greater<float>());
            bound = maxima[k - 1];
        }
        std::vector<Candidate> candidates;
        for (int64_t c = 0; c < num_chunks(); ++c) {
            if (chunk_maxima[c] < bound) continue;
            for (int64_t token = c * CHUNK; token < c * CHUNK + chunk_size(c); ++token) {
                const float x = logit(token);
                if (x >= bound) candidates.push_back({x, static_cast<int32_t>(token)});
            }
        }
        return candidates;
    }

    // Weights e^((logit - highest) / temperature) of one chunk, 0 for what is cut off.
    Floats weigh_chunk(int64_t c, float* weights) const {
        Floats total = {};
        const T* from = logits + c * CHUNK;
        for_lanes(chunk_size(c), [&](int64_t i, auto lanes) {
            const Floats x = mask_tail(lanes.load(from + i), lanes, -INFINITY);
            const Floats weight = exp2((x - highest) * scale);
            const Ints ids = iota() + static_cast<int32_t>(c * CHUNK + i);
            const Ints kept = ((x > last.logit) | ((x == last.logit) & (ids <= last.token))) &
                              (weight >= min_weight);
            const Floats kept_weight = kept ? weight : Floats{};
            store(weights + i, kept_weight);
            total += kept_weight;
        });
        return total;
    }

    double weigh_chunks() {
        double total = 0;
        float weights[CHUNK];
        for (int64_t c = 0; c < num_chunks(); ++c) {
            masses[c] = chunk_maxima[c] < last.logit ? 0 : sum(weigh_chunk(c, weights));
            total += masses[c];
        }
        return total;
    }

    // body(token, weight) for every token that is still in.
    template <class Body>
    void for_kept(const Body& body) const {
        float weights[CHUNK];
        for (int64_t c = 0; c < num_chunks(); ++c) {
            if (masses[c] == 0) continue;
            weigh_chunk(c, weights);
            for (int64_t i = 0; i < chunk_size(c); ++i)
                if (weights[i] > 0) body(c * CHUNK + i, weights[i]);
        }
    }

    // The last token before which less than `budget` lies. A histogram over the logits tells in
    // which of its buckets that is, so that only this one is sorted.
    Candidate find_top_p(double budget) const {
        constexpr int BUCKETS = 1024, PER_OCTAVE = 16;
        const auto bucket_of = [&](float x) {
            const float place = (highest - x) * (scale * PER_OCTAVE);
            if (!(place > 0)) return 0;  // below with NaN among the logits, which hides the highest
            return static_cast<int>(std::min(place, BUCKETS - 1.0f));
        };
        std::vector<double> histogram(BUCKETS);
        for_kept([&](int64_t token, float w) { histogram[bucket_of(logit(token))] += w; });
        double before = 0;
        int bucket = 0;
        while (bucket < BUCKETS - 1 && before + histogram[bucket] < budget)
            before += histogram[bucket++];

        std::vector<std::pair<Candidate, float>> members;
        for_kept([&](int64_t token, float w) {
            const float x = logit(token);
            if (bucket_of(x) == bucket) members.push_back({{x, static_cast<int32_t>(token)}, w});
        });
        std::sort(members.begin(), members.end());
        Candidate cutoff = members.empty() ? last : members[0].first;
        for (const auto& [candidate, weight] : members) {
            if (before >= budget) break;
            cutoff = candidate;
            before += weight;
        }
        return cutoff;
    }

    // The first token, in order of ids, up to which more than `target` lies.
    int64_t draw(double target) const {
        int64_t chunk = -1;
        for (int64_t c = 0; c < num_chunks(); ++c) {
            if (masses[c] == 0) continue;
            chunk = c;  // of several, the last one must do if rounding exhausts them all
            if (target < masses[c]) break;
            target -= masses[c];
        }
        if (chunk < 0) return best_token;  // NaN among the logits
        float weights[CHUNK];
        weigh_chunk(chunk, weights);
        int64_t token = best_token;
        for (int64_t i = 0; i < chunk_size(chunk); ++i) {
            if (weights[i] == 0) continue;
            token = chunk * CHUNK + i;
            if (target < weights[i]) break;
            target -= weights[i];
        }
        return token;
    }

    const T* logits;
    const int64_t vocab;
    std::vector<float> chunk_maxima;
    std::vector<double> masses;
    float highest, scale = 0, min_weight = 0;
    int64_t best_token;
    Candidate last{};
};

}  // namespace
}  // namespace manta

// As kernels.reference.sample: logits [num_rows, vocab], rows `stride` apart; a column of the table
// each, then [num_rows].
MANTA_API void manta_sample(int dtype, const void* logits, int64_t num_rows, int64_t vocab,
                            int64_t stride, const float* temperature, const int64_t* top_k,
                            const float* top_p, const float* min_p, const int64_t* seeds,
                            const int64_t* rows, const int64_t* positions, int64_t* tokens) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::parallel_for(num_rows, vocab, [&](int64_t i) {
            manta::Row<T> row((const T*)logits + i * stride, vocab);
            const int64_t r = rows[i];
            tokens[i] = temperature[r] == 0
                            ? row.greedy()
                            : row.sample({temperature[r], top_k[r], top_p[r], min_p[r]},
                                         manta::uniform(seeds[r], positions[i]));
        });
    });
}

// As kernels.reference.top_logprobs: token_ids and ranks [rows], ids and logprobs [rows, 1 + count].
MANTA_API void manta_top_logprobs(int dtype, const void* logits, int64_t rows, int64_t vocab,
                                  int64_t stride, int64_t count, const int64_t* token_ids,
                                  int64_t* ids, float* logprobs, int64_t* ranks) {
    manta::dispatch(dtype, [=](auto t) {
        using T = decltype(t);
        manta::parallel_for(rows, vocab, [&](int64_t i) {
            manta::Row<T>((const T*)logits + i * stride, vocab)
                .top_logprobs(token_ids[i], count, ids + i * (1 + count),
                              logprobs + i * (1 + count), ranks + i);
        });
    });
}

// As kernels.reference.apply_bitmask; rows of logits are `stride` apart, bitmasks end to end.
MANTA_API void manta_apply_bitmask(float* logits, int64_t rows, int64_t vocab, int64_t stride,
                                   const uint32_t* bitmask) {
    const int64_t words = (vocab + 31) / 32;
    manta::parallel_for(rows, vocab, [&](int64_t i) {
        for (int64_t w = 0; w < words; ++w) {
            const uint32_t allowed = bitmask[i * words + w];
            if (allowed == UINT32_MAX) continue;
            float* row = logits + i * stride + w * 32;
            const int64_t count = std::min<int64_t>(32, vocab - w * 32);
            for (int64_t b = 0; b < count; ++b)
                if (!(allowed >> b & 1)) row[b] = -INFINITY;
        }
    });
}
