// Writes a step's tokens to the paged cache (kv_pages.py, V along tokens): keys times their head's matrix, both in
// 16 bits, keys and whole tiles of values as NVFP4 with searched scales, the bits of search.py.
//
// One launch has two kinds of blocks, for one KV head each, of D threads:
// * keys: ROWS * 16 tokens of the step, whosever they are. A warp multiplies them with 32 columns of the matrix.
//   16-bit keys and bf16 parts of the matrix, three that hold 24 bits, are tensor core operands, and sums are fp32;
//   fp16 keys have two parts too. Rounded to 16 bits, keys meet in shared memory, and a thread takes a scale block.
// * values: a tile of 16 tokens of one request that this step completes, a channel a thread. Its tokens come from
//   the step's values, or from 16-bit pages where they were written before.
//
// Macros: D, HALF, ROWS, PAGE and FULL_PAGE (tokens), MATRIX (0: keys stay as they are), K_COUNT, K_OFFSETS, V_COUNT,
// V_OFFSETS: the candidates of either, ascending.

#define BOUNDED 1
#include "nvfp4_block.cuh"
#include "nvfp4_attention.cuh"

constexpr int EACH = D / 16;                 // scale blocks of a token
constexpr int TOKENS = 16 * ROWS;
constexpr int PITCH = 2 * D + 16;            // bytes of a key in shared memory
constexpr int INVERSES = 512;                // bytes before them: 1 / scale of each code
constexpr int K_SCALES = PAGE * D / 2, V_CODES = PAGE * D * 9 / 16, V_SCALES = V_CODES + PAGE * D / 2;
constexpr int PARTS = 3;

static_assert(D % 32 == 0);

__device__ constexpr int k_offsets[K_COUNT] = {K_OFFSETS};
__device__ constexpr int v_offsets[V_COUNT] = {V_OFFSETS};

struct Arguments {
    u8* pages;
    u16* full;
    const long long *slots, *full_slots;
    const u16 *k, *v;
    const uint4* matrix;
    const int *query_start_loc, *seq_lens, *block_table, *full_block_table;
    float v_reciprocal;
    int tokens, requests, key_blocks, k_stride, k_head_stride, v_stride, v_head_stride;
    int page_stride, head_stride, full_stride, full_head_stride, table_stride, full_table_stride;
};

// The winner's scale code, and the block's codes: byte i of word t has that of value 4 t + i.
template <int COUNT>
__device__ __forceinline__ int quantized(
    Block& block, float reciprocal, const int (&offsets)[COUNT], const float* inverses, u32 (&words)[4]) {
    find_base(block, reciprocal);
    float y[16];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        y[2 * i] = scaled(magnitude<0>(block.x[i]), reciprocal);
        y[2 * i + 1] = scaled(magnitude<1>(block.x[i]), reciprocal);
    }
    int best = clamped(block.base + offsets[0]);
    if (COUNT > 1) {
        float least = INFINITY;
#pragma unroll 1
        for (int i = 0; i < COUNT; i++) {
            const int code = clamped(block.base + offsets[i]);
            const float error = exact_error(y, scale_of(code), inverses[code]);
            if (error < least) least = error, best = code;
        }
    }
    const bool finite = block.amax < INFINITE;
    const float inverse = inverses[best];
#pragma unroll
    for (int t = 0; t < 4; t++) {
        u32 codes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float power;
            const u32 bits = __float_as_uint(rounded(y[4 * t + i] * inverse, power));
            codes[i] = bits + (bits >> 22);
        }
        const u32 magnitudes = __byte_perm(
            __byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
        const u32 signs = __byte_perm(block.x[2 * t], block.x[2 * t + 1], 0x7531) >> 4 & 0x08080808u;
        words[t] = finite ? (magnitudes & 0x07070707u) | signs : 0;
    }
    return finite ? best : NAN_CODE;
}

// Of two threads whose words share bytes, `second` having the high nibbles: words 0 and 1 of both for the first of
// them, words 2 and 3 for the second.
template <int APART>
__device__ __forceinline__ void paired(const u32 (&words)[4], bool second, u32 (&both)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 other = __shfl_xor_sync(~0u, second ? words[i] : words[2 + i], APART);
        both[i] = second ? other | words[2 + i] << 4 : words[i] | other << 4;
    }
}

// --- keys ------------------------------------------------------------------------------------------

