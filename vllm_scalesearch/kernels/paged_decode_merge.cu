// Merge what blocks of a decoding kernel found of the heads of requests that several of them shared.
//
// A block has a head of a request and some of its queries. Grid: as many as there are heads of requests, or, if fewer,
// as that kernel had blocks: then a block has the head that its share ends in. And how many blocks share the queries.
// Warps, a power of two of them for a query, take parts in turns, each several at once. Which parts there are is found
// out while the kernel in front still runs.
//
// Macros: as that kernel.

#include "decode_work.cuh"

constexpr bool WIDE = QUERIES > 8;         // behind paged_decode_wide.cu, which has no programs of fewer
constexpr float OUTPUT_UNIT = WIDE ? WIDE_OUTPUT_UNIT : NARROW_OUTPUT_UNIT;
constexpr int MERGE_WARPS = 8;
constexpr int PIECES = (D + 127) / 128;    // of 4 channels of a lane
constexpr int AT_ONCE = 8 / PIECES;        // parts of a warp

extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32, 4) paged_decode_merge(
    const int* query_start_loc, const int* seq_lens, const float* partial, const float* statistics, u16* output,
    int requests, int heads, int pieces, int group, int blocks, int output_stride, int output_head_stride,
    float output_unit) {
    extern __shared__ __align__(16) u8 shared[];
    float* found = reinterpret_cast<float*>(shared);  // of each warp D sums, and after all of those
    float2* found_statistics = reinterpret_cast<float2*>(found + MERGE_WARPS * D);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int per_request = heads * pieces;

    const bool by_head = gridDim.x == requests * per_request;
    int request = by_head ? blockIdx.x / per_request : 0, item = by_head ? blockIdx.x % per_request : 0;
    const Totals totals(query_start_loc, seq_lens, requests, request, lane);
    const Shares shares(
        totals.units * per_request, totals.present * per_request, blocks, WIDE ? WIDE_LEAST : NARROW_LEAST);
    int units = 0, begin = totals.before * per_request;
    if (by_head) {
        units = units_of(query_start_loc, seq_lens, requests, request);
    } else if (blockIdx.x + 1 < shares.blocks) {
        const int last = shares[blockIdx.x + 1] - 1;
        const Request found(query_start_loc, seq_lens, requests, per_request, last, lane);
        request = found.index, units = found.units, begin = found.begin;
        item = (last - begin) / units;
    }
    Parts parts = {};
    if (units) {
        begin += item * units;
        const int from = shares.owner_of(begin);
        parts = {from, shares.owner_of(begin + units - 1) - from + 1, shares[from] < begin};
        // One of the blocks merges: the one of the share that the head begins in.
        if (!by_head && from != blockIdx.x) parts.count = 0;
    }
    const long long row = query_start_loc[request];
    wait_for_results();  // all blocks, also those without work: kernels behind this one rely on the one in front
    let_next_begin();
    if (parts.count < 2) return;

    const int of_block = (QUERIES + gridDim.y - 1) / gridDim.y;  // queries
    const int of_query = of_block > 4 ? 1 : of_block > 2 ? 2 : of_block > 1 ? 4 : 8;  // warps
    const int query = blockIdx.y * of_block + warp / of_query, first = warp % of_query;
    const int head = item / pieces, piece = item % pieces;
    const bool present =
        warp / of_query < of_block && query < min(QUERIES, group - piece * QUERIES);
    float maximum = -INFINITY, total = 0.0f, sum[PIECES][4] = {};
#pragma unroll 1
    for (int n = first; n < parts.count && present; n += of_query * AT_ONCE) {
        float2 some[AT_ONCE];
        float4 x[AT_ONCE][PIECES];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            some[i] = make_float2(-INFINITY, 0.0f);
#pragma unroll
            for (int k = 0; k < PIECES; k++) x[i][k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (n + i * of_query < parts.count) {
                const int place = parts.slot(n + i * of_query) * QUERIES + query;
                const float4* from = reinterpret_cast<const float4*>(partial + static_cast<long long>(place) * D);
                some[i] = __ldcg(reinterpret_cast<const float2*>(statistics) + place);
#pragma unroll
                for (int k = 0; k < PIECES; k++)
                    if (D % 128 == 0 || k * 32 + lane < D / 4) x[i][k] = __ldcg(from + k * 32 + lane);
            }
        }
        float now = maximum;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) now = fmaxf(now, some[i].x);
        const float scale = weight_of(maximum, now);
        maximum = now, total *= scale;
#pragma unroll
        for (int k = 0; k < PIECES; k++) sum[k][0] *= scale, sum[k][1] *= scale, sum[k][2] *= scale, sum[k][3] *= scale;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const float weight = weight_of(some[i].x, now);
            total = fmaf(some[i].y, weight, total);
#pragma unroll
            for (int k = 0; k < PIECES; k++) {
                sum[k][0] = fmaf(x[i][k].x, weight, sum[k][0]), sum[k][1] = fmaf(x[i][k].y, weight, sum[k][1]);
                sum[k][2] = fmaf(x[i][k].z, weight, sum[k][2]), sum[k][3] = fmaf(x[i][k].w, weight, sum[k][3]);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        if (D % 128 == 0 || k * 32 + lane < D / 4) copy_floats(found + warp * D + 4 * (k * 32 + lane), sum[k]);
    if (lane == 0) found_statistics[warp] = make_float2(maximum, total);
    __syncthreads();
    if (first || !present) return;
#pragma unroll 1
    for (int w = warp; w < warp + of_query; w++) maximum = fmaxf(maximum, found_statistics[w].x);
    u16* out = output + row * output_stride + (head * group + piece * QUERIES + query) * output_head_stride;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int channel = 4 * (k * 32 + lane);
        if (channel >= D) break;
        float merged[4] = {}, all_total = 0.0f;
#pragma unroll 1
        for (int w = warp; w < warp + of_query; w++) {
            const float2 of_warp = found_statistics[w];
            const float weight = weight_of(of_warp.x, maximum);
            float x[4];
            copy_floats(x, found + w * D + channel);
#pragma unroll
            for (int i = 0; i < 4; i++) merged[i] = fmaf(x[i], weight, merged[i]);
            all_total = fmaf(of_warp.y, weight, all_total);
        }
        const float factor = output_unit / all_total;
#pragma unroll
        for (int i = 0; i < 4; i++) out[channel + i] = narrowed(merged[i] * OUTPUT_UNIT * factor);
    }
}
