// What decoding kernels share: where tokens lie, how work is cut into shares, and how what blocks found is merged.
//
// Work. The units of all requests and heads (16 tokens in 16 bits, or 32 stored ones) are one list, cut into
// equal shares, a block each; so lengths may be as ragged as they like. Warps of a block take units in turns.
// Where several blocks share a head of a request, the last to finish merges what all found.
//
// A kernel is `decode_work<Program>`. Program has
//   WARP_BYTES   shared memory of a warp, a multiple of 16, in which it leaves what it found: of each query FOUND
//                floats, D sums, the maximum of its scores and the total of its P
//   OUTPUT_UNIT  what sums are to be multiplied by
//   LEAST        units that a share has at least, or little fewer, if there are as many
//   TOGETHER     parts that one block merges at once; more are merged by several blocks first. 0: any number, by queries
//   CHANNELS     of a query that a thread takes when it puts warps together
//   RAGGED       the group is not a multiple of QUERIES, and the last of its programs has fewer
//   attend       the units of a part, into the warps' memory; every thread of the block calls it
//
// Macros: D head size; QUERIES query heads of a program; PAGE and FULL_PAGE tokens of the pages; SINK, RECENT,
// WINDOW (0: none) tokens; SOFT_CAP, HALF 0 or 1.
#pragma once

#include "nvfp4_attention.cuh"

constexpr int WARPS = 4;
constexpr int GROUPS = D / 16;          // groups of 16 channels
constexpr int K_SCALES = PAGE * D / 2, V_CODES = PAGE * D * 9 / 16, V_SCALES = V_CODES + PAGE * D / 2;
constexpr int FOUND = D + 2;            // floats that a warp finds of a query

static_assert(D % 32 == 0 && PAGE % 16 == 0 && FULL_PAGE >= 4);

struct Arguments {
    const u16* q;
    const u8* pages;
    const u16* full;
    u16* output;
    const int *query_start_loc, *seq_lens, *block_table, *full_block_table;
    float *partial, *statistics;
    int* arrived;
    int requests, heads, pieces, group;
    int table_stride, full_table_stride;
    int q_stride, q_head_stride, output_stride, output_head_stride;
    int page_stride, head_stride, full_stride, full_head_stride;
    float score_scale, cap, full_unit, output_unit;
    Opaque opaque;
};

// A kernel's parameters, and Arguments of them. arrived: zeros, and zeros again when the kernel is done; where parts
// are merged in two steps 2 * gridDim.x of them come first.
#define DECODE_PARAMETERS \
    const u16 *q, const u8 *pages, const u16 *full, u16 *output, const int *query_start_loc, const int *seq_lens, \
        const int *block_table, const int *full_block_table, float *partial, float *statistics, int *arrived, \
        int requests, int heads, int pieces, int group, int table_stride, int full_table_stride, int q_stride, \
        int q_head_stride, int output_stride, int output_head_stride, int page_stride, int head_stride, \
        int full_stride, int full_head_stride, float score_scale, float cap, float full_unit, float output_unit, \
        int by_512, int by_32, int by_2, int carry
#define DECODE_ARGUMENTS \
    {q, pages, full, output, query_start_loc, seq_lens, block_table, full_block_table, partial, statistics, arrived, \
     requests, heads, pieces, group, table_stride, full_table_stride, q_stride, q_head_stride, output_stride, \
     output_head_stride, page_stride, head_stride, full_stride, full_head_stride, score_scale, cap, full_unit, \
     output_unit, \
     {static_cast<u32>(by_512), static_cast<u32>(by_32), static_cast<u32>(by_2), static_cast<u32>(carry)}}

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
    __device__ int units() const {
        return length > 0 ? sink_units() + newest_units() + stored_units() : 0;
    }
};

// What a block has to do of a head of a request: units from `first` to `last`, of `count` query heads.
struct Part {
    Ranges ranges;
    const u16* queries;
    int request, head, count, first, last;

