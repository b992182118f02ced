// Attention of prompts over the paged cache on Hopper, with P, and Q before it, quantized where asked
// (attention_reference.py, every query with its own boundary).
//
// A block has 128 queries of one head of a request: two warpgroups of 64 that multiply, and one thread that copies
// tiles of keys and values (prompt_tiles.cuh) to shared memory, two of each ahead. It walks over items: a tile of
// tokens in full precision, or as stored; a tile that has both comes twice, in that order, so that P of the stored
// ones is relative to the maximum of the whole tile. The first tile always has an item in full precision.
//
// A warpgroup begins the product of an item's keys, and behind it that of P and the values of the item before; while
// those are multiplied it brings the softmax up to date, and then makes the item's P an operand in registers.
//
// P = 1024 * 2^(s - n), n a whole number that the scores of stored tokens do not exceed, is quantized in packed
// fp16: a thread has whole scale blocks of 16. The absmax code c0 has the power of two 2^E. An element is
// a = P 2^(-E - 2), a candidate's scale s gives R = fp16(2^-12 2^E / s) and S = fp16(2^12 s / 2^E), and then, as in
// nvfp4_search.cuh, a R is P / s times 2^-14, where E2M1 is fp16's own sign, exponent and first mantissa bit: adding
// half a step and clearing nine bits rounds. Errors are good to three digits and so are P's values, so another
// candidate than the definition's can win where two are as good as equal.
//
// Macros: D, HALF, SINK, RECENT, WINDOW (0: none), Q_QUANTIZED, P_COUNT and P_OFFSETS (candidates of P, ascending; 0:
// P stays as it is).

#define BOUNDED 0
#include "nvfp4_block.cuh"
#include "packed_halves.cuh"
#include "prompt_tiles.cuh"

typedef unsigned long long u64;

constexpr int THREADS = 384;
constexpr int ROWS = 128;
constexpr int STAGES = 2;
constexpr int Q_BYTES = ROWS * D * 2;
constexpr bool P_QUANTIZED = P_COUNT > 0;
constexpr float LEVELS_LOG2 = P_QUANTIZED ? 10.0f : 0.0f;  // of attention_reference.py's P_LEVELS
// What operands of P are in units of: E2M1 * E4M3 is then far from the ends of both 16-bit types.
constexpr float UNIT = P_QUANTIZED ? 1.0f / 256 : 1.0f, UNIT_LOG2 = P_QUANTIZED ? -8.0f : 0.0f;
constexpr int CODES = MAX_CODE + 1;
constexpr int QUADS = (P_COUNT + 2) / 2 | 1;  // of a row of the table; odd, so that rows lie in different banks

#if P_COUNT
__device__ constexpr int p_offsets[P_COUNT] = {P_OFFSETS};
#endif

struct Shared {
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    int offsets[P_QUANTIZED ? P_COUNT : 1];
    u32 scales[CODES];  // what turns rounded elements into operands of P
};

// --- instructions ----------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u64* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, int parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void copy_tile(u8* to, const u8* from, u64* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(TILE_BYTES) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(TILE_BYTES), "r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ u64 descriptor(const u8* tile, int rows) {
    return (shared_address(tile) & 0x3FFFF) >> 4 | static_cast<u64>(128 >> 4) << 16 | static_cast<u64>(rows >> 4) << 32;
}

__device__ __forceinline__ void products_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// The compiler must not move what reads or writes these across here.
template <int COUNT> __device__ __forceinline__ void fence(float (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#if HALF
#define TYPES "f32.f16.f16"
#else
#define TYPES "f32.bf16.bf16"
#endif
#define EIGHT(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
    "+f"(x[i + 6]), "+f"(x[i + 7])
#define NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// s (64, 128) = or += a (64, 16) b (16, 128), both in shared memory.
__device__ __forceinline__ void multiply_keys(float (&s)[64], u64 a, u64 b, int add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;}"
                 : EIGHT(s, 0), EIGHT(s, 8), EIGHT(s, 16), EIGHT(s, 24), EIGHT(s, 32), EIGHT(s, 40), EIGHT(s, 48),
                   EIGHT(s, 56)
                 : "l"(a), "l"(b), "r"(add));
}

