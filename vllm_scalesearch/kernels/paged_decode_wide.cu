// Decoding attention over the paged cache (see paged_decode.cu) where a KV head has many query heads: a program takes
// up to 32 of them, whose products are full. Compute capability 8.0 and newer.
//
// Scales are multiplied into the elements, once for all queries: E2M1 as fp16, 2^-14 of it, times E4M3 as fp16. That
// is exact, subnormal numbers included: such products are multiples of 2^-24 of at most 6 bits. Their sums over all
// channels, and those of all tokens, stay in the accumulators of `mma.m16n8k16`.
//
// Orientation. Queries are rows, 16 of a tile: S = Q K^T has stored keys, and O = P V stored values, as operand B. In
// that operand lane (g, t) has column g, which is what it has as row g of pages that are in the order of operand A
// (kv_pages.py). What a lane has of S is then what it needs of P, if the columns of S are the right tokens: V's pages
// have tokens 4 t and 4 t + 2 of 16 at the places 2 t and 2 t + 1 of a product, and 4 t + 1 and 4 t + 3 at 8 more, so
// column n of one product with keys is token 2 n and of another token 2 n + 1. Nothing is shuffled.
//
// Q's channels are in the order of K's pages, in shared memory: fp16, brought to its upper range by powers of two, as
// P is, so that a bf16 query is exact (but for what is below 2^-28 of its row's largest) and P is rounded to 11 bits.
//
// Warps of a block score tokens of their own, a unit each at a time, and put P into shared memory; then each has
// channels of its own, of all those tokens. So nothing is decoded twice, and a warp's sums are few enough for several
// blocks a multiprocessor, which fill each other's waits. All warps agree on a step's maxima before there is a P.
//
// Packed tokens are copied to shared memory a step ahead.
//
// Its code is kept small: a multiprocessor runs most of it once or twice, and fetches it first.
//
// Work is shared out as decode_work.cuh says, and merged by paged_decode_merge.cu.
//
// Macros: those of decode_work.cuh, QUERIES at most 16 * TILES; TILES of 16 query heads; BLOCKS a multiprocessor;
// AHEAD 0 or 1: there is shared memory for packed tokens while ones in 16 bits are attended to.

#include "decode_work.cuh"

constexpr int ROWS = 16 * TILES;
constexpr int WORDS = D / 32;            // of codes of a lane for a token's key; of scales of two tokens' keys
constexpr int TILE_CODES = 8 * D;        // bytes of codes of 16 tokens' keys, or of their values
constexpr int UNIT_SCALES = 32 * D;      // a unit in shared memory: codes of keys, of values; scales likewise
constexpr int UNIT_BYTES = 36 * D;
constexpr int WHOLE_PITCH = 4 * D + 16;  // bytes of a token's key and value in 16 bits
constexpr int Q_PITCH = 2 * D + 16;
constexpr int FOUND_PITCH = D + 8;       // floats; rows that are written at once are 8 banks apart
constexpr int P_PITCH = 64 * WARPS + 16;
constexpr u32 HALF_ONES = 0x3C003C00u, ONES = HALF ? HALF_ONES : 0x3F803F80u;
constexpr int OWN = (GROUPS + WARPS - 1) / WARPS;  // groups of channels of a warp; of 6 the last warp has none
constexpr float P_LOG2 = 15.0f;          // P is in units of 2^-15, so that small ones are normal numbers
constexpr int PACKED_AT = AHEAD ? 16 * WHOLE_PITCH : 0;  // a warp's first packed unit
constexpr int OTHER_AT = AHEAD ? 0 : UNIT_BYTES;         // and its second
constexpr bool LOOK_FOR_NAN = !E4M3_NAN_IS_NAN;  // else a NaN scale is a NaN of all that it is multiplied into

constexpr int K_WORDS = 2;               // of a token's codes that a lane reads at once, as registers allow

// What a warp copies: a unit in 16 bits and one packed, or two packed ones, which are larger than one in 16 bits.
constexpr int WARP_BYTES = (AHEAD ? 16 * WHOLE_PITCH : UNIT_BYTES) + UNIT_BYTES;