    // Units come in this order: those of the sink, of the newest tokens, and stored ones.
    __device__ int whole_units() const { return ranges.sink_units() + ranges.newest_units(); }
    __device__ const int* table(const Arguments& a) const {
        return a.block_table + static_cast<long long>(request) * a.table_stride;
    }
    __device__ const int* full_table(const Arguments& a) const {
        return a.full_block_table + static_cast<long long>(request) * a.full_table_stride;
    }
};

__device__ __forceinline__ const u8* tile_address(
    const Arguments& a, const int* table, int head, int tile) {
    const int token = tile * 16;
    return a.pages + static_cast<long long>(__ldg(table + token / PAGE)) * a.page_stride + head * a.head_stride;
}

// --- tokens in 16 bits -----------------------------------------------------------------------------

// Token n of the range [low, high) that begins in tile `tile`, or the nearest one that is in it.
__device__ __forceinline__ const u16* whole_token(
    const Arguments& a, const int* table, int head, int token, int low, int high) {
    token = min(max(token, low), high - 1);
    return a.full + static_cast<long long>(__ldg(table + token / FULL_PAGE)) * a.full_stride + head * a.full_head_stride +
           token % FULL_PAGE * (2 * D);
}

// The units of a part that are in 16 bits, the warp's share of them: visit(tile, low, high), of whose 16 tokens those
// of [low, high) are seen. Gives the warp's first unit that comes after them.
template <class Visit>
__device__ __forceinline__ int visit_whole(const Part& part, int warp, Visit visit) {
    const Ranges& r = part.ranges;
    const int sink_units = r.sink_units(), end = min(part.last, part.whole_units());
    int unit = part.first + warp;
    for (; unit < end; unit += WARPS) {
        const bool sink = unit < sink_units;
        const int low = sink ? r.low : r.newest, high = sink ? r.sink_end : r.length;
        visit(low / 16 + (sink ? unit : unit - sink_units), low, high);
    }
    return unit;
}

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

// --- what blocks found -----------------------------------------------------------------------------

// Parts of a head of a request: the blocks from `from` on, each `step`-th, `count` of them. A block leaves the first
// and the last part of its share at its two slots; of the first of these blocks it is the second where `late` is 1.
struct Parts {
    int from, step, count, late;
    __device__ __forceinline__ int slot(int n) const { return 2 * (from + step * n) + (n ? 0 : late); }
};

// Merge parts into the output, a query a warp at a time: where a program has few queries.
template <class Program>
__device__ __forceinline__ void merge_by_query(
    const Arguments& a, u16* out, int queries, const Parts& parts, u8* shared, int lane, int warp) {
    float* weights = reinterpret_cast<float*>(shared + warp * Program::WARP_BYTES);
    for (int query = warp; query < queries; query += WARPS) {
        float2* statistics = reinterpret_cast<float2*>(a.statistics) + query;
        float maximum = -INFINITY;
        for (int n = lane; n < parts.count; n += 32)
            maximum = fmaxf(maximum, __ldcg(statistics + parts.slot(n) * QUERIES).x);
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, mask));
        float sum[D / 32] = {}, total = 0.0f;
        for (int begin = 0; begin < parts.count; begin += 32) {
            __syncwarp();
            float weight = 0.0f;
            if (begin + lane < parts.count) {
                const float2 found = __ldcg(statistics + parts.slot(begin + lane) * QUERIES);
                weight = weight_of(found.x, maximum);
                total = fmaf(found.y, weight, total);
            }
            weights[lane] = weight;
            __syncwarp();
            const int some = min(32, parts.count - begin);
#pragma unroll 8
            for (int n = 0; n < some; n++) {
                const float* part =
                    a.partial + (static_cast<long long>(parts.slot(begin + n)) * QUERIES + query) * D + lane;
#pragma unroll
                for (int i = 0; i < D / 32; i++) sum[i] = fmaf(__ldcg(part + 32 * i), weights[n], sum[i]);
            }
        }
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
        const float factor = a.output_unit / total;
