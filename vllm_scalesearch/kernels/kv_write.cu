// Writes a step's tokens to the paged cache (kv_pages.py, V along tokens): keys times their head's matrix, both in
// 16 bits, keys and whole tiles of values as NVFP4 with searched scales, the bits of search.py.
//
// One launch has two kinds of blocks, for one KV head each:
// * keys: ROWS * 16 tokens of the step, whosever they are. A warp multiplies them with 8 * N columns of the matrix.
//   16-bit keys and bf16 parts of the matrix, three that hold 24 bits, are tensor core operands, and sums are fp32;
//   fp16 keys have two parts too. Rounded to 16 bits, keys meet in shared memory.
// * values: ROWS tiles of 16 tokens of a request that this step completes. Their tokens come from the step's values,
//   or from 16-bit pages where they were written before.
// Then a thread takes a scale block. It tries all candidates in packed fp16 (nvfp4_search.cuh). Where that leaves
// several (a fifth of the blocks of normal data, two or three candidates each), each pair of block and candidate
// goes to a queue in shared memory, and a thread computes the exact error of one pair: full warps do, and the
// others nothing.
//
// A launch with few tokens (ROWS 1) is bound by latency, so a block of keys has 32 columns only, and copies its
// part of the matrix before the kernels in front are done.
//
// Macros: D, HALF, ROWS, PAGE and FULL_PAGE (tokens), MATRIX (0: keys stay as they are), K_OFFSETS, V_OFFSETS: the
// candidates of either, ascending. 1 / V's tensor scale, v_reciprocal, must be a power of two.

#define BOUNDED 1
#include "nvfp4_search.cuh"
#include "nvfp4_attention.cuh"

// As in cuda_kv_write.py.
constexpr int N = ROWS == 1 ? 1 : D <= 128 ? 2 : 4;
constexpr int COLUMNS = ROWS == 1 ? 32 : D;  // of a block of keys
constexpr int WARPS = COLUMNS / (8 * N), THREADS = 32 * WARPS;
constexpr int TOKENS = 16 * ROWS;
constexpr int PITCH = 2 * D + 16;            // bytes of a token in shared memory
constexpr int STEPS = (ROWS * D + THREADS - 1) / THREADS;  // scale blocks of a thread, at most
// Few tokens: room for many blocks, most of which have nothing to do. Many: as many threads as registers allow.
#if __CUDA_ARCH__ >= 900
constexpr int RESIDENT = ROWS == 1 ? 7 : (D <= 128 ? 768 : 512) / THREADS;
#else
constexpr int RESIDENT = ROWS == 1 ? 7 : 512 / THREADS;
#endif

constexpr int K_SCALES = PAGE * D / 2, V_CODES = PAGE * D * 9 / 16, V_SCALES = V_CODES + PAGE * D / 2;
constexpr int PARTS = 3;

static_assert(D % 32 == 0);

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

// Shared memory of a block. The queue lies where the matrix was.
struct alignas(16) Memory {
    u8 tokens[TOKENS * PITCH];
    u8 lookup[LOOKUP];
    Place place;
    u32 queued[(STEPS + 3) / 4 * 4];
    union {
        uint4 matrix[ROWS == 1 && MATRIX ? D / 32 * PARTS * THREADS : 1];
        u32 queue[1];  // STEPS times THREADS times candidates
    };
};

// body(i) for every i below COUNT, which threads share out.
template <int COUNT, class Body>
__device__ __forceinline__ void share(Body body) {
#pragma unroll
    for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; n++) {
        const int i = n * THREADS + threadIdx.x;
        if (COUNT % THREADS == 0 || i < COUNT) body(i, n);
    }
}

__device__ __forceinline__ void copy_async(void* to, const void* from, bool whole) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(whole ? 16 : 0) : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// --- quantization ------------------------------------------------------------------------------------

// a * b + c, between 0 and 1.
__device__ __forceinline__ float saturated(float a, float b, float c) {
    float out;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(a), "f"(b), "f"(c));
    return out;
}

// E2M1 of t >= 0, in the lowest byte; what floats do need not wait for the integer pipe, which the search fills.
// Steps up to 2, from there to 4 and to 6 are rounded one after the other, at 1.5 * 2^23, where a step of fp32 is 1.
// What is there when the next begins is even, so ties go to even.
__device__ __forceinline__ u32 code_of(float t) {
    const float low = saturated(t, 0.5f, 0.0f), middle = saturated(t, 0.5f, -1.0f);
    const float high = saturated(t, 0.5f, -2.0f);
    return __float_as_uint(fmaf(middle, 2.0f, fmaf(low, 4.0f, 12582912.0f)) + high);
}

