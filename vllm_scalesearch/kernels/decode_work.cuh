// What decoding kernels share: where tokens lie, how work is cut into shares, and how what blocks found is merged.
//
// Work. The units of all requests and heads (16 tokens in 16 bits, or 32 stored ones) are one list, cut into
// equal shares, a block each; so lengths may be as ragged as they like. Of requests of one length every head has shares
// of its own, or a share has whole heads, if few blocks are left over. Warps of a block take units in turns. A unit takes
// one slot of the list, or as many as it takes longer than a stored one.
// Where several blocks share a head of a request, what they found is merged by a kernel behind (paged_decode_merge.cu).
//
// A kernel is `decode_work<Program>`. Program has
//   WARP_BYTES   shared memory of a warp, a multiple of 16
//   FINDERS      warps that leave what they found in it, 1 or all; if 1, for all, and it may take theirs
//   FOUND        floats of each query in that: D sums, the maximum of its scores, the total of its P and others
//   RAGGED       the group is not a multiple of QUERIES, and the last of its programs has fewer
//   attend       the units of a part, into the warps' memory; every thread of the block calls it. It calls `start`, and
//                has read nothing but tables before
//
// Macros: D head size; QUERIES query heads of a program; PAGE and FULL_PAGE tokens of the pages; SINK, RECENT,
// WINDOW (0: none) tokens; SOFT_CAP, HALF 0 or 1; ASIDE bytes in front of a program's shared memory.
#pragma once

#include "nvfp4_attention.cuh"

constexpr int WARPS = 4;
constexpr int GROUPS = D / 16;          // groups of 16 channels
constexpr int K_SCALES = PAGE * D / 2, V_CODES = PAGE * D * 9 / 16, V_SCALES = V_CODES + PAGE * D / 2;

static_assert(D % 32 == 0 && PAGE % 16 == 0 && FULL_PAGE >= 4);

// A block leaves the first and the last part of its share in two places of its own. The block that a head of a request
// begins in says where its parts are: in `first`, and in the first places of the `count` - 1 blocks behind. There is such an
// entry of every head of a request that has tokens, or, if there are more heads than blocks, of every block, for the head
// that it shares with the next.
struct __align__(16) Entry {
    int first, count;
    int item, row;  // the head and its program, of the request; the request's query
};

struct Arguments {
    const u16* q;
    const u8* pages;
    const u16* full;
    u16* output;
    const int *query_start_loc, *seq_lens, *block_table, *full_block_table;
    float *partial, *statistics;
    Entry* entries;
    int requests, heads, pieces, group;
    int table_stride, full_table_stride;
    int q_stride, q_head_stride, output_stride, output_head_stride;
    int page_stride, head_stride, full_stride, full_head_stride;
    float score_scale, cap, full_unit, output_unit;
    Opaque opaque;
};

// A kernel's parameters, and Arguments of them.
#define DECODE_PARAMETERS \
    const u16 *q, const u8 *pages, const u16 *full, u16 *output, const int *query_start_loc, const int *seq_lens, \
        const int *block_table, const int *full_block_table, float *partial, float *statistics, Entry *entries, \
        int requests, int heads, int pieces, int group, int table_stride, int full_table_stride, int q_stride, int q_head_stride, \
        int output_stride, int output_head_stride, int page_stride, int head_stride, int full_stride, \
        int full_head_stride, float score_scale, float cap, float full_unit, float output_unit, int by_512, \
        int by_32, int by_2, int carry
#define DECODE_ARGUMENTS \
    {q, pages, full, output, query_start_loc, seq_lens, block_table, full_block_table, partial, statistics, entries, \
     requests, heads, pieces, group, table_stride, full_table_stride, q_stride, q_head_stride, output_stride, \
     output_head_stride, page_stride, head_stride, full_stride, full_head_stride, score_scale, cap, full_unit, \
     output_unit, \
     {static_cast<u32>(by_512), static_cast<u32>(by_32), static_cast<u32>(by_2), static_cast<u32>(carry)}}

// Slots of a unit in 16 bits, and how many slots a share has at least, or little fewer, if there are as many. In
// paged_decode.cu all warps have work with 3, and those added for whole heads, mostly one unit.
constexpr bool WIDE = QUERIES > 8;  // paged_decode_wide.cu, which has no programs of fewer
constexpr int WHOLE_SLOTS = WIDE ? 2 : 1, LEAST = WIDE ? 8 : 3;
constexpr int CROSSING = 4;  // slots that a block takes longer if its share crosses from a head to the next

// What of a request's tokens is where.
struct Ranges {
    int length;
    int low;         // first token that is seen
    int sink_end;    // tokens in [low, sink_end) and [newest, length) are in 16 bits,
    int newest;      // those in [stored_low, stored_high) stored
    int stored_low, stored_high;

