// Writes a step's tokens to the paged cache (kv_pages.py, V along tokens): keys times their head's matrix, both in
// 16 bits, keys and whole tiles of values as NVFP4 with searched scales, the bits of search.py.
//
// One launch has three kinds of blocks, for one KV head each (head_blocks.cuh):
// * keys: ROWS * 16 tokens of the step, whosever they are.
// * values: ROWS tiles of 16 tokens of a request that this step completes. Their tokens come from the step's values,
//   or from 16-bit pages where they were written before.
// * queries, if QUERIES: 16 rows of the step's queries (query_rows.cuh) times their matrix, so that a decoding step needs
//   no launch for them.
//
// Macros: those of head_blocks.cuh, QUERIES, PAGE and FULL_PAGE (tokens), K_OFFSETS, V_OFFSETS: the candidates of
// either, ascending. 1 / V's tensor scale, v_reciprocal, must be a power of two.

#include "query_rows.cuh"

static_assert(MATRIX && ROWS == 1 || !QUERIES);

constexpr int GROUPS = D / COLUMNS;  // blocks of a row
constexpr int K_SCALES = PAGE * D / 2, V_CODES = PAGE * D * 9 / 16, V_SCALES = V_CODES + PAGE * D / 2;
using KeyPolicy = Candidates<K_OFFSETS>;
using ValuePolicy = Candidates<V_OFFSETS>;

__device__ constexpr Lookup<KeyPolicy> key_lookup = lookup_of<KeyPolicy>();
__device__ constexpr Lookup<ValuePolicy> value_lookup = lookup_of<ValuePolicy>();

struct Arguments {
    u8* pages;
    u16* full;
    const long long *slots, *full_slots;
    const u16 *k, *v;
    const uint4* matrix;
    const int *query_start_loc, *seq_lens, *block_table, *full_block_table;
    float v_reciprocal;
    int single, tokens, requests, key_blocks, k_stride, k_head_stride, v_stride, v_head_stride;
    int page_stride, head_stride, full_stride, full_head_stride, table_stride, full_table_stride;
    Queries queries;
    u16* transformed;
    const uint4* q_matrix;
    int query_blocks;
};

// Where a token's key goes, from the beginning of the pages; negative where it is not written.
struct Row {
    long long full, codes, scales;
};

// Where a tile of values goes, from the beginning of the pages; negative where there is none.
struct Tile {
    long long codes, scales;
};

union Place {
    Row rows[TOKENS];
    struct {
        Tile tiles[ROWS];
        const u16* from[TOKENS];  // values of each token
    };
};

constexpr int LOOKUP = sizeof(Lookup<KeyPolicy>) > sizeof(Lookup<ValuePolicy>) ? sizeof(Lookup<KeyPolicy>)
                                                                               : sizeof(Lookup<ValuePolicy>);

using Shared = Memory<Place, LOOKUP>;

// --- keys ------------------------------------------------------------------------------------------

__device__ __forceinline__ void write_keys(const Arguments& a, Shared& memory, int index, int head) {
    constexpr int WIDE = COLUMNS / 8, COUNT = TOKENS * WIDE;
    const int first = index / GROUPS * TOKENS, column = index % GROUPS * COLUMNS;
    const int tokens = min(a.tokens - first, TOKENS);
    const u16* k = a.k + static_cast<long long>(head) * a.k_head_stride + static_cast<long long>(first) * a.k_stride;
    const u16* v =
        a.v + static_cast<long long>(head) * a.v_head_stride + static_cast<long long>(first) * a.v_stride + column;
    u16* full = a.full + static_cast<long long>(head) * a.full_head_stride + column;
    // All loads are on their way before anything waits for one of them.
    share<TOKENS * (D / 8)>([&](int i, int) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        copy_async(memory.tokens + row * PITCH + 16 * chunk,
                   k + (row < tokens ? static_cast<long long>(row) * a.k_stride : 0) + 8 * chunk, row < tokens);
    });
    u32 values[(COUNT + THREADS - 1) / THREADS][4];
    share<COUNT>([&](int i, int n) {
        if (i / WIDE < tokens)
            load_words<4>(values[n], reinterpret_cast<const u8*>(
                v + static_cast<long long>(i / WIDE) * a.v_stride + i % WIDE * 8));
    });
    if (threadIdx.x < TOKENS) {
        const int token = first + threadIdx.x;
        const long long slot = token < a.tokens ? a.slots[token] : -1;
        Row row = {-1, -1, -1};
        if (slot >= 0) {
            const long long full_slot = a.full_slots[token];
            const int inside = static_cast<int>(slot % PAGE);
            const long long page = slot / PAGE * a.page_stride + head * static_cast<long long>(a.head_stride);
            row.full = full_slot / FULL_PAGE * a.full_stride + full_slot % FULL_PAGE * (2 * D);
            row.codes = page + inside * (D / 2);
            row.scales = page + K_SCALES + inside * (D / 16);
        }
        memory.place.rows[threadIdx.x] = row;
    }
    wait_for_copies();
    __syncthreads();
    share<COUNT>([&](int i, int n) {
        const long long to = memory.place.rows[i / WIDE].full;
        if (to >= 0)
            *reinterpret_cast<uint4*>(full + to + D + i % WIDE * 8) =
                make_uint4(values[n][0], values[n][1], values[n][2], values[n][3]);
    });
    if (MATRIX) transform_rows(memory, matrix_of(a.matrix, head, column), column);
    share<COUNT>([&](int i, int) {
        const long long to = memory.place.rows[i / WIDE].full;
        if (to >= 0)
            *reinterpret_cast<uint4*>(full + to + i % WIDE * 8) = *reinterpret_cast<const uint4*>(
                memory.tokens + i / WIDE * PITCH + 2 * column + 16 * (i % WIDE));
    });
    auto present = [&](int item) { return true; };
    auto at = [&](int item) {
        return memory.tokens + item / (COLUMNS / 16) * PITCH + 2 * column + item % (COLUMNS / 16) * 32;
    };
    auto store = [&](int item, const u32 (&words)[4], int code) {
        const int index = column / 16 + item % (COLUMNS / 16);
        const bool second = index % 2;
        u32 both[2];
        paired<1>(words, second, both);
        const Row& row = memory.place.rows[item / (COLUMNS / 16)];
        if (row.codes < 0) return;
        u8* codes = a.pages + row.codes + second * (D / 4) + 4 * (index / 2);
        *reinterpret_cast<u32*>(codes) = both[0];
        *reinterpret_cast<u32*>(codes + D / 8) = both[1];
        a.pages[row.scales + index] = code;
    };
    quantize_blocks<KeyPolicy, ROWS * COLUMNS>(memory, 1.0f, present, at, store);
}

