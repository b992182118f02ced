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
// Packed tokens are copied to shared memory while the unit before them is multiplied, so that registers are free for
// sums: of 32 queries and 128 channels they are half of what a lane can have.
//
// Its code is kept small: a multiprocessor runs most of it once or twice, and fetches it first.
//
// Work is shared out as decode_work.cuh says, and merged by paged_decode_merge.cu.
//
// Macros: those of decode_work.cuh, QUERIES at most 16 * TILES; TILES of 16 query heads; BLOCKS a multiprocessor.

#include "decode_work.cuh"

constexpr int ROWS = 16 * TILES;
constexpr int WORDS = D / 32;            // of codes of a lane for a token's key; of scales of two tokens' keys
constexpr int TILE_CODES = 8 * D;        // bytes of codes of 16 tokens' keys, or of their values
constexpr int UNIT_SCALES = 32 * D;      // a unit in shared memory: codes of keys, of values; scales likewise
constexpr int UNIT_BYTES = 36 * D;
constexpr int WHOLE_PITCH = 4 * D + 16;  // bytes of a token's key and value in 16 bits
constexpr int Q_PITCH = 2 * D + 16;
constexpr int FOUND_PITCH = D + 8;       // floats; rows that are written at once are 8 banks apart
constexpr float P_LOG2 = 15.0f;          // P is in units of 2^-15, so that small ones are normal numbers
// Whether a warp's first packed unit comes while tokens in 16 bits are attended to: where what a warp finds takes as
// much shared memory as both, at any rate.
constexpr bool AHEAD = 16 * WHOLE_PITCH + UNIT_BYTES <= QUERIES * FOUND_PITCH * 4;
constexpr bool LOOK_FOR_NAN = !E4M3_NAN_IS_NAN;  // else a NaN scale is a NaN of all that it is multiplied into

static_assert(QUERIES <= ROWS && D % 32 == 0);

// The running softmax of a warp: lane (g, t) has rows g and g + 8 of each tile, and their channels 8 n + 2 t and
// 8 n + 2 t + 1, as accumulators have them. Totals are of the lane's own tokens.
struct State {
    float maximum[TILES][2], total[TILES][2], output[TILES][2 * GROUPS][4];
};

// What the rows' scores still have to be multiplied by.
struct Factors {
    float of[TILES][2];
};

// Scores of 8 COUNT tokens become P. What was summed up before is scaled to the new maximum.
template <int COUNT>
__device__ __forceinline__ void softmax(
    State& state, float (&s)[TILES][COUNT][4], const Factors& factors, float cap) {
    float scale[TILES][2];
    bool higher = false;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float factor = factors.of[i][h];
            if (SOFT_CAP) {
#pragma unroll
                for (int n = 0; n < COUNT; n++) {
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++)
                        if (s[i][n][e] != -INFINITY) s[i][n][e] = capped(s[i][n][e], factor, cap);
                }
                factor = 1.0f;
            }
            float most = s[i][0][2 * h];