static_assert(QUERIES <= ROWS && D % 32 == 0 && GROUPS % OWN == 0 && WARPS == 4);
static_assert(WARP_BYTES >= 16 * WHOLE_PITCH && WARPS * WARP_BYTES >= QUERIES * FOUND_PITCH * 4);

// What a block's warps tell each other in a step.
struct Exchange {
    const float* factors;  // what is to multiply the scores of each row
    float* maxima;         // of each row each warp's
    u8* p;                 // rows of P: of each warp 32 tokens in fp16, or 16 in the model's dtype and their rests
    u32 operand;           // the address in it that this lane needs for load_matrices
    int warp, lane;

    // A tile's operand of 16 tokens.
    __device__ __forceinline__ void store(int tile, int token, const u32 (&x)[4]) const {
#pragma unroll
        for (int k = 0; k < 4; k++)
            *reinterpret_cast<u32*>(
                p + (16 * tile + k % 2 * 8 + lane / 4) * P_PITCH + (token + k / 2 * 8 + lane % 4 * 2) * 2) = x[k];
    }
    __device__ __forceinline__ bool has_channels() const { return GROUPS == OWN * WARPS || warp * OWN < GROUPS; }
};

// The running softmax of a block: lane (g, t) has rows g and g + 8 of each tile, and channels 8 n + 2 t and
// 8 n + 2 t + 1 of its warp's, as accumulators have them. Totals are of the tokens that its warp scored, as rounded.
struct State {
    float maximum[TILES][2], total[TILES][2], output[TILES][2 * OWN][4];
};

// Scores of a warp's 8 COUNT tokens become P, where it has any. What was summed up before is scaled to the new maximum.
// Every warp of the block has come here before one goes on.
template <int COUNT>
__device__ __forceinline__ void softmax(
    State& state, float (&s)[TILES][COUNT][4], bool any, float scale_of_all, float cap, const Exchange& exchange) {
    const int row = exchange.lane / 4;
    float factor[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            factor[i][h] = COUNT == 4 ? exchange.factors[16 * i + 8 * h + row] : scale_of_all;
            if (SOFT_CAP) {
#pragma unroll
                for (int n = 0; n < COUNT; n++) {
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++)
                        if (s[i][n][e] != -INFINITY) s[i][n][e] = capped(s[i][n][e], factor[i][h], cap);
                }
                factor[i][h] = 1.0f;
            }
            float most = s[i][0][2 * h];
#pragma unroll
            for (int n = 0; n < COUNT; n++) most = fmaxf(most, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, mask));
            if (exchange.lane % 4 == 0)
                exchange.maxima[(16 * i + 8 * h + row) * WARPS + exchange.warp] =
                    any ? most * factor[i][h] : -INFINITY;
        }
    }
    __syncthreads();
    float scale[TILES][2];
    bool higher = false;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float before = state.maximum[i][h];
            const float4 of = *reinterpret_cast<const float4*>(exchange.maxima + (16 * i + 8 * h + row) * WARPS);
            const float now = fmaxf(before, fmaxf(fmaxf(of.x, of.y), fmaxf(of.z, of.w)));
            // All is -inf until a first token is seen.
            const float base = now == -INFINITY ? 0.0f : now;
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++)
                    s[i][n][e] = exp2_approx(fmaf(s[i][n][e], factor[i][h], P_LOG2 - base));
            }
            scale[i][h] = exp2_approx(before - base);
            state.total[i][h] *= scale[i][h];
            state.maximum[i][h] = now;
            higher = higher || now != before;
        }
    }
    if (__any_sync(~0u, higher)) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int n = 0; n < 2 * OWN; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) state.output[i][n][e] *= scale[i][e / 2];
            }
        }
    }
}

// --- queries ---------------------------------------------------------------------------------------

// A part's queries, for all warps of the block: rows of fp16 numbers, channels of each 16 in the order of K's pages,
// the even ones first; then what is to multiply the scores of each row. Rows of no query are zeros. Lanes of a row
// have four channels at a time.
struct Queries {
    static constexpr int LANES = WARPS * 32 / ROWS, PIECES = D / 4 / LANES;
    static_assert(D / 4 % LANES == 0);
    uint2 x[PIECES];