// o (64, D) += p (64, 16) b (16, D), p in registers.
__device__ __forceinline__ void multiply_values(float (&o)[D / 2], u32 p0, u32 p1, u32 p2, u32 p3, u64 b) {
#if D == 128
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." TYPES " {" NAMES_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : EIGHT(o, 0), EIGHT(o, 8), EIGHT(o, 16), EIGHT(o, 24), EIGHT(o, 32), EIGHT(o, 40), EIGHT(o, 48),
                   EIGHT(o, 56)
                 : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(b));
#else
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." TYPES " {" NAMES_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : EIGHT(o, 0), EIGHT(o, 8), EIGHT(o, 16), EIGHT(o, 24)
                 : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(b));
#endif
}

// A NaN wins.
__device__ __forceinline__ u32 max_half2(u32 a, u32 b) {
    u32 out;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// --- P ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 twice(float x) {
    return as_halves(x, x);
}

#if P_COUNT
// The table has a row for each absmax code: R and -S of each candidate, then 2^(-E - 2), each as two halves.
__device__ __forceinline__ uint2 table_entry(int base, int i) {
    const float power = __uint_as_float(static_cast<u32>(max(base >> 3, 1) + 120) << 23);  // 2^E
    if (i >= P_COUNT) return make_uint2(twice(0.25f / power), 0);
    const float scale = scale_of(clamped(base + p_offsets[i]));
    return make_uint2(twice(power / scale / 4096), twice(scale / power * -4096));
}

// What turns a power of two, 2^level, into a factor of two scales: itself, or what it adds to bf16's exponents.
__device__ __forceinline__ u32 level_of(float level) {
#if HALF
    return twice(exp2_approx(level));
#else
    return static_cast<u32>(static_cast<int>(fmaxf(level, -200.0f)) * 0x00800080);
#endif
}

// 16 values as pairs of fp16: the same as operands, NVFP4 with its scale searched, in units of UNIT and times
// `level`, a power of two as `level_of` has it. Their sum.
__device__ __forceinline__ float quantize(u32 (&x)[8], const uint4* table, const Shared& shared, u32 level) {
    u32 most = x[0];
#pragma unroll
    for (int k = 1; k < 8; k++) most = max_half2(most, x[k]);
    most = max_half2(most, most >> 16);
    const float amax = half_to_float(most);
    u32 base;
    asm("{.reg .b16 two; cvt.rn.satfinite.e4m3x2.f32 two, %1, %2; cvt.u32.u16 %0, two;}"
        : "=r"(base) : "f"(0.0f), "f"(amax * SIXTH));
    base = clamped(base);
    const uint4* row = table + base * QUADS;
    const uint2* entries = reinterpret_cast<const uint2*>(row);
    const u32 factor = entries[P_COUNT].x;
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = mul_half2(x[k], factor);

    u32 winner = 0;
    if (P_COUNT > 1) {
        u32 least = ~0u;
#pragma unroll
        for (int quad = 0; quad < (P_COUNT + 1) / 2; quad++) {
            const uint4 two = row[quad];
#pragma unroll
            for (int i = 2 * quad; i < 2 * quad + 2 && i < P_COUNT; i++) {
                const u32 r = i % 2 ? two.z : two.x, s = i % 2 ? two.w : two.y;
                u32 error = 0;
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    u32 q = (mul_half2(x[k], r) + 0x01000100u) & 0xFE00FE00u;
                    if (p_offsets[i] < 0) q = min_half2(q, 0x0E000E00u);  // else above 6 only below 2^-6 * 6
                    const u32 d = fma_half2(q, s, x[k]);
                    error = fma_half2(d, d, error);
                }
                error = add_half2(error, __byte_perm(error, error, 0x1032));
                // fp16 numbers that are not negative ascend as integers; the first of equal ones wins.
                least = min(least, (error & 0xFFFF0000u) | i);
            }
        }
        winner = least & 0xFFFFu;
    }
    const u32 r = entries[winner].x;
    const int code = clamped(base + shared.offsets[winner]);
#if HALF
    const u32 scale = mul_half2(shared.scales[code], level);
#else
    const u32 scale = shared.scales[code] + level;