// --- values ----------------------------------------------------------------------------------------

// Row threadIdx.x of the block's tiles: where its values are, and by the first of a tile where that goes. Returns
// whether there is a tile.
__device__ __forceinline__ bool find_row(const Arguments& a, Shared& memory, int index, int head) {
    const int i = threadIdx.x % 16;
    Tile& found = memory.place.tiles[threadIdx.x / 16];
    if (i == 0) found.codes = -1;
    int request = index;
    if (!a.single) {
        // Request r has the indices from query_start_loc[r] / 16 + r on, as many as it can need or one more.
        int low = 0, high = a.requests;
        while (low < high) {
            const int middle = (low + high) / 2;
            if (a.query_start_loc[middle] / 16 + middle <= index) low = middle + 1;
            else high = middle;
        }
        request = low - 1;
    }
    if (request >= a.requests) return false;
    const int start = a.query_start_loc[request], length = a.seq_lens[request];
    const int context = length - (a.query_start_loc[request + 1] - start);
    const int tile = context / 16 + (a.single ? 0 : index - (start / 16 + request));
    if (tile * 16 + 16 > length) return false;
    const int token = tile * 16 + i;
    if (token >= context) {
        memory.place.from[threadIdx.x] = a.v + static_cast<long long>(head) * a.v_head_stride +
            static_cast<long long>(start + token - context) * a.v_stride;
    } else {
        const int page =
            a.full_block_table[static_cast<long long>(request) * a.full_table_stride + token / FULL_PAGE];
        memory.place.from[threadIdx.x] = a.full + static_cast<long long>(head) * a.full_head_stride +
            static_cast<long long>(page) * a.full_stride + token % FULL_PAGE * (2 * D) + D;
    }
    if (i == 0) {
        const long long page = a.block_table[static_cast<long long>(request) * a.table_stride + tile * 16 / PAGE];
        const int inside = tile * 16 % PAGE / 16;
        const long long to = page * a.page_stride + head * static_cast<long long>(a.head_stride);
        found.codes = to + V_CODES + inside * (D * 8);
        found.scales = to + V_SCALES + inside * D;
    }
    return true;
}

