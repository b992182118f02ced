// Decoding attention over the paged cache: one query token a request, K and V stored as NVFP4 (kv_pages.py, V
// along tokens), sink and newest tokens in 16 bits. Compute capability 8.0 and newer.
//
// Stored values. Two E2M1 codes become two fp16 numbers, 2^-14 of them, in three instructions; Q and P are brought
// to fp16's upper range by powers of two, so that a bf16 query is exact (but for what is below 2^-28 of its row's
// largest) and P is rounded to 11 bits. Pages keep codes in the order of fragments of `mma.m16n8k16`, so what a
// lane loads in one piece is what it multiplies.
//
// Scales. A product over 16 is one scale block. Two such products add to the same accumulators: each query has two
// of the eight columns, one with its values for the first block and zeros for the second, and the reverse. So the
// sums of two blocks arrive apart, and are multiplied by their scales in fp32. K: rows are tokens, blocks lie along
// channels. V: rows are channels, blocks lie along tokens. E4M3 bits in the place of fp32's are the scale times
// 2^-120.
//
// Work is shared out and merged as decode_work.cuh says.
//
// Macros: those of decode_work.cuh, QUERIES at most 4 * TILES; TILES of four query heads; BLOCKS a multiprocessor.

#include "decode_work.cuh"

constexpr int K_WORDS = D / 32;         // words of codes of a lane for a token's key
constexpr int SCALE_WORDS = (D / 16 + 3) / 4;  // of scales of a token's key
constexpr int V_SCALE_WORDS = (2 * GROUPS + 3) / 4;
constexpr int PITCH = 2 * D + 16;       // bytes of a token's 16-bit values in shared memory
constexpr float P_UNIT = 32768.0f;      // of P's operands, so that small ones are normal numbers

static_assert(QUERIES <= 4 * TILES);

// A unit of stored tokens, in the order of pages.
struct StoredKeys {
    u32 codes[2][2][K_WORDS], scales[2][2][SCALE_WORDS];
};
struct StoredValues {
    u32 codes[2][GROUPS], scales[2][V_SCALE_WORDS];
};

// The running softmax of a warp: lane (g, t) has query 4 * tile + t, and channels 16 m + 8 b + g of its output.
struct State {
    float maximum[TILES], total[TILES], output[TILES][GROUPS][2];
};

// Where two tiles are: their pages, advanced by their first tokens' codes and scales, of which a token has as many
// bytes of keys as of values.
struct Places {
    const u8 *codes[2], *scales[2];
};

__device__ __forceinline__ void load_keys(StoredKeys& k, const Places& places, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            load_words<K_WORDS>(k.codes[i][row], places.codes[i] + (g * (D / 2) + t * (D / 8)) + row * (4 * D));
            const u8* scales = places.scales[i] + g * (D / 16) + (K_SCALES + row * (D / 2));
            if (D % 64 == 0)
                load_words<SCALE_WORDS>(k.scales[i][row], scales);
            else
                load_halves<D / 32>(k.scales[i][row], scales);
        }
    }
}

__device__ __forceinline__ void load_values(StoredValues& v, const Places& places, int lane) {
    const int g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u8* codes = places.codes[i] + V_CODES;
#pragma unroll
        for (int first = 0; first < GROUPS; first += 4) {
            constexpr int LAST = GROUPS % 4 ? GROUPS % 4 : 4;
            if (first + 4 <= GROUPS)
                load_words<4>(v.codes[i] + first, codes + lane * 16 + first * 128);
            else
                load_words<LAST>(v.codes[i] + first, codes + lane * (4 * LAST) + first * 128);
        }
        load_words<V_SCALE_WORDS>(v.scales[i], places.scales[i] + g * (2 * GROUPS) + V_SCALES);
    }
}