#endif
    u32 sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const u32 q = min_half2((mul_half2(x[k], r) + 0x01000100u) & 0xFE00FE00u, 0x0E000E00u);
        sum = add_half2(sum, q);  // exact: multiples of half an element's step, at most 96 of them
#if HALF
        x[k] = mul_half2(q, scale);
#else
        // fp16's exponent and mantissa, three bits to the right, are those of a bf16 number 2^112 times smaller.
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x[k]) : "r"(q >> 3), "r"(scale), "r"(0x80008000u));
#endif
    }
    sum = add_half2(sum, sum >> 16);
    return fmaf(half_to_float(sum), scale_of(code) * 16384.0f, amax * 0.0f);  // NaN if an element is
}
#endif

// --- items -----------------------------------------------------------------------------------------------

// The items of a block of queries, one after the other.
struct Items {
    int first, last;                    // positions of the block's queries
    int low, first_boundary, boundary;  // first token seen by some query; boundaries of the first and the last one
    int tile;
    bool stored;

    __device__ Items(int first, int last)
        : first(first), last(last), low(WINDOW > 0 ? max(first + 1 - WINDOW, 0) : 0),
          first_boundary(boundary_of(first)), boundary(boundary_of(last)), tile(low / TILE), stored(false) {}
    __device__ bool done() const { return tile * TILE > last; }
    __device__ bool has_full() const {
        const int begin = max(tile * TILE, low), end = min(tile * TILE + TILE, last + 1);
        return begin < min(end, SINK) || max(begin, first_boundary) < end;
    }
    __device__ bool has_stored() const {
        return max(max(tile * TILE, low), SINK) < min(tile * TILE + TILE, boundary);
    }
    __device__ void advance() {
        do {
            if (stored) tile++;
            stored = !stored;
        } while (!done() && !(stored ? has_stored() : has_full()));
    }
    // Every query sees every token of the tile as stored.
    __device__ bool whole() const {
        return stored && tile * TILE >= SINK && tile * TILE + TILE <= first_boundary &&
               (WINDOW == 0 || tile * TILE > last - WINDOW);
    }
};

// --- kernel ----------------------------------------------------------------------------------------------