__device__ __forceinline__ void write_tiles(const Arguments& a, Shared& memory, int index, int head) {
    constexpr int WIDE = D / 8;
    const Tile* tiles = memory.place.tiles;
    const bool found = threadIdx.x < TOKENS && find_row(a, memory, index * ROWS + threadIdx.x / 16, head);
    if (!__syncthreads_or(found)) return;
    share<TOKENS * WIDE>([&](int i, int) {
        const int row = i / WIDE, chunk = i % WIDE;
        if (tiles[row / 16].codes >= 0)
            copy_async(memory.tokens + row * PITCH + 16 * chunk, memory.place.from[row] + 8 * chunk, true);
    });
    wait_for_copies();
    __syncthreads();
    // From rows of channels to blocks of tokens, in place.
    u32 words[STEPS][8];
    share<ROWS * D>([&](int item, int step) {
        const u8* from = memory.tokens + item / D * (16 * PITCH) + item % D * 2;
#pragma unroll
        for (int i = 0; i < 8; i++)
            words[step][i] = *reinterpret_cast<const u16*>(from + 2 * i * PITCH) |
                static_cast<u32>(*reinterpret_cast<const u16*>(from + (2 * i + 1) * PITCH)) << 16;
    });
    __syncthreads();
    share<ROWS * D>([&](int item, int step) {
        uint4* to = reinterpret_cast<uint4*>(memory.tokens + item * 32);
        to[0] = make_uint4(words[step][0], words[step][1], words[step][2], words[step][3]);
        to[1] = make_uint4(words[step][4], words[step][5], words[step][6], words[step][7]);
    });

    auto present = [&](int item) { return tiles[item / D].codes >= 0; };
    auto at = [&](int item) { return memory.tokens + item * 32; };
    auto store = [&](int item, const u32 (&words)[4], int code) {
        const int channel = item % D, m = channel / 16, g = channel % 8;
        const bool second = channel / 8 % 2;
        u32 both[2];
        paired<8>(words, second, both);
        const int chunk = m / 4, width = min(4, D / 16 - 4 * chunk);
        u8* codes = a.pages + tiles[item / D].codes + chunk * 512 + (4 * g + 2 * second) * (4 * width) + m % 4 * 4;
        *reinterpret_cast<u32*>(codes) = both[0];
        *reinterpret_cast<u32*>(codes + 4 * width) = both[1];
        a.pages[tiles[item / D].scales + g * (D / 8) + 2 * m + second] = code;
    };
    quantize_blocks<ValuePolicy, ROWS * D>(memory, a.v_reciprocal, present, at, store);
}

// --- queries ---------------------------------------------------------------------------------------

// Of the blocks of rows every query_blocks / GROUPS-th: what they have of the matrix is copied once for all.
__device__ __forceinline__ void transform_queries(const Arguments& a, Shared& memory, int index, int head) {
    const int column = index % GROUPS * COLUMNS, apart = a.query_blocks / GROUPS * TOKENS;
#pragma unroll 1
    for (int first = index / GROUPS * TOKENS; first < a.queries.rows(); first += apart) {
        __syncthreads();  // the rows before are stored
        copy_queries(memory, a.queries, head, first);
        wait_for_copies();
        __syncthreads();
        transform_rows(memory, matrix_of(a.q_matrix, head, column), column);
        store_queries(memory, a.transformed, a.queries, head, first, column);
    }
}

// --- kernel ----------------------------------------------------------------------------------------

// begin_next, of few tokens: the next kernel, if launched early, may begin while this one runs.
// single: no request has more than one of the step's tokens; then values have a tile index a request.
// Before wait_for_results only what no kernel in front may have written is read: tables, and the matrix.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) kv_write(
    u8* pages, u16* full, const long long* slots, const long long* full_slots, const u16* k, const u16* v,
    const uint4* matrix, const int* query_start_loc, const int* seq_lens, const int* block_table,
    const int* full_block_table, float v_reciprocal, int single, int tokens, int requests, int key_blocks,
    int k_stride, int k_head_stride, int v_stride, int v_head_stride, int page_stride, int head_stride,
    int full_stride, int full_head_stride, int table_stride, int full_table_stride, const u16* q, u16* transformed,
    const uint4* q_matrix, int query_blocks, int query_heads, int group, int q_stride, int q_head_stride,
    int begin_next) {
    extern __shared__ __align__(16) u8 shared[];
    Shared& memory = *reinterpret_cast<Shared*>(shared);
    const Arguments a = {
        pages, full, slots, full_slots, k, v, matrix, query_start_loc, seq_lens, block_table, full_block_table,
        v_reciprocal, single, tokens, requests, key_blocks, k_stride, k_head_stride, v_stride, v_head_stride,
        page_stride, head_stride, full_stride, full_head_stride, table_stride, full_table_stride,
        {q, tokens, query_heads, group, q_stride, q_head_stride}, transformed, q_matrix, query_blocks};
    // Many tokens: blocks that share a matrix run together. Few: keys, which take longest, begin first.
    const int head = ROWS == 1 ? blockIdx.x : blockIdx.y, index = ROWS == 1 ? blockIdx.y : blockIdx.x;
    const int query_index = index - (static_cast<int>(gridDim.y) - query_blocks);  // if QUERIES
    if (threadIdx.x < STEPS) memory.queued[threadIdx.x] = 0;
    if (index < key_blocks) {
        if (ROWS == 1 && MATRIX) copy_matrix(memory, matrix_of(a.matrix, head, index % GROUPS * COLUMNS));
        copy_lookup(memory, key_lookup);
        wait_for_results();
        if (ROWS == 1 && begin_next) let_next_begin();
        write_keys(a, memory, index, head);
    } else if (!QUERIES || query_index < 0) {
        copy_lookup(memory, value_lookup);
        wait_for_results();
        if (ROWS == 1 && begin_next) let_next_begin();
        write_tiles(a, memory, index - key_blocks, head);
    } else {
        copy_matrix(memory, matrix_of(a.q_matrix, head, query_index % GROUPS * COLUMNS));
        wait_for_results();
        if (ROWS == 1 && begin_next) let_next_begin();
        transform_queries(a, memory, query_index, head);
    }
}