// Products of a warp's bf16 fragments, in fp32.
__device__ __forceinline__ void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two fp16 numbers as two bf16 ones and what those leave.
__device__ __forceinline__ u32 split_halves(u32 pair, u32& rest) {
    const float low = half_to_float(pair & 0xFFFFu), high = half_to_float(pair >> 16);
    const u32 first = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    const float low_rest = low - __uint_as_float(first << 16);
    const float high_rest = high - __uint_as_float(first & 0xFFFF0000u);
    rest = __byte_perm(__float_as_uint(low_rest), __float_as_uint(high_rest), 0x7632);
    return first;
}

__device__ __forceinline__ void transform_keys(const Arguments& a, const u16* k, int first, int head, u8* keys) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float sums[ROWS][4][4] = {};
    const uint4* matrix = a.matrix + static_cast<long long>(head) * (D / 32 * PARTS * (D / 8) * 32);
#pragma unroll 1
    for (int j = 0; j < D / 32; j++) {
        u32 x[ROWS][2][4], rest[ROWS][2][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = first + 16 * r + 8 * i + g;
                uint4 loaded = make_uint4(0, 0, 0, 0);
                if (token < a.tokens)
                    loaded = *reinterpret_cast<const uint4*>(
                        k + static_cast<long long>(token) * a.k_stride + 32 * j + 8 * t);
                const u32 words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
                for (int n = 0; n < 4; n++) x[r][i][n] = HALF ? split_halves(words[n], rest[r][i][n]) : words[n];
            }
        }
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint4 b = __ldg(matrix + ((j * PARTS + part) * (D / 8) + 4 * warp + n) * 32 + lane);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    mma_bf16(sums[r][n], x[r][0][0], x[r][1][0], x[r][0][1], x[r][1][1], b.x, b.y);
                    mma_bf16(sums[r][n], x[r][0][2], x[r][1][2], x[r][0][3], x[r][1][3], b.z, b.w);
                    if (HALF && part < 2) {
                        mma_bf16(sums[r][n], rest[r][0][0], rest[r][1][0], rest[r][0][1], rest[r][1][1], b.x, b.y);
                        mma_bf16(sums[r][n], rest[r][0][2], rest[r][1][2], rest[r][0][3], rest[r][1][3], b.z, b.w);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<u32*>(keys + (16 * r + 8 * i + g) * PITCH + (32 * warp + 8 * n + 2 * t) * 2) =
                    narrowed(sums[r][n][2 * i]) | narrowed(sums[r][n][2 * i + 1]) << 16;
        }
    }
}

__device__ __forceinline__ void write_keys(
    const Arguments& a, int first, int head, u8* keys, const float* inverses) {
    const u16* k = a.k + static_cast<long long>(head) * a.k_head_stride;
    const u16* v = a.v + static_cast<long long>(head) * a.v_head_stride;
    if (MATRIX) transform_keys(a, k, first, head, keys);
    __syncthreads();
    const int index = threadIdx.x % EACH;
#pragma unroll 1
    for (int r = 0; r < ROWS; r++) {
        const int row = 16 * r + threadIdx.x / EACH, token = first + row;
        const long long slot = token < a.tokens ? a.slots[token] : -1;
        Block block = {};
        if (slot >= 0) {
            load(block, MATRIX ? reinterpret_cast<const u16*>(keys + row * PITCH) + 16 * index
                               : k + static_cast<long long>(token) * a.k_stride + 16 * index);
            const long long full_slot = a.full_slots[token];
            uint4* to = reinterpret_cast<uint4*>(
                a.full + full_slot / FULL_PAGE * a.full_stride + head * static_cast<long long>(a.full_head_stride) +
                full_slot % FULL_PAGE * (2 * D) + 16 * index);
            const uint4* value =
                reinterpret_cast<const uint4*>(v + static_cast<long long>(token) * a.v_stride + 16 * index);
            to[0] = make_uint4(block.x[0], block.x[1], block.x[2], block.x[3]);
            to[1] = make_uint4(block.x[4], block.x[5], block.x[6], block.x[7]);
            to[D / 8] = value[0];
            to[D / 8 + 1] = value[1];
        }
        u32 words[4], both[2];
        const int code = quantized(block, 1.0f, k_offsets, inverses, words);
        const bool second = index % 2;
        paired<1>(words, second, both);
        if (slot >= 0) {
            u8* page = a.pages + slot / PAGE * a.page_stride + head * static_cast<long long>(a.head_stride);
            const int inside = static_cast<int>(slot % PAGE);
            u8* codes = page + inside * (D / 2) + second * (D / 4) + 4 * (index / 2);
            *reinterpret_cast<u32*>(codes) = both[0];
            *reinterpret_cast<u32*>(codes + D / 8) = both[1];
            page[K_SCALES + inside * EACH + index] = code;
        }
    }
}

