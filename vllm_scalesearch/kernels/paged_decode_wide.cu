// Decoding attention over the paged cache (see paged_decode.cu) where a KV head has many query heads: a program takes
// up to 32 of them, whose products are full. Compute capability 8.0 and newer.
//
// Scales are multiplied into the elements, once for all queries (nvfp4_operands.cuh). Sums over all channels, and those
// of all tokens, stay in the accumulators of `mma.m16n8k16`.
//
// Orientation. Queries are rows, 16 of a tile: S = Q K^T has stored keys, and O = P V stored values, as operand B. In
// that operand lane (g, t) has column g, which is what it has as row g of pages that are in the order of operand A
// (kv_pages.py). What a lane has of S is then what it needs of P, if the columns of S are the right tokens: V's pages
// have tokens 4 t and 4 t + 2 of 16 at the places 2 t and 2 t + 1 of a product, and 4 t + 1 and 4 t + 3 at 8 more, so
// column n of one product with keys is token 2 n and of another token 2 n + 1. Nothing is shuffled.
//
// Q is in shared memory (wide_queries.cuh): fp16, brought to its upper range by powers of two, as P is, which is so
// rounded to 11 bits.
//
// Warps of a block score tokens of their own, a unit each at a time, and put P into shared memory; then each has
// channels of its own, of all those tokens. So nothing is decoded twice, and a warp's sums are few enough for several
// blocks a multiprocessor, which fill each other's waits. All warps agree on a step's maxima before there is a P
// (wide_softmax.cuh).
//
// Packed tokens are copied to shared memory a step ahead (wide_units.cuh).
//
// Its code is kept small: a multiprocessor runs most of it once or twice, and fetches it first.
//
// Work is shared out as decode_work.cuh says, and merged by paged_decode_merge.cu.
//
// Macros: those of decode_work.cuh, QUERIES at most 16 * TILES; TILES of 16 query heads; BLOCKS a multiprocessor;
// AHEAD 0 or 1: there is shared memory for packed tokens while ones in 16 bits are attended to.

#include "nvfp4_operands.cuh"
#include "wide_queries.cuh"
#include "wide_softmax.cuh"
#include "wide_units.cuh"

constexpr int WORDS = D / 32;            // of codes of a lane for a token's key; of scales of two tokens' keys
constexpr int K_WORDS = 2;               // of a token's codes that a lane reads at once, as registers allow
constexpr u32 HALF_ONES = 0x3C003C00u, ONES = HALF ? HALF_ONES : 0x3F803F80u;

// What a warp copies: a unit in 16 bits and one packed, or two packed ones, which are larger than one in 16 bits.
constexpr int WARP_BYTES = (AHEAD ? 16 * WHOLE_PITCH : UNIT_BYTES) + UNIT_BYTES;
constexpr int PACKED_AT = AHEAD ? 16 * WHOLE_PITCH : 0;  // a warp's first packed unit
constexpr int OTHER_AT = AHEAD ? 0 : UNIT_BYTES;         // and its second

static_assert(QUERIES <= ROWS);
static_assert(WARP_BYTES >= 16 * WHOLE_PITCH && WARPS * WARP_BYTES >= QUERIES * FOUND_PITCH * 4);

// --- stored tokens ---------------------------------------------------------------------------------

// Scores of a unit, factors apart: s[..][2 * i + p] has tokens 16 i + 2 n + p in its columns n. nan: marks of
// the scales of the lane's tokens 16 i + 2 g + p.
__device__ __forceinline__ void stored_scores(
    float (&s)[TILES][4][4], u32 (&nan)[4], const u8* unit, u32 queries, int lane, const Opaque& opaque) {
    const int g = lane / 4, t = lane % 4;
    u32 scales[2][WORDS];
#pragma unroll
    for (int i = 0; i < 2; i++) read_words<WORDS>(scales[i], unit + UNIT_SCALES + i * D + g * (D / 8));
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int n = 0; n < 4; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
    }
    constexpr int ONCE = WORDS % K_WORDS ? 1 : K_WORDS;
#pragma unroll
    for (int w = 0; w < WORDS; w += ONCE) {
        u32 codes[4][ONCE];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int at = (2 * g + n % 2) * (D / 2) + t * (D / 8) + 4 * w;
            read_words<ONCE>(codes[n], unit + n / 2 * TILE_CODES + place_of(at / 16) * 16 + at % 16);
        }