// A block's codes where `factor` is 1 / scale: byte i of word t has that of value 4 t + i.
__device__ __forceinline__ void pack(const Block& block, float factor, u32 (&words)[4]) {
    const bool finite = block.amax < INFINITE;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        u32 codes[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = block.x[2 * t + i / 2];
            codes[i] = code_of((i % 2 ? magnitude<1>(word) : magnitude<0>(word)) * factor);
        }
        const u32 magnitudes = __byte_perm(
            __byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
        const u32 signs = __byte_perm(block.x[2 * t], block.x[2 * t + 1], 0x7531) >> 4 & 0x08080808u;
        words[t] = finite ? magnitudes | signs : 0;
    }
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

// Scale blocks 0 to ITEMS - 1, a multiple of 32, which lie in shared memory at at(item). Whole warps have those for
// which present(item), and call store(item, words, code).
template <class P, int ITEMS, class Present, class At, class Store>
__device__ __forceinline__ void quantize_blocks(
    Memory& memory, float reciprocal, Present present, At at, Store store) {
    const Lookup<P>& lookup = *reinterpret_cast<const Lookup<P>*>(memory.lookup);
    const Unit unit = unit_of(reciprocal);
#pragma unroll 1
    for (int step = 0; step * THREADS < ITEMS; step++) {
        const int item = step * THREADS + threadIdx.x;
        // A queue for each step: its errors may be read while the next one is filled.
        u32* queue = memory.queue + step * (THREADS * P::count);
        const bool here = item < ITEMS && present(item);
        Block block;
        u32 mask = 1;  // for zeros, and where nobody asks
        int queued = 0;
        if (here) {
            load(block, reinterpret_cast<const u16*>(at(item)));
            find_base(block, reciprocal);
            if (P::count > 1 && block.amax - 1 < INFINITE - 1) {
                u32 a[8];
                mask = P::approximate
                    ? approximate_search<P>(block, unit, reinterpret_cast<const uint4*>(lookup.table), a)
                    : P::all;
                if (mask & (mask - 1)) {
                    queued = atomicAdd(&memory.queued[step], __popc(mask));
                    int to = queued;
                    for (u32 left = mask; left; left &= left - 1)
                        queue[to++] = item | clamped(block.base + lookup.offsets[__ffs(left) - 1]) << 16;
                }
            }
        }
        if (P::count > 1) {
            __syncthreads();
            const int pairs = memory.queued[step];
#pragma unroll 1
            for (int i = threadIdx.x; i < pairs; i += THREADS) {
                const int code = queue[i] >> 16;
                Block other;
                load(other, reinterpret_cast<const u16*>(at(queue[i] & 0xFFFFu)));
                float y[16];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    y[2 * j] = scaled(magnitude<0>(other.x[j]), reciprocal);
                    y[2 * j + 1] = scaled(magnitude<1>(other.x[j]), reciprocal);
                }
                queue[i] = __float_as_uint(exact_error(y, scale_of(code), lookup.inverses[code]));
            }
            __syncthreads();
        }
        if (here) {
            u32 best = mask;
            if (mask & (mask - 1)) {
                // Not negative, so that bits are in the order of errors. The first of equal ones has the least code.
                u32 least = ~0u;
                for (u32 left = mask; left; left &= left - 1) {
                    const u32 error = queue[queued++];
                    if (error < least) least = error, best = left;
                }
            }
            const int code =
                clamped(block.base + (P::count > 1 ? lookup.offsets[__ffs(best) - 1] : P::offset(0)));
            u32 words[4];
            // As |x| reciprocal inverse: the first product is exact, or beyond all or nothing of what codes tell.
            pack(block, reciprocal * lookup.inverses[code], words);
            store(item, words, block.amax < INFINITE ? code : NAN_CODE);
        }
    }
}

// --- keys ------------------------------------------------------------------------------------------

// Products of a warp's bf16 fragments, in fp32.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers from shared memory: lane l has the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
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

// A lane's place in the matrix of a head, of the warp's first columns.
__device__ __forceinline__ const uint4* matrix_of(const Arguments& a, int head, int column) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return a.matrix + static_cast<long long>(head) * (D / 32 * PARTS * (D / 8) * 32) +
           (column / 8 + N * warp) * 32 + lane;
}

// Every lane copies what it will read itself.
__device__ __forceinline__ void copy_matrix(Memory& memory, const uint4* matrix) {
#pragma unroll
    for (int i = 0; i < D / 32 * PARTS; i++)
        copy_async(&memory.matrix[i * THREADS + threadIdx.x], matrix + i * (D / 8 * 32), true);
}