// --- values ----------------------------------------------------------------------------------------

__device__ __forceinline__ void write_tile(const Arguments& a, int block_index, int head, const float* inverses) {
    // Request r has the blocks from query_start_loc[r] / 16 + r on, as many as it can need or one more.
    int low = 0, high = a.requests;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (a.query_start_loc[middle] / 16 + middle <= block_index) low = middle + 1;
        else high = middle;
    }
    const int request = low - 1, start = a.query_start_loc[request], length = a.seq_lens[request];
    const int context = length - (a.query_start_loc[request + 1] - start);
    const int tile = context / 16 + block_index - (start / 16 + request);
    if (tile * 16 + 16 > length) return;
    __syncthreads();  // inverses
    const int channel = threadIdx.x, m = channel / 16, g = channel % 8;
    const bool second = channel / 8 % 2;
    const u16* v = a.v + static_cast<long long>(head) * a.v_head_stride + channel;
    const u16* full = a.full + static_cast<long long>(head) * a.full_head_stride + D + channel;
    const int* table = a.full_block_table + static_cast<long long>(request) * a.full_table_stride;
    u32 x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int token = tile * 16 + i;
        x[i] = token >= context
            ? v[static_cast<long long>(start + token - context) * a.v_stride]
            : full[static_cast<long long>(table[token / FULL_PAGE]) * a.full_stride + token % FULL_PAGE * (2 * D)];
    }
    Block block;
#pragma unroll
    for (int i = 0; i < 8; i++) block.x[i] = x[2 * i] | x[2 * i + 1] << 16;
    u32 words[4], both[2];
    const int code = quantized(block, a.v_reciprocal, v_offsets, inverses, words);
    paired<8>(words, second, both);
    const int page = a.block_table[static_cast<long long>(request) * a.table_stride + tile * 16 / PAGE];
    u8* to = a.pages + static_cast<long long>(page) * a.page_stride + head * static_cast<long long>(a.head_stride);
    const int inside = tile * 16 % PAGE / 16, chunk = m / 4, width = min(4, D / 16 - 4 * chunk);
    u8* codes = to + V_CODES + inside * (D * 8) + chunk * 512 + (4 * g + 2 * second) * (4 * width) + m % 4 * 4;
    *reinterpret_cast<u32*>(codes) = both[0];
    *reinterpret_cast<u32*>(codes + 4 * width) = both[1];
    to[V_SCALES + inside * D + g * (D / 8) + 2 * m + second] = code;
}

extern "C" __global__ void __launch_bounds__(D) kv_write(
    u8* pages, u16* full, const long long* slots, const long long* full_slots, const u16* k, const u16* v,
    const uint4* matrix, const int* query_start_loc, const int* seq_lens, const int* block_table,
    const int* full_block_table, float v_reciprocal, int tokens, int requests, int key_blocks, int k_stride,
    int k_head_stride, int v_stride, int v_head_stride, int page_stride, int head_stride, int full_stride,
    int full_head_stride, int table_stride, int full_table_stride) {
    extern __shared__ __align__(16) u8 shared[];
    const Arguments a = {
        pages, full, slots, full_slots, k, v, matrix, query_start_loc, seq_lens, block_table, full_block_table,
        v_reciprocal, tokens, requests, key_blocks, k_stride, k_head_stride, v_stride, v_head_stride, page_stride,
        head_stride, full_stride, full_head_stride, table_stride, full_table_stride};
    float* inverses = reinterpret_cast<float*>(shared);
    for (int code = threadIdx.x + MIN_CODE; code <= MAX_CODE; code += D) inverses[code] = 1.0f / scale_of(code);
    const int head = blockIdx.y, index = blockIdx.x;
    if (index < key_blocks)
        write_keys(a, index * TOKENS, head, shared + INVERSES, inverses);
    else
        write_tile(a, index - key_blocks, head, inverses);
}