    __device__ __forceinline__ void load(const Arguments& a, const Part& part) {
        const int row = threadIdx.x / LANES;
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            x[n] = make_uint2(0, 0);
            if (row < part.count)
                x[n] = *reinterpret_cast<const uint2*>(
                    part.queries + row * a.q_head_stride + 4 * (n * LANES + threadIdx.x % LANES));
        }
    }
    __device__ __forceinline__ void store(u8* rows, float* factors, float score_scale) const {
        const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        float amax = 0.0f;
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            amax = fmaxf(amax, fmaxf(fabsf(widened(x[n].x & 0xFFFF)), fabsf(widened(x[n].x >> 16))));
            amax = fmaxf(amax, fmaxf(fabsf(widened(x[n].y & 0xFFFF)), fabsf(widened(x[n].y >> 16))));
        }
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, mask));
        // A power of two that brings the largest to [2^14, 2^15).
        const int exponent = min(max(static_cast<int>(__float_as_uint(amax) >> 23), 40), 220);
        const float unit = __uint_as_float((268 - exponent) << 23);
#pragma unroll
        for (int n = 0; n < PIECES; n++) {
            const int channel = 4 * (n * LANES + lane);
            u8* to = rows + row * Q_PITCH + channel / 16 * 32 + channel % 16;
            *reinterpret_cast<u32*>(to) = as_halves(widened(x[n].x & 0xFFFF) * unit, widened(x[n].y & 0xFFFF) * unit);
            *reinterpret_cast<u32*>(to + 16) = as_halves(widened(x[n].x >> 16) * unit, widened(x[n].y >> 16) * unit);
        }
        // E2M1 is 2^-14 of itself.
        if (lane == 0) factors[row] = __uint_as_float(exponent << 23) * score_scale;
    }
};

// --- stored tokens ---------------------------------------------------------------------------------

// Where a piece of 16 bytes of keys' codes lies in shared memory, so that lanes that read at once do not meet in a
// bank: rows are a power of two of pieces, but for heads of 96.
__device__ __forceinline__ int place_of(int piece) {
    if (D == 64) return piece ^ (piece >> 3 & 1) << 1;
    if (D == 128) return piece ^ (piece >> 3 & 1) << 2;
    if (D == 256) return piece ^ (piece >> 4 & 1);
    return piece;
}

// A unit's two tiles and the pages that they are in. Tiles outside the stored ones are others, and masked.
struct Tiles {
    u32 tile[2];
    int page[2];

    __device__ Tiles(const Ranges& r, const int* table, int unit) {
        const int least = r.stored_low / 16, most = (r.stored_high - 1) / 16;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tile[i] = min(max(2 * (r.stored_low / 32 + unit) + i, least), most);
            page[i] = i && PAGE % 32 == 0 ? page[0] : __ldg(table + tile[i] / (PAGE / 16));
        }
    }
};

// Begin to copy a unit.
__device__ __forceinline__ void copy_unit(u8* to, const Arguments& a, const Tiles& tiles, int head, int lane) {
    const auto page_of = [&](int i) {
        return a.pages + static_cast<long long>(tiles.page[i]) * a.page_stride + head * a.head_stride;
    };
    const u8* const first = page_of(0);
    const u8* const second = page_of(1);
    const u32 inside_first = tiles.tile[0] % (PAGE / 16), inside_second = tiles.tile[1] % (PAGE / 16);
    u8* keys = to + place_of(lane) * 16;
    u8* values = to + 2 * TILE_CODES + lane * 16;
    const u8* const codes_first = first + inside_first * TILE_CODES + lane * 16;
    const u8* const codes_second = second + inside_second * TILE_CODES + lane * 16 - TILE_CODES;
#pragma unroll
    for (int n = 0; n < 2 * TILE_CODES / 512; n++) {
        const bool in_first = n * 512 + (TILE_CODES % 512 ? lane * 16 : 0) < TILE_CODES;
        const u8* from = (in_first ? codes_first : codes_second) + n * 512;
        copy_16(keys + n * 512, from);
        copy_16(values + n * 512, from + V_CODES);
    }
    // Scales of K of both tiles, then of V.
#pragma unroll
    for (int n = 0; n < (D / 4 + 31) / 32; n++) {
        const int piece = n * 32 + lane, area = piece / (D / 16);
        const u8* from = area % 2 ? second + inside_second * D : first + inside_first * D;
        if (piece < D / 4)
            copy_16(to + UNIT_SCALES + piece * 16, from + (area < 2 ? K_SCALES : V_SCALES) + piece % (D / 16) * 16);
    }
}