// The keys in memory.tokens times the matrix, columns from `column` on, instead of them.
__device__ __forceinline__ void transform_keys(Memory& memory, const uint4* matrix, int column) {
    constexpr int TOGETHER = HALF || ROWS == 1 ? 1 : 2;  // rows: for independent sums, and few registers
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 keys = shared_address(memory.tokens) + lane % 16 * PITCH + lane / 16 * 16;
    float sums[ROWS][N][4] = {};
#pragma unroll 1
    for (int j = 0; j < D / 32; j++) {
        uint4 b[PARTS][N];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll
            for (int n = 0; n < N; n++)
                b[part][n] = ROWS == 1 ? memory.matrix[(j * PARTS + part) * THREADS + threadIdx.x]
                                       : __ldg(matrix + (part * (D / 8) + n) * 32);
        }
        matrix += PARTS * (D / 8) * 32;
#pragma unroll
        for (int first = 0; first < ROWS; first += TOGETHER) {
            u32 x[TOGETHER][2][4], rest[TOGETHER][2][4];
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    u32 (&words)[4] = x[r][half];
                    load_matrices(words, keys + 16 * (first + r) * PITCH + 64 * j + 32 * half);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        if (HALF) words[i] = split_halves(words[i], rest[r][half][i]);
                }
            }
            auto multiply = [&](const u32 (&keys)[TOGETHER][2][4], int part) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int r = 0; r < TOGETHER; r++) {
#pragma unroll
                        for (int n = 0; n < N; n++)
                            mma_bf16(sums[first + r][n], keys[r][half], half ? b[part][n].z : b[part][n].x,
                                     half ? b[part][n].w : b[part][n].y);
                    }
                }
            };
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                multiply(x, part);
                if (HALF && part < 2) multiply(rest, part);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<u32*>(
                    memory.tokens + (16 * r + 8 * i + g) * PITCH + (column + 8 * (N * warp + n) + 2 * t) * 2) =
                    narrowed(sums[r][n][2 * i]) | narrowed(sums[r][n][2 * i + 1]) << 16;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void write_keys(const Arguments& a, Memory& memory, int index, int head) {
    constexpr int GROUPS = D / COLUMNS, WIDE = COLUMNS / 8, COUNT = TOKENS * WIDE;
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
    if (MATRIX) transform_keys(memory, matrix_of(a, head, column), column);
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
__device__ __forceinline__ bool find_row(const Arguments& a, Memory& memory, int index, int head) {
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

__device__ __forceinline__ void write_tiles(const Arguments& a, Memory& memory, int index, int head) {
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

// --- kernel ----------------------------------------------------------------------------------------

template <class P>
__device__ __forceinline__ void copy_lookup(Memory& memory, const Lookup<P>& lookup) {
    const uint4* from = reinterpret_cast<const uint4*>(&lookup);
    share<sizeof(lookup) / 16>([&](int i, int) { reinterpret_cast<uint4*>(memory.lookup)[i] = from[i]; });
}

// single: no request has more than one of the step's tokens; then values have a tile index a request.
// Before wait_for_results only what no kernel in front may have written is read: tables, and the matrix.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) kv_write(
    u8* pages, u16* full, const long long* slots, const long long* full_slots, const u16* k, const u16* v,
    const uint4* matrix, const int* query_start_loc, const int* seq_lens, const int* block_table,
    const int* full_block_table, float v_reciprocal, int single, int tokens, int requests, int key_blocks,
    int k_stride, int k_head_stride, int v_stride, int v_head_stride, int page_stride, int head_stride,
    int full_stride, int full_head_stride, int table_stride, int full_table_stride) {
    extern __shared__ __align__(16) u8 shared[];
    Memory& memory = *reinterpret_cast<Memory*>(shared);
    const Arguments a = {
        pages, full, slots, full_slots, k, v, matrix, query_start_loc, seq_lens, block_table, full_block_table,
        v_reciprocal, single, tokens, requests, key_blocks, k_stride, k_head_stride, v_stride, v_head_stride,
        page_stride, head_stride, full_stride, full_head_stride, table_stride, full_table_stride};
    // Many tokens: blocks that share a matrix run together. Few: keys, which take longest, begin first.
    const int head = ROWS == 1 ? blockIdx.x : blockIdx.y, index = ROWS == 1 ? blockIdx.y : blockIdx.x;
    if (threadIdx.x < STEPS) memory.queued[threadIdx.x] = 0;
    if (index < key_blocks) {
        if (ROWS == 1 && MATRIX) copy_matrix(memory, matrix_of(a, head, index % (D / COLUMNS) * COLUMNS));
        copy_lookup(memory, key_lookup);
        wait_for_results();
        write_keys(a, memory, index, head);
    } else {
        copy_lookup(memory, value_lookup);
        wait_for_results();
        write_tiles(a, memory, index - key_blocks, head);
    }
}