#pragma unroll
        for (int j = w; j < w + ONCE; j++) {
#pragma unroll
            for (int high = 0; high < 2; high++) {
                u32 q[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES; i++)
                    load_matrices(q[i], queries + i * 16 * Q_PITCH + (2 * j + high) * 32);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    u32 key[2];
                    const u32 both = scales_of(scales[n / 2], n % 2 * WORDS + j);
                    const u32 nibbles = nibbles_of(codes[n][j - w], high);
                    if (high)
                        operand_of<1>(key, nibbles, both, opaque);
                    else
                        operand_of<0>(key, nibbles, both, opaque);
#pragma unroll
                    for (int i = 0; i < TILES; i++) mma_f16(s[i][n], q[i], key[0], key[1]);
                }
            }
        }
    }
    if (LOOK_FOR_NAN) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            nan[n] = 0;
#pragma unroll
            for (int j = 0; j < WORDS; j++)  // a token's scales need not be whole words
                nan[n] |= marks_of(scales[n / 2], n % 2 * WORDS + j);
        }
    }
}

// Add values of a unit whose P begins at `token` of the step's.
__device__ __forceinline__ void add_stored(
    State& state, u32& nan, const u8* unit, int token, const Exchange& exchange, const Opaque& opaque) {
    const int lane = exchange.lane, own = exchange.warp * OWN;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 operand[TILES][4], scales[(OWN + 1) / 2], words[OWN];
        const u8* scales_at = unit + UNIT_SCALES + (2 + i) * D + lane / 4 * (D / 8) + 2 * own;
        if constexpr (OWN == 1)
            scales[0] = *reinterpret_cast<const u16*>(scales_at);
        else
            read_words<OWN / 2>(scales, scales_at);
        // A lane has words of 4 groups together, or of the 2 that are left.
        const int pitch = own < GROUPS / 4 * 4 ? 16 : 8;
        read_words<OWN>(words, unit + (2 + i) * TILE_CODES + own / 4 * 512 + lane * pitch + own % 4 * 4);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            load_matrices(operand[tile], exchange.operand + tile * 16 * P_PITCH + (token + 16 * i) * 2);
#pragma unroll
        for (int m = 0; m < OWN; m++) {
            const u32 both = scales_of(scales, m);
            u32 low[2], high[2];
            operand_of<0>(low, nibbles_of(words[m], 0), both, opaque);
            operand_of<1>(high, nibbles_of(words[m], 1), both, opaque);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                mma_f16(state.output[tile][2 * m], operand[tile], low[0], low[1]);
                mma_f16(state.output[tile][2 * m + 1], operand[tile], high[0], high[1]);
            }
        }
        if (LOOK_FOR_NAN) {
#pragma unroll
            for (int m = 0; m < OWN; m++) nan |= marks_of(scales, m);
        }
    }
}