#pragma unroll
            for (int n = 0; n < COUNT; n++) most = fmaxf(most, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
#pragma unroll
            for (int mask = 1; mask < 4; mask *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, mask));
            const float before = state.maximum[i][h], now = fmaxf(before, most * factor);
            // All is -inf until a first token is seen.
            const float base = now == -INFINITY ? 0.0f : now;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++) {
                    s[i][n][e] = exp2_approx(fmaf(s[i][n][e], factor, P_LOG2 - base));
                    sum += s[i][n][e];
                }
            }
            scale[i][h] = exp2_approx(before - base);
            state.total[i][h] = fmaf(state.total[i][h], scale[i][h], sum);
            state.maximum[i][h] = now;
            higher = higher || now != before;
        }
    }
    if (__any_sync(~0u, higher)) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int n = 0; n < 2 * GROUPS; n++) {
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
    int tile[2], page[2];

    __device__ Tiles(const Ranges& r, const int* table, int unit) {
        const int least = r.stored_low / 16, most = (r.stored_high - 1) / 16;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tile[i] = min(max(2 * (r.stored_low / 32 + unit) + i, least), most);
            page[i] = __ldg(table + tile[i] / (PAGE / 16));
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
    const int inside_first = tiles.tile[0] % (PAGE / 16), inside_second = tiles.tile[1] % (PAGE / 16);
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

// Bit 7 of a byte of what comes is set where one of `words` is E4M3's NaN.
template <int COUNT>
__device__ __forceinline__ u32 nan_in(const u32* words) {
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) found |= (words[i] & 0x7F7F7F7Fu) + 0x01010101u;
    return found;
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
// tokens 16 i + 2 g + p, as nan_in gives it.
__device__ __forceinline__ void stored_scores(
    float (&s)[TILES][4][4], u32 (&nan)[4], const u8* unit, u32 queries, int lane, const Opaque& opaque) {
    const int g = lane / 4, t = lane % 4;
    u32 codes[2][2][WORDS], scales[2][WORDS];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int p = 0; p < 2; p++) {
            constexpr int ONCE = WORDS > 4 ? 4 : WORDS;
#pragma unroll
            for (int w = 0; w < WORDS; w += ONCE) {
                const int at = (2 * g + p) * (D / 2) + t * (D / 8) + 4 * w;
                read_words<ONCE>(codes[i][p] + w, unit + i * TILE_CODES + place_of(at / 16) * 16 + at % 16);
            }
        }
        read_words<WORDS>(scales[i], unit + UNIT_SCALES + i * D + g * (D / 8));
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int n = 0; n < 4; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < WORDS; j++) {
        u32 q[2][TILES][4];
#pragma unroll
        for (int high = 0; high < 2; high++) {
#pragma unroll
            for (int i = 0; i < TILES; i++)
                load_matrices(q[high][i], queries + i * 16 * Q_PITCH + (2 * j + high) * 32);
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const u32 word = codes[n / 2][n % 2][j], both = scales_of(scales[n / 2], n % 2 * WORDS + j);
            u32 low[2], high[2];
            operand_of<0>(low, nibbles_of(word, 0), both, opaque);
            operand_of<1>(high, nibbles_of(word, 1), both, opaque);
#pragma unroll
            for (int i = 0; i < TILES; i++) mma_f16(s[i][n], q[0][i], low[0], low[1]);
#pragma unroll
            for (int i = 0; i < TILES; i++) mma_f16(s[i][n], q[1][i], high[0], high[1]);
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

__device__ __forceinline__ void add_stored(
    State& state, u32& nan, const u8* unit, const float (&p)[TILES][4][4], int lane, const Opaque& opaque) {
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 operand[TILES][4];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float(&from)[4] = p[tile][2 * i + n];
                operand[tile][2 * n] = as_halves(from[0], from[1]);
                operand[tile][2 * n + 1] = as_halves(from[2], from[3]);
            }
        }
        u32 scales[WORDS];
        read_words<WORDS>(scales, unit + UNIT_SCALES + (2 + i) * D + g * (D / 8));
        const u8* codes = unit + (2 + i) * TILE_CODES;
#pragma unroll
        for (int first = 0; first < GROUPS; first += 4) {
            constexpr int LAST = GROUPS % 4 ? GROUPS % 4 : 4;
            const int width = first + 4 <= GROUPS ? 4 : LAST;
            u32 words[4];
            if (first + 4 <= GROUPS)
                read_words<4>(words, codes + first * 128 + lane * 16);
            else
                read_words<LAST>(words, codes + first * 128 + lane * (4 * LAST));
#pragma unroll
            for (int m = first; m < first + width; m++) {
                const u32 both = scales_of(scales, m);
                u32 low[2], high[2];
                operand_of<0>(low, nibbles_of(words[m - first], 0), both, opaque);
                operand_of<1>(high, nibbles_of(words[m - first], 1), both, opaque);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    mma_f16(state.output[tile][2 * m], operand[tile], low[0], low[1]);
                    mma_f16(state.output[tile][2 * m + 1], operand[tile], high[0], high[1]);
                }
            }
        }
        if (LOOK_FOR_NAN) nan |= nan_in<WORDS>(scales);
    }
}

__device__ __forceinline__ void stored_units(
    State& state, u32& nan, const Arguments& a, const Ranges& r, const int* table, int head, u32 queries,
    const Factors& factors, const Tiles& tiles, int first, int last, u8* shared, int lane) {
    if (first >= last) return;
    const int g = lane / 4, t = lane % 4;
    u8* unit_at = shared + (AHEAD ? 16 * WHOLE_PITCH : UNIT_BYTES);
    u8* other = shared;
    if (!AHEAD) copy_unit(unit_at, a, tiles, head, lane);
    Tiles next(r, table, first + WARPS);
#pragma unroll 1
    for (int unit = first; unit < last; unit += WARPS) {
        wait_for_copies();
        __syncwarp();  // what all lanes have copied is there, and all are done with the unit before
        if (unit + WARPS < last) {
            copy_unit(other, a, next, head, lane);
            next = Tiles(r, table, unit + 2 * WARPS);
        }
        float s[TILES][4][4];
        u32 row_nan[4];
        stored_scores(s, row_nan, unit_at, queries, lane, a.opaque);
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
        softmax(state, s, factors, a.cap);
        add_stored(state, nan, unit_at, s, lane, a.opaque);
        u8* const done = unit_at;
        unit_at = other, other = done;
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

__device__ __forceinline__ void whole_unit(
    State& state, const Arguments& a, const Part& part, const WholeUnit& unit, const u8* shared, int lane) {
    const int g = lane / 4, t = lane % 4;
    wait_for_copies();
    __syncwarp();
    // Columns of n are tokens 8 n to 8 n + 7.
    float s[TILES][2][4] = {};
#pragma unroll 2
    for (int j = 0; j < D / 32; j++) {
        uint4 k[2];
#pragma unroll
        for (int n = 0; n < 2; n++)
            k[n] = *reinterpret_cast<const uint4*>(shared + (8 * n + g) * WHOLE_PITCH + 64 * j + 16 * t);
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
    Factors factors;
#pragma unroll
    for (int i = 0; i < TILES; i++) factors.of[i][0] = factors.of[i][1] = a.score_scale;
    softmax(state, s, factors, a.cap);
    // P in two parts: rounded, and what is left.
    u32 high_part[TILES][4], low_part[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float one = s[i][k / 2][k % 2 * 2], two = s[i][k / 2][k % 2 * 2 + 1];
            const u32 rounded = narrowed(one) | narrowed(two) << 16;
            high_part[i][k] = rounded;
            low_part[i][k] = narrowed(one - widened(rounded & 0xFFFF)) | narrowed(two - widened(rounded >> 16)) << 16;
        }
    }
    const u32 address =
        shared_address(shared) + (lane % 8 + lane / 16 * 8) * WHOLE_PITCH + 2 * D + lane / 8 % 2 * 16;
#pragma unroll
    for (int m = 0; m < GROUPS; m++) {
        u32 v[4];
        load_transposed(v, address + m * 32);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                float sum[4] = {};
                mma_16(sum, high_part[i], v[b], v[b + 2]);
                mma_16(sum, low_part[i], v[b], v[b + 2]);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    state.output[i][2 * m + b][e] = fmaf(sum[e], a.full_unit, state.output[i][2 * m + b][e]);
            }
        }
    }
    __syncwarp();
}