// New maximum of a query's scores, all lanes of it; what was summed up before is scaled to it.
template <int COUNT>
__device__ __forceinline__ void softmax(State& state, int tile, float (&s)[COUNT]) {
    float most = s[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) most = fmaxf(most, s[i]);
    const float before = state.maximum[tile], now = fmaxf(before, max_across<4, 32>(most)), base = base_of(now);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        s[i] = exp2_approx(s[i] - base);
        sum += s[i];
    }
    const float factor = exp2_approx(before - base);
    state.total[tile] = fmaf(state.total[tile], factor, sum);
    if (__any_sync(~0u, now != before)) {
        state.maximum[tile] = now;
#pragma unroll
        for (int m = 0; m < GROUPS; m++) {
            state.output[tile][m][0] *= factor;
            state.output[tile][m][1] *= factor;
        }
    }
}

// --- stored tokens ---------------------------------------------------------------------------------

// A query's values as operands. Lane (g, t) has those of query g / 2 in the blocks of parity g % 2, channels 4 t to
// 4 t + 3 of each, and zeros for the blocks of the other parity.
struct Query {
    u32 operand[TILES][2][K_WORDS][2];
    float scale[TILES];  // of query t: what its scores still have to be multiplied by
};

__device__ __forceinline__ void load_query(Query& query, const Arguments& a, const u16* q, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int index = 4 * tile + g / 2;
        float x[K_WORDS][4], amax = 0.0f;
#pragma unroll
        for (int j = 0; j < K_WORDS; j++) {
            uint2 pair = make_uint2(0, 0);
            if (index < QUERIES)
                pair = *reinterpret_cast<const uint2*>(q + index * a.q_head_stride + 32 * j + 16 * (g % 2) + 4 * t);
            const float2 one = widened_pair(pair.x), two = widened_pair(pair.y);
            x[j][0] = one.x, x[j][1] = one.y, x[j][2] = two.x, x[j][3] = two.y;
#pragma unroll
            for (int i = 0; i < 4; i++) amax = fmaxf(amax, fabsf(x[j][i]));
        }
        const UpperRange range(max_across<1, 8>(amax));
#pragma unroll
        for (int j = 0; j < K_WORDS; j++) {
            const u32 even = as_halves(x[j][0] * range.up, x[j][2] * range.up);
            const u32 odd = as_halves(x[j][1] * range.up, x[j][3] * range.up);
#pragma unroll
            for (int parity = 0; parity < 2; parity++) {
                query.operand[tile][parity][j][0] = g % 2 == parity ? even : 0u;
                query.operand[tile][parity][j][1] = g % 2 == parity ? odd : 0u;
            }
        }
        query.scale[tile] = __shfl_sync(~0u, range.back, 8 * t);  // lanes with g / 2 == t have query t
    }
}

// A fragment of 16 rows: `first` has codes of row g, `second` of row g + 8, in the nibbles at BIT and BIT + 8.
template <int BIT>
__device__ __forceinline__ void fragment_of_rows(u32 (&fragment)[4], u32 first, u32 second, const Opaque& opaque) {
    fragment[0] = halves_of_e2m1<BIT>(first, opaque);
    fragment[1] = halves_of_e2m1<BIT>(second, opaque);
    fragment[2] = halves_of_e2m1<BIT + 8>(first, opaque);
    fragment[3] = halves_of_e2m1<BIT + 8>(second, opaque);
}

// The same of channels: a word has channel g in its low nibbles and channel g + 8 in its high ones.
__device__ __forceinline__ void fragment_of_columns(u32 (&fragment)[4], u32 codes, const Opaque& opaque) {
    fragment[0] = halves_of_e2m1<0>(codes, opaque);
    fragment[1] = halves_of_e2m1<4>(codes, opaque);
    fragment[2] = halves_of_e2m1<8>(codes, opaque);
    fragment[3] = halves_of_e2m1<12>(codes, opaque);
}

// Scores of a unit, softmax scale apart: lane (g, t) has tokens g, g + 8, g + 16, g + 24 and query t. nan: marks
// of each token's scales.
__device__ __forceinline__ void stored_scores(
    float (&s)[TILES][4], u32 (&nan)[4], const StoredKeys& k, const Query& query, const Opaque& opaque) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum[TILES][2] = {};