// Units from `first` to `last`, of which each warp's first is under way; `shared` is the block's.
__device__ __forceinline__ void stored_units(
    State& state, u32& nan, const Arguments& a, const Ranges& r, const int* table, int head, u32 queries,
    int first, int last, u8* shared, const Exchange& exchange) {
    const int lane = exchange.lane, warp = exchange.warp, g = lane / 4, t = lane % 4;
    u8* const mine = shared + warp * WARP_BYTES;
    int here = PACKED_AT, other = OTHER_AT;
#pragma unroll 1
    for (int begin = first; begin < last; begin += WARPS) {
        const int unit = begin + warp;
        const Tiles next(r, table, unit + WARPS);
        float s[TILES][4][4];
        wait_for_copies();
        __syncwarp();  // what all lanes have copied is there
        if (unit < last) {
            u32 row_nan[4];
            stored_scores(s, row_nan, mine + here, queries, lane, a.opaque);
            const int token = (r.stored_low / 32 + unit) * 32;
            const bool masked = token < r.stored_low || token + 32 > r.stored_high;
            const auto hidden = [&](int at) { return at < r.stored_low || at >= r.stored_high; };
            if (LOOK_FOR_NAN) {
#pragma unroll
                for (int n = 0; n < 4; n++)
                    if (!masked || !hidden(token + n / 2 * 16 + 2 * g + n % 2)) nan |= row_nan[n];
            }
            if (masked) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (hidden(token + n / 2 * 16 + 4 * t + 2 * e + n % 2)) {
#pragma unroll
                            for (int i = 0; i < TILES; i++) s[i][n][e] = s[i][n][e + 2] = -INFINITY;
                        }
                    }
                }
            }
        }
        softmax(state, s, unit < last, a.score_scale, a.cap, exchange);
        // All warps are done with the step before.
        if (unit + WARPS < last) copy_unit(mine + other, a, next, head, lane);
        if (unit < last) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                float sum[4] = {};
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    const u32 p[4] = {
                        as_halves(s[i][n][0], s[i][n][1]), as_halves(s[i][n][2], s[i][n][3]),
                        as_halves(s[i][n + 1][0], s[i][n + 1][1]), as_halves(s[i][n + 1][2], s[i][n + 1][3])};
                    exchange.store(i, 32 * warp + 8 * n, p);
                    mma_f16(sum, p, HALF_ONES, HALF_ONES);
                }
                state.total[i][0] += sum[0], state.total[i][1] += sum[2];
            }
        }
        __syncthreads();
        if (exchange.has_channels()) {
            const int count = min(WARPS, last - begin);
#pragma unroll 2
            for (int w = 0; w < count; w++)
                add_stored(state, nan, shared + w * WARP_BYTES + here, 32 * w, exchange, a.opaque);
        }
        const int done = here;
        here = other, other = done;
    }
}

// --- tokens in 16 bits -----------------------------------------------------------------------------

// Scores of a warp's unit, and what they become.
__device__ __forceinline__ void whole_scores(
    float (&s)[TILES][2][4], const Arguments& a, const Part& part, const WholeUnit& unit, const u8* copied, int lane) {
    const int g = lane / 4, t = lane % 4;
    // Columns of n are tokens 8 n to 8 n + 7.
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int n = 0; n < 2; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
    }
#pragma unroll 2
    for (int j = 0; j < D / 32; j++) {
        uint4 k[2];
#pragma unroll
        for (int n = 0; n < 2; n++)
            k[n] = *reinterpret_cast<const uint4*>(copied + (8 * n + g) * WHOLE_PITCH + 64 * j + 16 * t);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            uint4 q[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = 16 * i + 8 * h + g;
                q[h] = make_uint4(0, 0, 0, 0);
                if (row < part.count) q[h] = load_whole(part.queries + row * a.q_head_stride + 32 * j + 8 * t);
            }
            const u32 one[4] = {q[0].x, q[1].x, q[0].y, q[1].y}, two[4] = {q[0].z, q[1].z, q[0].w, q[1].w};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma_16(s[i][n], one, k[n].x, k[n].y);
                mma_16(s[i][n], two, k[n].z, k[n].w);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int token = unit.tile * 16 + 8 * n + 2 * t + e;
            if (token < unit.low || token >= unit.high) {
#pragma unroll
                for (int i = 0; i < TILES; i++) s[i][n][e] = s[i][n][e + 2] = -INFINITY;
            }
        }
    }
}