// --- a block's share -------------------------------------------------------------------------------

__device__ constexpr int larger(int a, int b) {
    return a > b ? a : b;
}

struct Wide {
    static constexpr int FOUND = FOUND_PITCH;
    static constexpr int WARP_BYTES = larger(larger(2 * UNIT_BYTES, 16 * WHOLE_PITCH), QUERIES * FOUND * 4);
    static constexpr float OUTPUT_UNIT = WIDE_OUTPUT_UNIT;
    static constexpr int LEAST = WIDE_LEAST, CHANNELS = 4;
    static constexpr bool EVEN = WIDE_EVEN, MERGES = false, RAGGED = true;

    static __device__ __forceinline__ void attend(
        const Part& part, const Arguments& a, u8* shared, int lane, int warp) {
        u8* mine = shared + warp * WARP_BYTES;
        u8* rows = shared + WARPS * WARP_BYTES + 16;
        float* row_factors = reinterpret_cast<float*>(rows + ROWS * Q_PITCH);
        const int g = lane / 4, t = lane % 4;
        // What the first units need is under way before anything is waited for.
        const int whole = part.whole_units(), whole_end = min(part.last, whole);
        int unit = part.first + warp;
        const int ahead = unit + (max(whole - unit, 0) + WARPS - 1) / WARPS * WARPS;  // the first packed one
        const int* full_table = part.full_table(a);
        const Tiles tiles(part.ranges, part.table(a), ahead - whole);
        Queries loaded;
        loaded.load(a, part);
        if (unit < whole_end) copy_whole(mine, a, full_table, part.head, WholeUnit(part.ranges, unit), lane);
        if (AHEAD && ahead < part.last) copy_unit(mine + 16 * WHOLE_PITCH, a, tiles, part.head, lane);
        loaded.store(rows, row_factors, a.score_scale);

        State state;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) state.maximum[i][h] = -INFINITY, state.total[i][h] = 0.0f;
#pragma unroll
            for (int n = 0; n < 2 * GROUPS; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) state.output[i][n][e] = 0.0f;
            }
        }
#pragma unroll 1
        for (; unit < whole_end; unit += WARPS) {
            whole_unit(state, a, part, WholeUnit(part.ranges, unit), mine, lane);
            if (unit + WARPS < whole_end)
                copy_whole(mine, a, full_table, part.head, WholeUnit(part.ranges, unit + WARPS), lane);
        }
        __syncthreads();  // all rows are there
        Factors factors;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) factors.of[i][h] = row_factors[16 * i + 8 * h + g];
        }
        const u32 queries =
            shared_address(rows) + (lane % 8 + lane / 8 % 2 * 8) * Q_PITCH + lane / 16 * 16;
        u32 nan = 0;
        stored_units(
            state, nan, a, part.ranges, part.table(a), part.head, queries, factors, tiles, unit - whole,
            part.last - whole, mine, lane);

        __syncwarp();  // all lanes are done with the last unit
        const bool broken = LOOK_FOR_NAN && __any_sync(~0u, nan & 0x80808080u);
        float* found = reinterpret_cast<float*>(mine);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float total = state.total[i][h];
#pragma unroll
                for (int mask = 1; mask < 4; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
                if (broken) total = NAN;
                const int row = 16 * i + 8 * h + g;
                if (row < QUERIES) {
                    float* to = found + row * FOUND;
#pragma unroll
                    for (int n = 0; n < 2 * GROUPS; n++)
                        *reinterpret_cast<float2*>(to + 8 * n + 2 * t) =
                            make_float2(state.output[i][n][2 * h], state.output[i][n][2 * h + 1]);
                    if (t == 0) to[D] = state.maximum[i][h], to[D + 1] = total;
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) paged_decode_wide(DECODE_PARAMETERS) {
    const Arguments a = DECODE_ARGUMENTS;
    decode_work<Wide>(a);
}