#pragma unroll
        for (int j = 0; j < K_WORDS; j++) {
            u32 first[4], other[4];
            fragment_of_rows<0>(first, k.codes[i][0][j], k.codes[i][1][j], opaque);
            fragment_of_rows<4>(other, k.codes[i][0][j], k.codes[i][1][j], opaque);
            float scale[2][2];
#pragma unroll
            for (int row = 0; row < 2; row++) {
#pragma unroll
                for (int b = 0; b < 2; b++) scale[row][b] = e4m3_bits(k.scales[i][row][j / 2], 2 * (j % 2) + b);
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const auto& operand = query.operand[tile];
                float c[4] = {};
                mma_f16(c, first, operand[0][j][0], operand[0][j][1]);
                mma_f16(c, other, operand[1][j][0], operand[1][j][1]);
                sum[tile][0] = fmaf(c[0], scale[0][0], fmaf(c[1], scale[0][1], sum[tile][0]));
                sum[tile][1] = fmaf(c[2], scale[1][0], fmaf(c[3], scale[1][1], sum[tile][1]));
            }
        }
#pragma unroll
        for (int row = 0; row < 2; row++) {
#pragma unroll
            for (int w = 0; w < SCALE_WORDS; w++) nan[2 * i + row] |= nan_marks(k.scales[i][row][w]);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) s[tile][2 * i + row] = sum[tile][row] * E4M3_BITS_UNIT;
        }
    }
}

__device__ __forceinline__ void add_stored(
    State& state, u32& nan, const StoredValues& v, const float (&p)[TILES][4], int lane,
    const Opaque& opaque) {
    const int g = lane / 4, t = lane % 4;
    u32 operand[TILES][2][2];
    // Tokens 4 t + i of tile g % 2 and query g / 2, from the lanes that have their scores, tokens n and n + 8 together.
    const int source = 16 * (t % 2) + g / 2;
    const u32 pick = t / 2 ? 0x7632 : 0x5410;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        u32 from[4];
        const u32 mine[2] = {
            as_halves(p[tile][0] * P_UNIT, p[tile][1] * P_UNIT), as_halves(p[tile][2] * P_UNIT, p[tile][3] * P_UNIT)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 one = __shfl_sync(~0u, mine[0], source + 4 * i), two = __shfl_sync(~0u, mine[1], source + 4 * i);
            from[i] = g % 2 ? two : one;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 pair = __byte_perm(from[i], from[i + 2], pick);
            operand[tile][0][i] = g % 2 ? 0u : pair;
            operand[tile][1][i] = g % 2 ? pair : 0u;
        }
    }
#pragma unroll
    for (int m = 0; m < GROUPS; m++) {
        u32 first[4], other[4];
        fragment_of_columns(first, v.codes[0][m], opaque);
        fragment_of_columns(other, v.codes[1][m], opaque);
        float scale[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int b = 0; b < 2; b++) scale[i][b] = e4m3_bits(v.scales[i][m / 2], 2 * (m % 2) + b);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float c[4] = {};
            mma_f16(c, first, operand[tile][0][0], operand[tile][0][1]);
            mma_f16(c, other, operand[tile][1][0], operand[tile][1][1]);
            float(&out)[2] = state.output[tile][m];
            out[0] = fmaf(c[0], scale[0][0], fmaf(c[1], scale[1][0], out[0]));
            out[1] = fmaf(c[2], scale[0][1], fmaf(c[3], scale[1][1], out[1]));
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int w = 0; w < V_SCALE_WORDS; w++) nan |= nan_marks(v.scales[i][w]);
    }
}

// The packed units of a warp, in turns from `unit` to `last`, counted from the request's first token.
struct StoredUnits {
    StoredKeys keys;
    StoredValues values;
    Places places;
    int unit, last;

    // unit, last: of those of the request that are packed.
    __device__ __forceinline__ StoredUnits(const Ranges& r, int unit, int last)
        : unit(r.stored_low / 32 + unit), last(r.stored_low / 32 + last) {}