// Units in 16 bits from `first` to `last`, of which each warp's first is under way.
__device__ __forceinline__ void whole_units(
    State& state, const Arguments& a, const Part& part, const int* table, int first, int last, u8* shared,
    const Exchange& exchange) {
    const int lane = exchange.lane, warp = exchange.warp;
#pragma unroll 1
    for (int begin = first; begin < last; begin += WARPS) {
        const int unit = begin + warp;
        float s[TILES][2][4];
        wait_for_copies();
        __syncwarp();
        if (unit < last)
            whole_scores(s, a, part, WholeUnit(part.ranges, unit), shared + warp * WARP_BYTES, lane);
        softmax(state, s, unit < last, a.score_scale, a.cap, exchange);
        if (unit < last) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                // P in two parts: rounded, and what is left.
                u32 rounded[4], rest[4];
#pragma unroll
                for (int k = 0; k < 4; k++)
                    rounded[k] = split(s[i][k / 2][k % 2 * 2], s[i][k / 2][k % 2 * 2 + 1], rest[k]);
                exchange.store(i, 32 * warp, rounded);
                exchange.store(i, 32 * warp + 16, rest);
                float sum[4] = {};
                mma_16(sum, rounded, ONES, ONES);
                mma_16(sum, rest, ONES, ONES);
                state.total[i][0] += sum[0], state.total[i][1] += sum[2];
            }
        }
        __syncthreads();
        if (exchange.has_channels()) {
            const int count = min(WARPS, last - begin);
#pragma unroll 1
            for (int w = 0; w < count; w++) {
                const u32 values =
                    transposed_address<WHOLE_PITCH>(shared + w * WARP_BYTES, lane) + 2 * D + warp * OWN * 32;
                u32 p[TILES][2][4];
#pragma unroll
                for (int i = 0; i < TILES; i++) {
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        load_matrices(p[i][k], exchange.operand + i * 16 * P_PITCH + w * 64 + k * 32);
                }
#pragma unroll
                for (int m = 0; m < OWN; m++) {
                    u32 v[4];
                    load_transposed(v, values + m * 32);
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
#pragma unroll
                        for (int b = 0; b < 2; b++) {
                            float sum[4] = {};
                            mma_16(sum, p[i][0], v[b], v[b + 2]);
                            mma_16(sum, p[i][1], v[b], v[b + 2]);
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                float& output = state.output[i][2 * m + b][e];
                                output = fmaf(sum[e], a.full_unit, output);
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();  // all warps are done with all units
        if (unit + WARPS < last)
            WholeRows(a, table, part.head, WholeUnit(part.ranges, unit + WARPS), lane)
                .copy(shared + warp * WARP_BYTES, lane);
    }
}

// --- a block's share -------------------------------------------------------------------------------

struct Wide {
    static constexpr int FOUND = FOUND_PITCH, WARP_BYTES = ::WARP_BYTES, FINDERS = 1;
    static constexpr bool RAGGED = true;

    static __device__ __forceinline__ void attend(
        const Part& part, const Arguments& a, u8* shared, int lane, int warp) {
        u8* mine = shared + warp * WARP_BYTES;
        u8* rows = shared + WARPS * WARP_BYTES;
        float* row_factors = reinterpret_cast<float*>(rows + ROWS * Q_PITCH);
        float* maxima = row_factors + ROWS;
        u8* p = reinterpret_cast<u8*>(maxima + ROWS * WARPS);
        const Exchange exchange = {row_factors, maxima, p, matrices_address<P_PITCH>(p, lane), warp, lane};
        // What the first units need is under way before anything is waited for.
        const int whole = part.whole_units(), whole_end = min(part.last, whole);
        const int stored = max(part.first, whole) - whole, stored_end = part.last - whole;
        const int* full_table = part.full_table(a);
        const Tiles tiles(part.ranges, part.table(a), stored + warp);
        const auto copy_stored = [&](bool now) {
            if (now && stored + warp < stored_end) copy_unit(mine + PACKED_AT, a, tiles, part.head, lane);
        };
        const bool any_whole = part.first < whole_end, own_whole = part.first + warp < whole_end;
        WholeRows rows_of_first = {};
        if (own_whole) rows_of_first = WholeRows(a, full_table, part.head, WholeUnit(part.ranges, part.first + warp), lane);
        start();
        Queries loaded;
        loaded.load(a, part);
        if (own_whole) rows_of_first.copy(mine, lane);
        copy_stored(AHEAD || !any_whole);
        loaded.store(rows, row_factors, a.score_scale);

        State state;
        state.clear();
        whole_units(state, a, part, full_table, part.first, whole_end, shared, exchange);
        if (!AHEAD) copy_stored(any_whole);
        __syncthreads();  // all rows are there
        u32 nan = 0;
        stored_units(
            state, nan, a, part.ranges, part.table(a), part.head,
            matrices_address<Q_PITCH>(rows, lane), stored, stored_end, shared, exchange);

        state.leave(reinterpret_cast<float*>(shared), LOOK_FOR_NAN && any_nan(nan), exchange);
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) paged_decode_wide(DECODE_PARAMETERS) {
    const Arguments a = DECODE_ARGUMENTS;
    decode_work<Wide>(a);
}