#pragma unroll
        for (int i = 0; i < D / 32; i++)
            out[query * a.output_head_stride + 32 * i + lane] = narrowed(sum[i] * Program::OUTPUT_UNIT * factor);
    }
}

// Merge parts, into the output or into the first of them: where a program has many queries. A warp has the statistics
// of some, a thread four channels at each of its places, so that a block has as many loads under way as it can.
template <class Program, bool INTO_OUTPUT>
__device__ __forceinline__ void merge_by_place(
    const Arguments& a, u16* out, int queries, const Parts& parts, u8* shared, int lane, int warp) {
    constexpr int THREADS = WARPS * 32, OF_WARP = (QUERIES + WARPS - 1) / WARPS;
    constexpr int PIECES = D / 4;  // of a query
    constexpr int PLACES = (QUERIES * PIECES + THREADS - 1) / THREADS;
    constexpr int LOADS = 16, AT_ONCE = PLACES < LOADS ? LOADS / PLACES : 1;
    constexpr int SOME = 32;  // parts whose weights are there at a time
    float* weights = reinterpret_cast<float*>(shared);  // of each query and part
    float* totals = weights + QUERIES * SOME;
    float2* statistics = reinterpret_cast<float2*>(a.statistics);
    const auto statistics_of = [&](int query, int n) {
        return query < queries && n < parts.count ? __ldcg(statistics + parts.slot(n) * QUERIES + query)
                                                  : make_float2(-INFINITY, 0.0f);
    };

    float2 found[OF_WARP];
    float maximum[OF_WARP], total[OF_WARP];
#pragma unroll
    for (int k = 0; k < OF_WARP; k++) found[k] = statistics_of(warp + k * WARPS, lane);
#pragma unroll
    for (int k = 0; k < OF_WARP; k++) {
        maximum[k] = found[k].x, total[k] = 0.0f;
        for (int n = lane + SOME; n < parts.count; n += SOME)
            maximum[k] = fmaxf(maximum[k], statistics_of(warp + k * WARPS, n).x);
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
#pragma unroll
        for (int k = 0; k < OF_WARP; k++) maximum[k] = fmaxf(maximum[k], __shfl_xor_sync(~0u, maximum[k], mask));
    }
    float sum[PLACES][4] = {};
    for (int begin = 0; begin < parts.count; begin += SOME) {
        if (begin) {
            __syncthreads();  // the weights before are not needed any more
#pragma unroll
            for (int k = 0; k < OF_WARP; k++) found[k] = statistics_of(warp + k * WARPS, begin + lane);
        }
#pragma unroll
        for (int k = 0; k < OF_WARP; k++) {
            const float weight = weight_of(found[k].x, maximum[k]);
            total[k] = fmaf(found[k].y, weight, total[k]);
            if (warp + k * WARPS < QUERIES) weights[(warp + k * WARPS) * SOME + lane] = weight;
        }
        __syncthreads();
        const int some = min(SOME, parts.count - begin);
#pragma unroll AT_ONCE
        for (int n = 0; n < some; n++) {
            const float4* part = reinterpret_cast<const float4*>(
                a.partial + static_cast<long long>(parts.slot(begin + n)) * (QUERIES * D));
#pragma unroll
            for (int k = 0; k < PLACES; k++) {
                const int place = k * THREADS + threadIdx.x, query = place / PIECES;
                if (query < queries) {
                    const float4 x = __ldcg(part + place);
                    const float weight = weights[query * SOME + n];
                    sum[k][0] = fmaf(x.x, weight, sum[k][0]), sum[k][1] = fmaf(x.y, weight, sum[k][1]);
                    sum[k][2] = fmaf(x.z, weight, sum[k][2]), sum[k][3] = fmaf(x.w, weight, sum[k][3]);
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < OF_WARP; k++) {
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) total[k] += __shfl_xor_sync(~0u, total[k], mask);
        const int query = warp + k * WARPS;
        if (lane == 0 && query < queries) {
            totals[query] = total[k];
            // The lanes of this warp alone have read them.
            if (!INTO_OUTPUT) statistics[parts.slot(0) * QUERIES + query] = make_float2(maximum[k], total[k]);
        }
    }
    if (INTO_OUTPUT) __syncthreads();
#pragma unroll
    for (int k = 0; k < PLACES; k++) {
        const int place = k * THREADS + threadIdx.x, query = place / PIECES;
        if (query < queries) {
            if (INTO_OUTPUT) {
                const float factor = a.output_unit / totals[query];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    out[query * a.output_head_stride + place % PIECES * 4 + i] =
                        narrowed(sum[k][i] * Program::OUTPUT_UNIT * factor);
            } else {
                reinterpret_cast<float4*>(
                    a.partial + static_cast<long long>(parts.slot(0)) * (QUERIES * D))[place] =
                    make_float4(sum[k][0], sum[k][1], sum[k][2], sum[k][3]);
            }
        }
    }
}

// Whether this block is the last of `count` to come here; what they wrote before is then there to read.
__device__ __forceinline__ bool arrives_last(int* arrived, int count, int& is_last) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrived, 1) == count - 1;
        if (is_last) *arrived = 0;
    }
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
    return true;
}