    __device__ __forceinline__ void place(const Arguments& a, const Part& part, int unit) {
        // Tiles outside the stored ones are masked; so they are read where they share a page with the one beside,
        // and else stored ones in their place.
        const int least = part.ranges.stored_low / 16, most = (part.ranges.stored_high - 1) / 16;
        const int* table = part.table(a);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (i && PAGE % 32 == 0) {
                places.codes[1] = places.codes[0] + 8 * D, places.scales[1] = places.scales[0] + D;
                break;
            }
            const int own = 2 * unit + i, tile = PAGE % 32 ? min(max(own, least), most) : own;
            const u32 inside = static_cast<u32>(tile) * 16 % PAGE;
            const u8* page = tile_address(a, table, part.head, tile);
            places.codes[i] = page + inside * (D / 2), places.scales[i] = page + inside * (D / 16);
        }
    }

    __device__ __forceinline__ void begin(const Arguments& a, const Part& part, int lane) {
        if (unit >= last) return;
        place(a, part, unit);
        load_keys(keys, places, lane);
    }

    __device__ __forceinline__ void attend(State& state, u32& nan, const Arguments& a, const Part& part, int lane) {
        if (unit >= last) return;
        const int g = lane / 4;
        Query query;
        load_query(query, a, part.queries, lane);
        load_values(values, places, lane);
#pragma unroll 1
        for (; unit < last; unit += WARPS) {
            const bool more = unit + WARPS < last;
            if (more) place(a, part, unit + WARPS);
            float s[TILES][4];
            u32 row_nan[4] = {};
            stored_scores(s, row_nan, keys, query, a.opaque);
            if (more) load_keys(keys, places, lane);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
#pragma unroll
                for (int n = 0; n < 4; n++) s[i][n] = capped(s[i][n] * query.scale[i], a.score_scale, a.cap);
            }
            const int low = part.ranges.stored_low, high = part.ranges.stored_high, token = unit * 32;
            if (token < low || token + 32 > high) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const int at = token + 8 * n + g;
                    if (at < low || at >= high) {
                        row_nan[n] = 0;
#pragma unroll
                        for (int i = 0; i < TILES; i++) s[i][n] = -INFINITY;
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (token + 16 * i + 16 <= low || token + 16 * i >= high) {  // no NaN from what was never stored
#pragma unroll
                        for (int w = 0; w < V_SCALE_WORDS; w++) values.scales[i][w] = 0;
                    }
                }
            }
            nan |= row_nan[0] | row_nan[1] | row_nan[2] | row_nan[3];
#pragma unroll
            for (int i = 0; i < TILES; i++) softmax(state, i, s[i]);
            add_stored(state, nan, values, s, lane, a.opaque);
            if (more) load_values(values, places, lane);
        }
    }
};

// --- tokens in 16 bits -----------------------------------------------------------------------------

__device__ __forceinline__ void whole_unit(
    State& state, const Arguments& a, const Part& part, const WholeUnit& unit, u8* shared, int lane) {
    const int g = lane / 4, t = lane % 4;
    const int tile = unit.tile, low = unit.low, high = unit.high;
    const int* table = part.full_table(a);
    // A page of 16 tokens, or of several times 16, has all of a tile.
    const u16* page = FULL_PAGE % 16 ? nullptr : whole_token(a, table, part.head, tile * 16, 0, tile * 16 + 1);
    const auto row = [&](int token) {
        if (FULL_PAGE % 16) return whole_token(a, table, part.head, tile * 16 + token, low, high);
        return page + (min(max(tile * 16 + token, low), high - 1) - tile * 16) * (2 * D);
    };
    // All loads first, since each way to memory is long. Values go to shared memory, to be read transposed.
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int chunk = i * 32 + lane, token = chunk / (D / 8), part = chunk % (D / 8);
        copy_16(shared + token * PITCH + part * 16, row(token) + D + part * 8);
    }
    uint4 keys[D / 32][2];
    const u16* rows[2] = {row(g), row(g + 8)};
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++) keys[j][i] = load_whole(rows[i] + 32 * j + 8 * t);
    }
    __syncwarp();  // else copies are issued behind what waits for keys
    float c[TILES][4] = {};
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
        const uint4 x = keys[j][0], y = keys[j][1];
        const u32 one[4] = {x.x, y.x, x.y, y.y}, two[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int index = 4 * i + g / 2;
            uint4 z = make_uint4(0, 0, 0, 0);
            if (g % 2 == 0 && index < QUERIES) z = load_whole(part.queries + index * a.q_head_stride + 32 * j + 8 * t);
            mma_16(c[i], one, z.x, z.y);
            mma_16(c[i], two, z.z, z.w);
        }
    }
    wait_for_copies();
    __syncwarp();
    u32 operand[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        float s[2] = {capped(c[i][0], a.score_scale, a.cap), capped(c[i][2], a.score_scale, a.cap)};
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int token = tile * 16 + g + 8 * n;
            if (token < low || token >= high) s[n] = -INFINITY;
        }
        softmax(state, i, s);
        // P of query g / 2, its high part where g is even and what is left where it is odd.
        u32 low_part;
        const u32 high_part = split(s[0], s[1], low_part);
        u32 from[2];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int source = (2 * t + n) * 4 + g / 2;
            const u32 high_from = __shfl_sync(~0u, high_part, source);
            const u32 low_from = __shfl_sync(~0u, low_part, source);
            from[n] = g % 2 ? low_from : high_from;
        }
        operand[i][0] = __byte_perm(from[0], from[1], 0x5410);
        operand[i][1] = __byte_perm(from[0], from[1], 0x7632);
    }
    const u32 address = transposed_address<PITCH>(shared, lane);
