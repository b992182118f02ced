// Merge what blocks of a decoding kernel found of the heads of requests that several of them shared.
//
// A block has an entry (decode_work.cuh) and some of the head's queries. Grid: entries, and how many blocks share the
// queries. Warps, a power of two of them for a query, take parts in turns, each several at once. There is little to do
// before the first load: where that kernel fills the device, blocks begin as its blocks end.
//
// Macros: as that kernel.

#include "decode_work.cuh"

constexpr int MERGE_WARPS = 16;          // at most
constexpr int PIECES = (D + 127) / 128;  // of 4 channels of a lane
constexpr int AT_ONCE = 8 / PIECES;      // parts of a warp

// per_entry: heads and programs of a request, where it has an entry of each; else 0.
extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32, 2) paged_decode_merge(
    const int* query_start_loc, const int* seq_lens, const Entry* entries, const float* partial, const float* statistics,
    u16* output, int per_entry, int pieces, int group, int output_stride, int output_head_stride,
    float output_unit) {
    extern __shared__ __align__(16) u8 shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float* found = reinterpret_cast<float*>(shared);  // of each warp D sums, and after all of those
    float2* found_statistics = reinterpret_cast<float2*>(found + warps * D);
    wait_for_results();  // all blocks, also those without work: kernels behind this one rely on the one in front
    let_next_begin();
    // All these loads at once. Of a request without tokens there is no entry.
    const int4 entry = __ldcg(reinterpret_cast<const int4*>(entries + blockIdx.x));
    bool none = false;
    if (per_entry) {
        const int request = blockIdx.x / per_entry;
        none = query_start_loc[request + 1] == query_start_loc[request] || seq_lens[request] == 0;
    }
    const int first_place = entry.x, count = entry.y, item = entry.z, row = entry.w;
    if (none || count < 2) return;
    const auto place_of = [&](int part) { return part ? first_place / 2 * 2 + 2 * part : first_place; };

    const int of_block = (QUERIES + gridDim.y - 1) / gridDim.y;  // queries
    const int rounded = of_block > 8 ? 16 : of_block > 4 ? 8 : of_block > 2 ? 4 : of_block;
    const int of_query = warps / rounded;
    const int query = blockIdx.y * of_block + warp / of_query, own = warp % of_query;
    const int head = item / pieces, piece = item % pieces;
    const bool present =
        warp / of_query < of_block && query < min(QUERIES, group - piece * QUERIES);
    float maximum = -INFINITY, total = 0.0f, sum[PIECES][4] = {};
#pragma unroll 1
    for (int n = own; n < count && present; n += of_query * AT_ONCE) {
        float2 some[AT_ONCE];
        float4 x[AT_ONCE][PIECES];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            some[i] = make_float2(-INFINITY, 0.0f);
#pragma unroll
            for (int k = 0; k < PIECES; k++) x[i][k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (n + i * of_query < count) {
                const int place = place_of(n + i * of_query) * QUERIES + query;
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
    if (own || !present) return;
    // Lane l has what warp l of the query found.
    const float2 of_warp = lane < of_query ? found_statistics[warp + lane] : make_float2(-INFINITY, 0.0f);
    maximum = max_across<1, 32>(of_warp.x);
    const float weight_of_warp = weight_of(of_warp.x, maximum);
    const float factor = output_unit / sum_across<1, 32>(of_warp.y * weight_of_warp);
    u16* out = output + static_cast<long long>(row) * output_stride +
               (head * group + piece * QUERIES + query) * output_head_stride;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int channel = 4 * (k * 32 + lane);
        const bool there = D % 128 == 0 || channel < D;
        float merged[4] = {};
#pragma unroll 4
        for (int w = 0; w < of_query; w++) {
            const float weight = __shfl_sync(~0u, weight_of_warp, w);
            float x[4] = {};
            if (there) copy_floats(x, found + (warp + w) * D + channel);
#pragma unroll
            for (int i = 0; i < 4; i++) merged[i] = fmaf(x[i], weight, merged[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (there) out[channel + i] = narrowed(merged[i] * OUTPUT_UNIT * factor);
    }
}