    __device__ explicit Ranges(int tokens) {
        length = tokens;
        low = WINDOW > 0 ? max(0, tokens - WINDOW) : 0;
        sink_end = min(SINK, tokens);
        const int boundary = max(tokens - RECENT, 0) / 16 * 16;
        stored_low = max(SINK, low);
        stored_high = boundary;
        newest = max(max(boundary, SINK), low);
    }
    __device__ int sink_units() const { return low < sink_end ? (sink_end + 15) / 16 - low / 16 : 0; }
    __device__ int newest_units() const { return newest < length ? (length + 15) / 16 - newest / 16 : 0; }
    __device__ int stored_units() const {
        return stored_low < stored_high ? (stored_high + 31) / 32 - stored_low / 32 : 0;
    }
    __device__ int whole_units() const { return sink_units() + newest_units(); }
    __device__ int slots() const { return length > 0 ? WHOLE_SLOTS * whole_units() + stored_units() : 0; }
    // The first unit, in the order of Part, that begins in a slot or behind it.
    __device__ int unit_from(int slot) const {
        const int whole = whole_units();
        return slot < WHOLE_SLOTS * whole ? (slot + WHOLE_SLOTS - 1) / WHOLE_SLOTS : slot - (WHOLE_SLOTS - 1) * whole;
    }
};

// What a block has to do of a head of a request: units from `first` to `last`, of `count` query heads.
struct Part {
    Ranges ranges;
    const u16* queries;
    int request, head, count, first, last;

    // Units come in this order: those of the sink, of the newest tokens, and stored ones.
    __device__ int whole_units() const { return ranges.whole_units(); }
    __device__ const int* table(const Arguments& a) const {
        return a.block_table + static_cast<long long>(request) * a.table_stride;
    }
    __device__ const int* full_table(const Arguments& a) const {
        return a.full_block_table + static_cast<long long>(request) * a.full_table_stride;
    }
};

__device__ __forceinline__ const u8* tile_address(
    const Arguments& a, const int* table, int head, int tile) {
    const u32 token = tile * 16;
    return a.pages + static_cast<long long>(__ldg(table + token / PAGE)) * a.page_stride + head * a.head_stride;
}

// --- tokens in 16 bits -----------------------------------------------------------------------------

// Token n of the range [low, high) that begins in tile `tile`, or the nearest one that is in it.
__device__ __forceinline__ const u16* whole_token(
    const Arguments& a, const int* table, int head, int token, int low, int high) {
    token = min(max(token, low), high - 1);
    return a.full + static_cast<long long>(__ldg(table + token / FULL_PAGE)) * a.full_stride +
           head * a.full_head_stride + token % FULL_PAGE * (2 * D);
}

// A unit of tokens in 16 bits: of the 16 of a tile those in [low, high).
struct WholeUnit {
    int tile, low, high;

    __device__ __forceinline__ WholeUnit(const Ranges& r, int unit) {
        const int sink_units = r.sink_units();
        const bool sink = unit < sink_units;
        low = sink ? r.low : r.newest, high = sink ? r.sink_end : r.length;
        tile = low / 16 + (sink ? unit : unit - sink_units);
    }
};

// --- softmax ---------------------------------------------------------------------------------------

__device__ __forceinline__ float capped(float score, float scale, float cap) {
    score *= scale;
#if SOFT_CAP
    score = cap * (1.0f - 2.0f / (exp2_approx(score) + 1.0f));
#endif
    return score;
}

__device__ __forceinline__ float weight_of(float maximum, float all) {
    return maximum == -INFINITY ? 0.0f : exp2_approx(maximum - all);
}

// --- shares ----------------------------------------------------------------------------------------

// Slots of a head of a request. All loads go at once, so no branch may come between them.
__device__ __forceinline__ int slots_of(
    const int* query_start_loc, const int* seq_lens, int requests, int request) {
    const int at = min(request, requests - 1);
    const int some = query_start_loc[at + 1] - query_start_loc[at];
    const int none = (-some >> 31) + 1 | request >= requests;
    return Ranges(seq_lens[at] & none - 1).slots();
}

// Slots of all requests, and how many have any.
struct Totals {
    int slots = 0, present = 0;

    __device__ __forceinline__ Totals(const int* query_start_loc, const int* seq_lens, int requests, int lane) {
#pragma unroll 1
        for (int from = lane; from < requests; from += 128) {
            int count[4];
#pragma unroll
            for (int i = 0; i < 4; i++) count[i] = slots_of(query_start_loc, seq_lens, requests, from + 32 * i);
#pragma unroll
            for (int i = 0; i < 4; i++) slots += count[i], present += count[i] > 0;
        }
        slots = __reduce_add_sync(~0u, slots), present = __reduce_add_sync(~0u, present);
    }
};