// COUNT words of shared memory, at an address that is a multiple of 4 * COUNT bytes, up to 16.
template <int COUNT>
__device__ __forceinline__ void read_words(u32* words, const u8* from) {
    if constexpr (COUNT % 4 == 0) {
        const uint4 x = *reinterpret_cast<const uint4*>(from);
        words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
        if constexpr (COUNT > 4) read_words<COUNT - 4>(words + 4, from + 16);
    } else if constexpr (COUNT == 2) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        words[0] = x.x, words[1] = x.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) words[i] = *reinterpret_cast<const u32*>(from + 4 * i);
    }
}

// The E4M3 numbers of half `index` of some words, as fp16.
__device__ __forceinline__ u32 scales_of(const u32* words, int index) {
    return index % 2 ? halves_of_e4m3<1>(words[index / 2]) : halves_of_e4m3<0>(words[index / 2]);
}

// One block's codes of a lane, in the low nibbles of a word's bytes, as an operand: 2^-14 of what they stand for.
// HIGH: their scale is in the high half of `scales`.
template <int HIGH>
__device__ __forceinline__ void operand_of(u32 (&b)[2], u32 nibbles, u32 scales, const Opaque& opaque) {
    const u32 scale = half_twice<HIGH>(scales);
    b[0] = mul_half2(halves_of_low_nibbles<0>(nibbles, opaque), scale);
    b[1] = mul_half2(halves_of_low_nibbles<1>(nibbles, opaque), scale);
}

// The nibbles of a word's bytes, the low ones or the high ones.
__device__ __forceinline__ u32 nibbles_of(u32 codes, int high) {
    return (high ? codes >> 4 : codes) & 0x0F0F0F0Fu;
}

// Scores of a unit, factors apart: s[..][2 * i + p] has tokens 16 i + 2 n + p in its columns n. nan: of the lane's
// tokens 16 i + 2 g + p; bit 7 or 15 is set where a scale is NaN.
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
            for (int j = 0; j < WORDS; j++) {  // a token's scales need not be whole words
                const int index = n % 2 * WORDS + j;
                const u32 half = scales[n / 2][index / 2] >> index % 2 * 16 & 0x7F7Fu;
                nan[n] |= half + 0x0101u;
            }
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
            for (int m = 0; m < OWN; m++) nan |= (scales[m / 2] >> m % 2 * 16 & 0x7F7Fu) + 0x0101u;
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

// Begin to copy keys and values of 16 tokens, a row each, 8 lanes of which have 128 bytes at a time.
__device__ __forceinline__ void copy_whole(
    u8* to, const Arguments& a, const int* table, int head, const WholeUnit& unit, int lane) {
    const u8* from[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        from[i] = reinterpret_cast<const u8*>(
            whole_token(a, table, head, unit.tile * 16 + 4 * i + lane / 8, unit.low, unit.high)) + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int n = 0; n < D / 32; n++)
            copy_16(to + (4 * i + lane / 8) * WHOLE_PITCH + n * 128 + lane % 8 * 16, from[i] + n * 128);
    }
}

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
                for (int k = 0; k < 4; k++) {
                    const float one = s[i][k / 2][k % 2 * 2], two = s[i][k / 2][k % 2 * 2 + 1];
                    rounded[k] = narrowed(one) | narrowed(two) << 16;
                    rest[k] = narrowed(one - widened(rounded[k] & 0xFFFF)) |
                              narrowed(two - widened(rounded[k] >> 16)) << 16;
                }
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
                const u32 values = shared_address(shared + w * WARP_BYTES) + 2 * D + warp * OWN * 32 +
                                   (lane % 8 + lane / 16 * 8) * WHOLE_PITCH + lane / 8 % 2 * 16;
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
            copy_whole(
                shared + warp * WARP_BYTES, a, table, part.head, WholeUnit(part.ranges, unit + WARPS), lane);
    }
}

