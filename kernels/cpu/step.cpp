// What a step reads: its tokens and where they are, from the tables; and the embeddings of tokens.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "parallel.h"

namespace manta {
namespace {

struct StepTables {
    const int64_t* token_table;   // [rows, max_len]
    const int32_t* block_tables;  // [groups, rows, max_blocks]
    int64_t groups, rows, max_len, max_blocks, block_size;
};

struct StepInputs {
    int64_t requests, tokens;
    int64_t *token_ids, *positions;  // [tokens]
    int64_t* slots;                  // [groups, tokens]
    int32_t* context_lens;           // [requests]
    int32_t* block_tables;           // [groups, requests, max_blocks]
};

// Where a group of layers keeps `count` tokens from `token` on, which are request i's.
void locate(const StepTables& t, int64_t group, int64_t i, int64_t row, int64_t token,
            int64_t count, const StepInputs& out) {
    const int64_t real_row = std::max<int64_t>(row, 0);  // any, if it only pads the batch
    const int32_t* blocks = t.block_tables + (group * t.rows + real_row) * t.max_blocks;
    std::copy_n(blocks, t.max_blocks,
                out.block_tables + (group * out.requests + i) * t.max_blocks);
    int64_t* slots = out.slots + group * out.tokens;
    for (int64_t j = token; j < token + count; ++j) {
        const int64_t position = out.positions[j];
        slots[j] = row < 0 ? -1
                           : blocks[position / t.block_size] * t.block_size +
                                 position % t.block_size;
    }
}

// Request i, which computes `count` tokens of a row from `start` on; they come at `token`.
void prepare_request(const StepTables& t, int64_t i, int64_t row, int64_t start, int64_t token,
                     int64_t count, const StepInputs& out) {
    const bool real = row >= 0;
    out.context_lens[i] = real ? start + count : 0;
    for (int64_t j = token; j < token + count; ++j) {
        const int64_t position = real ? start + j - token : 0;
        out.positions[j] = position;
        out.token_ids[j] = real ? t.token_table[row * t.max_len + position] : 0;
    }
    for (int64_t group = 0; group < t.groups; ++group) locate(t, group, i, row, token, count, out);
}

}  // namespace
}  // namespace manta

// As kernels.reference.prepare_step.
MANTA_API void manta_prepare_step(const int32_t* rows, const int32_t* starts,
                                  const int32_t* query_starts, int64_t requests, int64_t tokens,
                                  const int64_t* token_table, int64_t max_len,
                                  const int32_t* block_tables, int64_t groups, int64_t table_rows,
                                  int64_t max_blocks, int64_t block_size, int64_t* token_ids,
                                  int64_t* positions, int64_t* slots, int32_t* context_lens,
                                  int32_t* tables_out) {
    manta::run([=] {
        const manta::StepTables tables{token_table, block_tables, groups,    table_rows,
                                       max_len,     max_blocks,   block_size};
        const manta::StepInputs inputs{requests, tokens,       token_ids, positions,
                                       slots,    context_lens, tables_out};
        for (int64_t i = 0; i < requests; ++i)
            manta::prepare_request(tables, i, rows[i], starts[i], query_starts[i],
                                   query_starts[i + 1] - query_starts[i], inputs);
    });
}

// out[t] = weight[token_ids[t]], rows of `row_bytes`.
MANTA_API void manta_embed(const int64_t* token_ids, int64_t tokens, const char* weight,
                           int64_t row_bytes, char* out) {
    manta::run([=] {
        manta::parallel_for(tokens, row_bytes / 4, [=](int64_t t) {
            std::memcpy(out + t * row_bytes, weight + token_ids[t] * row_bytes, row_bytes);
        });
    });
}