// The request that has a slot of the list, the slots of one of its heads, and where its first is in the list.
struct Request {
    int index, slots, begin = 0;

    __device__ __forceinline__ Request(
        const int* query_start_loc, const int* seq_lens, int requests, int per_request, int slot, int lane) {
#pragma unroll 1
        for (int from = 0;; from += 32) {
            const int count = slots_of(query_start_loc, seq_lens, requests, from + lane);
            int sum = count * per_request;
            const int own = sum;
#pragma unroll
            for (int distance = 1; distance < 32; distance *= 2) {
                const int below = __shfl_up_sync(~0u, sum, distance);
                if (lane >= distance) sum += below;
            }
            const unsigned past = __ballot_sync(~0u, begin + sum > slot);
            if (past) {
                const int found = __ffs(past) - 1;
                index = from + found;
                slots = __shfl_sync(~0u, count, found);
                begin += __shfl_sync(~0u, sum - own, found);
                return;
            }
            begin += __shfl_sync(~0u, sum, 31);
        }
    }
};

// What sums have to be multiplied by. In paged_decode_wide.cu they are of P in units of 2^-15 and 2^-14, totals of P alone;
// in paged_decode.cu of P_UNIT, 2^-14 and 2^-120.
constexpr float OUTPUT_UNIT = WIDE ? 16384.0f : 6.646139978924579e35f;

// How the list of `all` slots, `items` heads of requests that have any, is cut for `most` blocks.
struct Shares {
    u32 all, blocks, each, rest;

    __device__ __forceinline__ Shares(u32 all, u32 items, u32 most) : all(all) {
        blocks = min((all + LEAST - 1) / LEAST, most);
        if (items > blocks) {
            const u32 heads = (items + blocks - 1) / blocks, wanted = items / heads;
            if (wanted * heads == items && wanted * 16 >= blocks * 15) blocks = wanted;
        } else if (items) {
            const u32 fewer = blocks - blocks % items;
            if (blocks % items * 16 <= blocks || all / fewer <= all / blocks + CROSSING) blocks = fewer;
        }
        *this = Shares(all, blocks);
    }
    __device__ __forceinline__ Shares(u32 all, u32 blocks) : all(all), blocks(blocks) {
        each = all / max(blocks, 1u), rest = all - each * blocks;
    }
    // The first slot of a block's share: all * block / blocks.
    __device__ __forceinline__ int operator[](u32 block) const { return each * block + rest * block / blocks; }
    // The block whose share has a slot.
    __device__ __forceinline__ int owner_of(int slot) const {
        int block = static_cast<int>(__fdividef(static_cast<float>(slot) * blocks, static_cast<float>(all)));
#pragma unroll 1
        while ((*this)[block] > slot) block--;
#pragma unroll 1
        while ((*this)[block + 1] <= slot) block++;
        return block;
    }
};

// --- what blocks found -----------------------------------------------------------------------------

// Whether there is an entry of every head.
__device__ __forceinline__ bool by_head(const Arguments& a) { return a.requests * a.heads * a.pieces <= gridDim.x; }

// At multiples of 16 bytes.
__device__ __forceinline__ void copy_floats(float (&to)[4], const float* from) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