// --- a block's share -------------------------------------------------------------------------------

struct Wide {
    static constexpr int FOUND = FOUND_PITCH, WARP_BYTES = ::WARP_BYTES, FINDERS = 1;
    static constexpr float OUTPUT_UNIT = WIDE_OUTPUT_UNIT;
    static constexpr int LEAST = WIDE_LEAST;
    static constexpr bool RAGGED = true;

    static __device__ __forceinline__ void attend(
        const Part& part, const Arguments& a, u8* shared, int lane, int warp) {
        u8* mine = shared + warp * WARP_BYTES;
        u8* rows = shared + WARPS * WARP_BYTES;
        float* row_factors = reinterpret_cast<float*>(rows + ROWS * Q_PITCH);
        float* maxima = row_factors + ROWS;
        u8* p = reinterpret_cast<u8*>(maxima + ROWS * WARPS);
        const int g = lane / 4, t = lane % 4;
        const int matrix_row = lane % 8 + lane / 8 % 2 * 8, matrix_at = lane / 16 * 16;
        const Exchange exchange = {
            row_factors, maxima, p, shared_address(p) + matrix_row * P_PITCH + matrix_at, warp, lane};
        // What the first units need is under way before anything is waited for.
        const int whole = part.whole_units(), whole_end = min(part.last, whole);
        const int stored = max(part.first, whole) - whole, stored_end = part.last - whole;
        const int* full_table = part.full_table(a);
        const Tiles tiles(part.ranges, part.table(a), stored + warp);
        const auto copy_stored = [&](bool now) {
            if (now && stored + warp < stored_end) copy_unit(mine + PACKED_AT, a, tiles, part.head, lane);
        };
        const bool any_whole = part.first < whole_end;
        Queries loaded;
        loaded.load(a, part);
        if (part.first + warp < whole_end)
            copy_whole(mine, a, full_table, part.head, WholeUnit(part.ranges, part.first + warp), lane);
        copy_stored(AHEAD || !any_whole);
        loaded.store(rows, row_factors, a.score_scale);

        State state;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) state.maximum[i][h] = -INFINITY, state.total[i][h] = 0.0f;
#pragma unroll
            for (int n = 0; n < 2 * OWN; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) state.output[i][n][e] = 0.0f;
            }
        }
        whole_units(state, a, part, full_table, part.first, whole_end, shared, exchange);
        if (!AHEAD) copy_stored(any_whole);
        __syncthreads();  // all rows are there
        u32 nan = 0;
        stored_units(
            state, nan, a, part.ranges, part.table(a), part.head,
            shared_address(rows) + matrix_row * Q_PITCH + matrix_at, stored, stored_end, shared, exchange);

        const bool broken = LOOK_FOR_NAN && __any_sync(~0u, nan & 0x80808080u);
        float* totals = maxima;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (t == 0) totals[(16 * i + 8 * h + g) * WARPS + warp] = broken ? NAN : state.total[i][h];
            }
        }
        __syncthreads();  // and all warps are done with the last units
        float* found = reinterpret_cast<float*>(shared);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = 16 * i + 8 * h + g;
                if (row >= QUERIES) continue;
                float* to = found + row * FOUND;
                if (exchange.has_channels()) {
#pragma unroll
                    for (int n = 0; n < 2 * OWN; n++)
                        *reinterpret_cast<float2*>(to + 16 * OWN * warp + 8 * n + 2 * t) =
                            make_float2(state.output[i][n][2 * h], state.output[i][n][2 * h + 1]);
                }
                if (warp == 0 && t == 0) {
                    const float4 of = *reinterpret_cast<const float4*>(totals + row * WARPS);
                    to[D] = state.maximum[i][h], to[D + 1] = of.x + of.y + of.z + of.w;
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) paged_decode_wide(DECODE_PARAMETERS) {
    const Arguments a = DECODE_ARGUMENTS;
    decode_work<Wide>(a);
}