// --- a block's share -------------------------------------------------------------------------------

template <class Program>
__device__ __forceinline__ void decode_work(const Arguments& a) {
    extern __shared__ __align__(16) u8 shared[];
    int& is_last = *reinterpret_cast<int*>(shared + WARPS * Program::WARP_BYTES);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int per_request = a.heads * a.pieces;

    // The lengths were there before the kernel in front of this one began; queries and pages may not be.
    // Units of all requests.
    const auto units_of = [&](int request) {
        if (request >= a.requests || a.query_start_loc[request + 1] == a.query_start_loc[request]) return 0;
        return Ranges(a.seq_lens[request]).units();
    };
    long long all = 0;
    for (int request = lane; request - lane < a.requests; request += 32) all += units_of(request);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) all += __shfl_xor_sync(~0u, all, mask);
    all *= per_request;
    const long long most = Program::LEAST > 1 ? (all + Program::LEAST - 1) / Program::LEAST : all;
    const int blocks = static_cast<int>(min(most, static_cast<long long>(gridDim.x)));
    if (blockIdx.x >= blocks) return;
    const auto share_of = [&](int block) { return all * block / blocks; };
    // The block whose share has a unit.
    const auto owner_of = [&](long long unit) {
        int block = static_cast<int>(unit * blocks / all);
        while (share_of(block + 1) <= unit) block++;
        return block;
    };
    long long at = share_of(blockIdx.x);
    const long long end = share_of(blockIdx.x + 1);

    // The request that the share begins in, and its first unit in the list.
    int request = 0, units = 0;
    long long begin = 0;
    for (int from = 0;; from += 32) {
        const int count = units_of(from + lane);
        long long sum = static_cast<long long>(count) * per_request;
        const long long own = sum;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const long long below = __shfl_up_sync(~0u, sum, distance);
            if (lane >= distance) sum += below;
        }
        const unsigned past = __ballot_sync(~0u, begin + sum > at);
        if (past) {
            const int found = __ffs(past) - 1;
            request = from + found;
            units = __shfl_sync(~0u, count, found);
            begin += __shfl_sync(~0u, sum - own, found);
            break;
        }
        begin += __shfl_sync(~0u, sum, 31);
    }

    wait_for_results();
    while (at < end) {
        while (units == 0 || at >= begin + static_cast<long long>(units) * per_request) {
            begin += static_cast<long long>(units) * per_request;
            units = units_of(++request);
        }
        const int item = static_cast<int>((at - begin) / units);
        const int head = item / a.pieces, piece = item % a.pieces;
        const long long item_begin = begin + static_cast<long long>(item) * units, item_end = item_begin + units;
        const int first = static_cast<int>(at - item_begin);
        const int last = static_cast<int>(min(end, item_end) - item_begin);
        const Ranges r(a.seq_lens[request]);
        const long long row = a.query_start_loc[request];
        const int query_head = head * a.group + piece * QUERIES;
        const u16* queries = a.q + row * a.q_stride + query_head * a.q_head_stride;

        const int count = Program::RAGGED ? min(QUERIES, a.group - piece * QUERIES) : QUERIES;
        Program::attend({r, queries, request, head, count, first, last}, a, shared, lane, warp);
        __syncthreads();
        const bool alone = first == 0 && last == units;
        const int slot = 2 * blockIdx.x + (at == share_of(blockIdx.x) ? 0 : 1);
        u16* out = a.output + row * a.output_stride + query_head * a.output_head_stride;
        constexpr int THREADS = D / Program::CHANNELS;  // of a query
        for (int i = threadIdx.x; i < QUERIES * THREADS; i += WARPS * 32) {
            const int query = i / THREADS, channel = i % THREADS;
            float maximum = -INFINITY, sum[Program::CHANNELS] = {}, total = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++)
                maximum = fmaxf(
                    maximum, reinterpret_cast<float*>(shared + w * Program::WARP_BYTES)[query * FOUND + D]);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float* from = reinterpret_cast<float*>(shared + w * Program::WARP_BYTES) + query * FOUND;
                const float weight = weight_of(from[D], maximum);
#pragma unroll
                for (int n = 0; n < Program::CHANNELS; n++)
                    sum[n] = fmaf(from[channel + n * THREADS], weight, sum[n]);
                total = fmaf(from[D + 1], weight, total);
            }
            if (alone) {
                if (query < count) {
#pragma unroll
                    for (int n = 0; n < Program::CHANNELS; n++)
                        out[query * a.output_head_stride + channel + n * THREADS] =
                            narrowed(sum[n] * Program::OUTPUT_UNIT * (a.output_unit / total));
                }
            } else {
                float* to = a.partial + (static_cast<long long>(slot) * QUERIES + query) * D + channel;
#pragma unroll
                for (int n = 0; n < Program::CHANNELS; n++) to[n * THREADS] = sum[n];
                if (channel == 0)
                    reinterpret_cast<float2*>(a.statistics)[slot * QUERIES + query] = make_float2(maximum, total);
            }
        }
        if (!alone) {
            const int from = owner_of(item_begin), parts = owner_of(item_end - 1) - from + 1;
            // Of the first of the blocks this may be the second piece that it left.
            const int late = share_of(from) < item_begin;
            constexpr int TOGETHER = Program::TOGETHER;
            int* arrived = a.arrived + (TOGETHER ? 2 * gridDim.x : 0) + request * per_request + item;
            if constexpr (TOGETHER == 0) {
                if (arrives_last(arrived, parts, is_last))
                    merge_by_query<Program>(a, out, count, {from, 1, parts, late}, shared, lane, warp);
            } else if (parts <= TOGETHER) {
                if (arrives_last(arrived, parts, is_last))
                    merge_by_place<Program, true>(a, out, count, {from, 1, parts, late}, shared, lane, warp);
            } else {
                const int before = (static_cast<int>(blockIdx.x) - from) / TOGETHER * TOGETHER;
                const Parts some = {from + before, 1, min(TOGETHER, parts - before), before ? 0 : late};
                if (arrives_last(a.arrived + some.slot(0), some.count, is_last)) {
                    merge_by_place<Program, false>(a, out, count, some, shared, lane, warp);
                    const Parts merged = {from, TOGETHER, (parts + TOGETHER - 1) / TOGETHER, late};
                    if (arrives_last(arrived, merged.count, is_last))
                        merge_by_place<Program, true>(a, out, count, merged, shared, lane, warp);
                }
            }
        }
        __syncthreads();
        at = min(end, item_end);
    }
}