#pragma unroll
    for (int m = 0; m < GROUPS; m++) {
        u32 fragment[4];
        load_transposed(fragment, address + m * 32);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            float sum[4] = {};
            mma_16(sum, fragment, operand[i][0], operand[i][1]);
            state.output[i][m][0] = fmaf(sum[0] + sum[1], a.full_unit, state.output[i][m][0]);
            state.output[i][m][1] = fmaf(sum[2] + sum[3], a.full_unit, state.output[i][m][1]);
        }
    }
    __syncwarp();
}

// --- a block's share -------------------------------------------------------------------------------

struct Narrow {
    static constexpr int FINDERS = WARPS, FOUND = D + 8;  // lanes of a store go to different banks
    static constexpr int WARP_BYTES = 16 * PITCH;
    static constexpr bool RAGGED = false;
    static_assert(QUERIES * FOUND * 4 <= WARP_BYTES);

    static __device__ __forceinline__ void attend(
        const Part& part, const Arguments& a, u8* shared, int lane, int warp) {
        u8* mine = shared + warp * WARP_BYTES;
        State state;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            state.maximum[i] = -INFINITY;
            state.total[i] = 0.0f;
#pragma unroll
            for (int m = 0; m < GROUPS; m++) state.output[i][m][0] = state.output[i][m][1] = 0.0f;
        }
        start();
        // What the first units need is under way before anything is waited for.
        const int whole = part.whole_units(), whole_end = min(part.last, whole);
        int unit = part.first + warp;
        StoredUnits stored(
            part.ranges, unit + (max(whole - unit, 0) + WARPS - 1) / WARPS * WARPS - whole, part.last - whole);
        stored.begin(a, part, lane);
#pragma unroll 1
        for (; unit < whole_end; unit += WARPS)
            whole_unit(state, a, part, WholeUnit(part.ranges, unit), mine, lane);
        u32 nan = 0;
        stored.attend(state, nan, a, part, lane);

        const bool broken = any_nan(nan);
        float* found = reinterpret_cast<float*>(mine);
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            float total = sum_across<4, 32>(state.total[i]);
            if (broken) total = NAN;
            const int index = 4 * i + t;
            if (index < QUERIES) {
#pragma unroll
                for (int m = 0; m < GROUPS; m++) {
                    found[index * FOUND + 16 * m + g] = state.output[i][m][0];
                    found[index * FOUND + 16 * m + 8 + g] = state.output[i][m][1];
                }
                if (g == 0) {
                    found[index * FOUND + D] = state.maximum[i];
                    found[index * FOUND + D + 1] = total;
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) paged_decode(DECODE_PARAMETERS) {
    const Arguments a = DECODE_ARGUMENTS;
    decode_work<Narrow>(a);
}