// q, q_stored, output: (T, Hq, D), the first two transformed, and q_stored quantized (or q again). Tiles: (heads,
// tiles, TILE_BYTES). query_start_loc, k_start_loc (requests + 1): first query, and key, of each request; tiles as
// prompt_tiles.cuh has it. Grid: query_tiles times query heads.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prompt_attention(
    const u16* __restrict__ q, const u16* __restrict__ q_stored, const u8* __restrict__ k_full,
    const u8* __restrict__ k_stored, const u8* __restrict__ v_full, const u8* __restrict__ v_stored,
    u16* __restrict__ output, const int* __restrict__ k_start_loc, const int* __restrict__ query_start_loc,
    const int* __restrict__ seq_lens, int requests, int tiles, int heads,
    int group, int query_tiles, int q_stride, int q_head_stride, int q_stored_stride, int q_stored_head_stride,
    int output_stride, int output_head_stride, float score_scale)
{
    extern __shared__ __align__(128) u8 memory[];
    u8* queries_full = memory;
    u8* queries_stored = memory + (Q_QUANTIZED ? Q_BYTES : 0);
    u8* keys = queries_stored + Q_BYTES;
    u8* values = keys + STAGES * TILE_BYTES;
    Shared& shared = *reinterpret_cast<Shared*>(values + STAGES * TILE_BYTES);
    uint4* table = reinterpret_cast<uint4*>(values + STAGES * TILE_BYTES + (sizeof(Shared) + 15) / 16 * 16);
    const int tid = threadIdx.x;

    // The last queries have the most to do, and go first.
    const int query_head = blockIdx.x % (heads * group), head = query_head / group;
    const int query_tile = query_tiles - 1 - blockIdx.x / (heads * group);
    const int request = request_of(query_start_loc, requests, query_tile);
    const int start = query_start_loc[request], queries = query_start_loc[request + 1] - start;
    const int first_query = (query_tile - first_tile(query_start_loc, request)) * ROWS;
    const int length = seq_lens[request], context = length - queries;
    const int last = context + min(first_query + ROWS, queries) - 1;
    if (first_query >= queries) return;

    if (tid == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(shared.k_full + i, 1);
            barrier_init(shared.v_full + i, 1);
            barrier_init(shared.k_empty + i, 8);
            barrier_init(shared.v_empty + i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#if P_COUNT
    for (int i = tid; i < P_COUNT; i += THREADS) shared.offsets[i] = p_offsets[i];
    for (int i = tid; i < CODES; i += THREADS) {
#if HALF
        shared.scales[i] = twice(scale_of(i) * 64);  // 2^14 UNIT
#else
        shared.scales[i] =  // times 2^118
            narrowed(scale_of(i) * 3.3230699894622897e35f, scale_of(i) * 3.3230699894622897e35f);
#endif
    }
    for (int i = tid; i < CODES * 2 * QUADS; i += THREADS)
        reinterpret_cast<uint2*>(table)[i] = table_entry(max(i / (2 * QUADS), MIN_CODE), i % (2 * QUADS));
#endif
    __syncthreads();

    Items item(context + first_query, last);
    if (tid < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (tid != 0) return;
        const long long at = static_cast<long long>(head) * tiles + first_tile(k_start_loc, request);
        for (int n = 0; !item.done(); n++, item.advance()) {
            const int stage = n % STAGES, parity = n / STAGES % 2 ^ 1;
            const long long from = (at + item.tile) * TILE_BYTES;
            wait(shared.k_empty + stage, parity);
            copy_tile(keys + stage * TILE_BYTES, (item.stored ? k_stored : k_full) + from, shared.k_full + stage);
            wait(shared.v_empty + stage, parity);
            copy_tile(values + stage * TILE_BYTES, (item.stored ? v_stored : v_full) + from, shared.v_full + stage);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int part = tid / 128 - 1, warp = tid % 128 / 32, lane = tid % 32, g = lane / 4, t = lane % 4;

    // This warpgroup's queries, as the tiles lie.
    for (int i = tid % 128; i < 64 * (D / 8); i += 128) {
        const int row = 64 * part + i / (D / 8), c = i % (D / 8);
        const int to = row / 8 * K_ROWS + c * 128 + row % 8 * 16;
        const long long token = start + min(first_query + row, queries - 1);
        *reinterpret_cast<uint4*>(queries_full + to) =
            *reinterpret_cast<const uint4*>(q + token * q_stride + query_head * q_head_stride + 8 * c);
        if (Q_QUANTIZED)
            *reinterpret_cast<uint4*>(queries_stored + to) = *reinterpret_cast<const uint4*>(
                q_stored + token * q_stored_stride + query_head * q_stored_head_stride + 8 * c);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (part == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
    else asm volatile("bar.sync 2, 128;" ::: "memory");

    const int row = first_query + 64 * part + 16 * warp + g;  // and 8 below
    int position[2];
    for (int r = 0; r < 2; r++) position[r] = min(context + row + 8 * r, last);
    float maximum[2] = {-INFINITY, -INFINITY}, stored_maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
    float s[64], o[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.0f;

    // Scores of item n, begun.
    auto multiply = [&](int n) {
        wait(shared.k_full + n % STAGES, n / STAGES % 2);
        const u64 a = descriptor((item.stored ? queries_stored : queries_full) + part * 8 * K_ROWS, K_ROWS);
        const u64 b = descriptor(keys + n % STAGES * TILE_BYTES, K_ROWS);
        fence(s);
        products_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++) multiply_keys(s, a + k * 16, b + k * 16, k > 0);
        products_commit();
    };
    u32 p[2][2][8];  // rows, scale blocks, pairs
    // The output of item n, begun.
    auto accumulate = [&](int n) {
        wait(shared.v_full + n % STAGES, n / STAGES % 2);
        const u64 b = descriptor(values + n % STAGES * TILE_BYTES, V_ROWS);
        fence(o);
        products_fence();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
            multiply_values(o, p[0][k / 4][k % 4 * 2], p[1][k / 4][k % 4 * 2], p[0][k / 4][k % 4 * 2 + 1],
                            p[1][k / 4][k % 4 * 2 + 1], b + k * 16);
        products_commit();
    };
    // Scores to P; what the output has to be multiplied by, and whether that is anything but 1.
    float decay[2];
    auto softmax = [&]() {
        if (!item.whole()) {  // What is not seen, or not as this item has it, is -inf.
            const int begin = item.tile * TILE + 32 * t;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int boundary = boundary_of(position[r]);
                const int seen = WINDOW > 0 ? position[r] + 1 - WINDOW : 0;
                // Seen are tokens from `low` to `high`, and those of the sink.
                const int low = item.stored ? max(SINK, seen) : max(boundary, seen);
                const int high = item.stored ? boundary - 1 : position[r];
                const int sink_high = item.stored ? -1 : min(SINK - 1, position[r]);
#pragma unroll
                for (int i = 0; i < 16; i++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int token = begin + 2 * i + e;
                        const bool sees = (token >= low && token <= high) || (token >= seen && token <= sink_high);
                        if (!sees) s[4 * i + 2 * r + e] = -INFINITY;
                    }
                }
            }
        }
        bool changed = false;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = -INFINITY;
#pragma unroll
            for (int i = 0; i < 16; i++) most = fmaxf(most, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
            most = ceilf(max_across<1, 4>(most) * score_scale);
            const float now = fmaxf(maximum[r], most), base = base_of(now);
            changed |= now != maximum[r];
            decay[r] = exp2_approx(maximum[r] - base);
            maximum[r] = now;
            float offset = LEVELS_LOG2 + UNIT_LOG2 - base;
            if (P_QUANTIZED && item.stored) {
                stored_maximum[r] = fmaxf(stored_maximum[r], most);
                offset = LEVELS_LOG2 - base_of(stored_maximum[r]);
            }
#pragma unroll
            for (int i = 0; i < 16; i++) {
                s[4 * i + 2 * r] = exp2_approx(fmaf(s[4 * i + 2 * r], score_scale, offset));
                s[4 * i + 2 * r + 1] = exp2_approx(fmaf(s[4 * i + 2 * r + 1], score_scale, offset));
            }
            total[r] *= decay[r];
        }
        return changed;
    };
    auto keep = [&]() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const float low = s[4 * i + 2 * r], high = s[4 * i + 2 * r + 1];
                sum += low + high;
                p[r][i / 8][i % 8] = narrowed(low, high);
            }
            total[r] = fmaf(sum, 1.0f / UNIT, total[r]);
        }
    };

    // The first item is of tokens in full precision, if only to need no code that quantizes.
    multiply(0);
    products_wait<0>();
    fence(s);
    if (lane == 0) arrive(shared.k_empty);
    softmax();
    keep();
    item.advance();
    int n = 1;
    for (; !item.done(); n++, item.advance()) {
        multiply(n);
        accumulate(n - 1);
        products_wait<1>();
        fence(s);
        if (lane == 0) arrive(shared.k_empty + n % STAGES);
        const bool changed = softmax();
        products_wait<0>();
        fence(o);
        if (lane == 0) arrive(shared.v_empty + (n - 1) % STAGES);
        if (__any_sync(~0u, changed)) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] *= decay[i / 2 % 2];
        }
#if P_COUNT
        if (item.stored) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float apart = stored_maximum[r] == -INFINITY ? 0.0f : stored_maximum[r] - maximum[r];
                const u32 level = level_of(apart);
                float sum = 0.0f;
#pragma unroll
                for (int b = 0; b < 2; b++) {
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        p[r][b][k] = as_halves(s[4 * (8 * b + k) + 2 * r], s[4 * (8 * b + k) + 2 * r + 1]);
                    sum += quantize(p[r][b], table, shared, level);
                }
                total[r] = fmaf(sum, exp2_approx(apart), total[r]);
            }
        } else {
            keep();
        }
#else
        keep();
#endif
    }
    accumulate(n - 1);
    products_wait<0>();
    fence(o);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float factor = 1.0f / (sum_across<1, 4>(total[r]) * UNIT);
        if (row + 8 * r >= queries) continue;
        u16* to = output + static_cast<long long>(start + row + 8 * r) * output_stride +
                  query_head * output_head_stride + 2 * t;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *reinterpret_cast<u32*>(to + 8 * i) = narrowed(o[4 * i + 2 * r] * factor, o[4 * i + 2 * r + 1] * factor);
    }
}
