// Keys and values of a step's requests out of the paged cache (kv_pages.py, V along tokens), as tiles of
// prompt_tiles.cuh: those that some query sees as stored, and those that one sees in full precision.
//
// Block (tile, head, kind) of 128 threads: kind 0 for tokens in full precision, 1 for stored ones. What is not
// of its kind is 0, and a tile without any that nobody reads is not written.
//
// Macros: D, HALF, PAGE and FULL_PAGE (tokens), SINK, RECENT, WINDOW (0: none).

#include "prompt_tiles.cuh"

constexpr int K_SCALES = PAGE * D / 2, V_CODES = PAGE * D * 9 / 16, V_SCALES = V_CODES + PAGE * D / 2;

// The value of E4M3 code `code`, times 2^62.
__device__ __forceinline__ float scale_of(u32 code) {
    return code == 0x7F ? NAN : __uint_as_float(code << 20) * 1.329227995784916e36f * 4.611686018427388e18f;
}

// E2M1 code at the lowest bits of `code`, times a scale that is 2^62 too large.
__device__ __forceinline__ float element(u32 code, float scale) {
    const float bits = __uint_as_float((code & 7) << 22 | (code & 8) << 28);  // 2^-126 of it
    return bits * 1.8446744073709552e19f * scale;                             // 2^64
}

struct Range {
    int low, high;
    __device__ bool has(int token) const { return token >= low && token < high; }
};

extern "C" __global__ void __launch_bounds__(128) prompt_tiles(
    const u8* __restrict__ pages, const u16* __restrict__ full, uint4* __restrict__ k_full,
    uint4* __restrict__ k_stored, uint4* __restrict__ v_full, uint4* __restrict__ v_stored,
    const int* __restrict__ k_start_loc, const int* __restrict__ query_start_loc, const int* __restrict__ seq_lens,
    const int* __restrict__ block_table, const int* __restrict__ full_block_table, float v_scale, int requests,
    int page_stride, int head_stride, int full_stride, int full_head_stride, int table_stride,
    int full_table_stride)
{
    extern __shared__ __align__(16) u8 shared[];
    const int request = request_of(k_start_loc, requests, blockIdx.x), head = blockIdx.y;
    const bool is_stored = blockIdx.z;
    const int length = seq_lens[request];
    const int context = length - (query_start_loc[request + 1] - query_start_loc[request]);
    const int begin = (blockIdx.x - first_tile(k_start_loc, request)) * TILE, end = min(begin + TILE, length);
    if (begin >= length) return;
    const int seen = WINDOW > 0 ? max(context + 1 - WINDOW, 0) : 0;

    // Of its kind are tokens in either of two ranges.
    const Range sink = {max(begin, seen), is_stored ? 0 : min(end, SINK)};
    const Range rest = is_stored ? Range{max(max(begin, SINK), seen), min(end, boundary_of(length - 1))}
                                 : Range{max(max(begin, boundary_of(context)), max(SINK, seen)), end};
    // The first tile that a block of queries takes is there in full precision, whatever it has.
    const bool needed = !is_stored && (WINDOW > 0 || begin == 0);
    if (!needed && sink.low >= sink.high && rest.low >= rest.high) return;
    const int* table = block_table + static_cast<long long>(request) * table_stride;
    const int* full_table = full_block_table + static_cast<long long>(request) * full_table_stride;
    full += static_cast<long long>(head) * full_head_stride;
    pages += static_cast<long long>(head) * head_stride;

    // Keys: a place a thread.
    const int n = threadIdx.x, token = begin + 32 * (n % 8 / 2) + n / 8 * 2 + n % 2;
    const bool has = sink.has(token) || rest.has(token);
    u8* keys = shared + n / 8 * K_ROWS + n % 8 * 16;
    if (!has || !is_stored) {
        const uint4* from = reinterpret_cast<const uint4*>(
            full + (has ? static_cast<long long>(full_table[token / FULL_PAGE]) * full_stride +
                              token % FULL_PAGE * (2 * D) : 0));
#pragma unroll
        for (int c = 0; c < D / 8; c++)
            *reinterpret_cast<uint4*>(keys + c * 128) = has ? from[c] : make_uint4(0, 0, 0, 0);
    } else {
        const u8* page = pages + static_cast<long long>(table[token / PAGE]) * page_stride;
        const u8* codes = page + token % PAGE * (D / 2);
        const u8* scales = page + K_SCALES + token % PAGE * (D / 16);
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const u32 words[2] = {*reinterpret_cast<const u32*>(codes + 2 * m * (D / 8) + 4 * j),
                                      *reinterpret_cast<const u32*>(codes + (2 * m + 1) * (D / 8) + 4 * j)};
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float scale = scale_of(scales[2 * j + half]);
                    u32 x[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const u32 two = words[i / 2] >> (16 * (i % 2) + 4 * half);
                        x[i] = narrowed(element(two, scale), element(two >> 8, scale));
                    }
                    *reinterpret_cast<uint4*>(keys + (4 * j + 2 * half + m) * 128) =
                        make_uint4(x[0], x[1], x[2], x[3]);
                }
            }
        }
    }

    // Values: a channel a thread, and of 16 tokens in a row the even or the odd ones of eight.
    u8* values = shared + TILE_BYTES;
    for (int index = threadIdx.x; index < 2 * D; index += 128) {
        const int c = index % D, odd = index / D;
        u32 x[4][8];
#pragma unroll
        for (int t = 0; t < 4; t++) {
            const int first = begin + 32 * t + 16 * odd;
            if (is_stored) {
                const bool some = first + 16 > rest.low && first + 16 <= rest.high;
                const u8* page = pages + (some ? static_cast<long long>(table[first / PAGE]) * page_stride : 0);
                const int m = c / 16, g = c % 8, half = c / 8 % 2, inside = first % PAGE / 16;
                const u8* codes = page + V_CODES + inside * (D * 8) + m / 4 * 512 + g * 64 + m % 4 * 4;
                const float scale =
                    some ? scale_of(page[V_SCALES + inside * D + g * (D / 8) + 2 * m + half]) * v_scale : 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 word = some ? *reinterpret_cast<const u32*>(codes + 16 * i) >> (4 * half) : 0;
                    x[t][2 * i] = narrowed(element(word, scale), element(word >> 8, scale));
                    x[t][2 * i + 1] = narrowed(element(word >> 16, scale), element(word >> 24, scale));
                }
            } else {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const int token = first + i;
                    const bool has = sink.has(token) || rest.has(token);
                    const u32 value = has
                        ? full[static_cast<long long>(full_table[token / FULL_PAGE]) * full_stride +
                               token % FULL_PAGE * (2 * D) + D + c]
                        : 0;
                    x[t][i / 2] = i % 2 ? x[t][i / 2] | value << 16 : value;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            *reinterpret_cast<uint4*>(values + c / 8 * V_ROWS + (8 * odd + i) * 128 + c % 8 * 16) =
                make_uint4(x[0][i], x[1][i], x[2][i], x[3][i]);
    }
    __syncthreads();
    const long long at = (static_cast<long long>(head) * gridDim.x + blockIdx.x) * (TILE_BYTES / 16);
    uint4* k_to = (is_stored ? k_stored : k_full) + at;
    uint4* v_to = (is_stored ? v_stored : v_full) + at;
    const uint4* from = reinterpret_cast<const uint4*>(shared);
    for (int i = threadIdx.x; i < TILE_BYTES / 16; i += 128) {
        k_to[i] = from[i];
        v_to[i] = from[TILE_BYTES / 16 + i];
    }
}