__device__ __forceinline__ void copy_floats(float* to, const float (&from)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// --- a block's share -------------------------------------------------------------------------------

// The lengths were there before the kernel in front of this one began, and so were tables; queries and pages are once it has
// ended. The kernel that merges begins once every block is here.
__device__ __forceinline__ void start() {
    wait_for_results();
    let_next_begin();
}

// What a block needs behind a part, in front of the program's shared memory, which begins where banks do: meanwhile
// registers are the program's.
struct __align__(128) Aside {
    u32 all, blocks;
    Entry entry;   // of the part's head, but for the count,
    int at;        // and where it goes, or -1
    int head_end;  // in the list
    int alone, query_head;
};
static_assert(sizeof(Aside) == ASIDE, "as ops/cuda_paged_decode.py has it");

template <class Program>
__device__ __forceinline__ void decode_work(const Arguments& a) {
    extern __shared__ __align__(128) u8 all_shared[];
    Aside& aside = *reinterpret_cast<Aside*>(all_shared);
    u8* const shared = all_shared + sizeof(Aside);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int per_request = a.heads * a.pieces;

    const Totals totals(a.query_start_loc, a.seq_lens, a.requests, lane);
    const Shares shares(totals.slots * per_request, totals.present * per_request, gridDim.x);
    if (blockIdx.x >= shares.blocks) {
        if (by_head(a) && shares.blocks) return;
        wait_for_results();  // if no block has work this kernel must not end before the one in front
        if (!by_head(a) && threadIdx.x == 0) a.entries[blockIdx.x].count = 0;
        return;
    }
    int at = shares[blockIdx.x];
    const int share_begin = at, end = shares[blockIdx.x + 1];
    if (threadIdx.x == 0) aside.all = shares.all, aside.blocks = shares.blocks;

    // The request that the share begins in.
    const Request found(a.query_start_loc, a.seq_lens, a.requests, per_request, at, lane);
    int request = found.index, slots = found.slots, request_begin = found.begin;

#pragma unroll 1
    while (at < end) {
#pragma unroll 1
        while (slots == 0 || at >= request_begin + slots * per_request) {
            request_begin += slots * per_request;
            slots = slots_of(a.query_start_loc, a.seq_lens, a.requests, ++request);
        }
        const u32 item = static_cast<u32>(at - request_begin) / slots, pieces = a.pieces;
        const int head = item / pieces, piece = item % pieces;
        const int item_begin = request_begin + static_cast<int>(item) * slots, item_end = item_begin + slots;
        const int first = at - item_begin, last = min(end, item_end) - item_begin;
        const Ranges r(a.seq_lens[request]);
        const int row = a.query_start_loc[request], query_head = head * a.group + piece * QUERIES;
        const u16* queries = a.q + static_cast<long long>(row) * a.q_stride + query_head * a.q_head_stride;
        if (threadIdx.x == 0) {
            const bool alone = first == 0 && last == slots;
            const int place = 2 * blockIdx.x + (at != share_begin);
            aside.entry = {place, 0, static_cast<int>(item), row};
            aside.at = first || alone && !by_head(a) ? -1 : by_head(a) ? request * per_request + item : blockIdx.x;
            aside.head_end = item_end, aside.alone = alone, aside.query_head = query_head;
        }
        const int count = Program::RAGGED ? min(QUERIES, a.group - piece * QUERIES) : QUERIES;
        Program::attend(
            {r, queries, request, head, count, r.unit_from(first), r.unit_from(last)}, a, shared, lane, warp);
        __syncthreads();
        const bool alone = aside.alone;
        const int place = aside.entry.first;
        u16* out = a.output + static_cast<long long>(aside.entry.row) * a.output_stride +
                   aside.query_head * a.output_head_stride;
        constexpr int CHANNELS = 4, THREADS = D / CHANNELS;  // of a query: of a thread, and threads
#pragma unroll(Program::FINDERS == 1 ? 4 : 2)
        for (int n = 0; n < (QUERIES * THREADS + WARPS * 32 - 1) / (WARPS * 32); n++) {
            const int i = n * (WARPS * 32) + threadIdx.x;
            if (QUERIES * THREADS % (WARPS * 32) && i >= QUERIES * THREADS) break;
            const int query = i / THREADS, channel = i % THREADS * CHANNELS;
            const auto found = [&](int w) {
                return reinterpret_cast<float*>(shared + w * Program::WARP_BYTES) + query * Program::FOUND;
            };
            float maximum = -INFINITY, sum[CHANNELS] = {}, total = 0.0f;
            float2 statistics[Program::FINDERS];
#pragma unroll
            for (int w = 0; w < Program::FINDERS; w++) {
                statistics[w] = *reinterpret_cast<float2*>(found(w) + D);
                maximum = fmaxf(maximum, statistics[w].x);
            }
#pragma unroll
            for (int w = 0; w < Program::FINDERS; w++) {
                const float weight = weight_of(statistics[w].x, maximum);
                float x[CHANNELS];
                copy_floats(x, found(w) + channel);
#pragma unroll
                for (int n = 0; n < CHANNELS; n++) sum[n] = fmaf(x[n], weight, sum[n]);
                total = fmaf(statistics[w].y, weight, total);
            }
            if (alone) {
                if (query < count) {
                    const float factor = a.output_unit / total;
#pragma unroll
                    for (int n = 0; n < CHANNELS; n++)
                        out[query * a.output_head_stride + channel + n] =
                            narrowed(sum[n] * OUTPUT_UNIT * factor);
                }
            } else {
                copy_floats(a.partial + (static_cast<long long>(place) * QUERIES + query) * D + channel, sum);
                if (channel == 0)
                    reinterpret_cast<float2*>(a.statistics)[place * QUERIES + query] = make_float2(maximum, total);
            }
        }
        if (threadIdx.x == 0) {
            Entry entry = aside.entry;
            if (aside.at >= 0) {
                entry.count = alone ? 1 : Shares(aside.all, aside.blocks).owner_of(aside.head_end - 1) - blockIdx.x + 1;
                a.entries[aside.at] = entry;
            }
            // Of a block without such a head; if it has one, that is its last.
            if (!by_head(a) && aside.at < 0) a.entries[blockIdx.x].count = 0;
        }
        __syncthreads();
        at = min(end, item_end);
    }
}
