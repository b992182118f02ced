// Units of paged_decode_wide.cu in shared memory. Packed ones: codes of keys of both tiles, codes
// of values; scales likewise. In 16 bits: a row for each token, of its key and value.
#pragma once

#include "decode_work.cuh"

constexpr int TILE_CODES = 8 * D;    // bytes of codes of 16 tokens' keys, or of their values
constexpr int UNIT_SCALES = 32 * D;  // where scales begin
constexpr int UNIT_BYTES = 36 * D;
constexpr int WHOLE_PITCH = 4 * D + 16;  // bytes of a token's key and value in 16 bits

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

// A unit in 16 bits: of each token 8 lanes have 128 bytes at a time.
struct WholeRows {
    const u8* from[4];

    WholeRows() = default;
    __device__ __forceinline__ WholeRows(
        const Arguments& a, const int* table, int head, const WholeUnit& unit, int lane) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            from[i] = reinterpret_cast<const u8*>(
                whole_token(a, table, head, unit.tile * 16 + 4 * i + lane / 8, unit.low, unit.high)) + lane % 8 * 16;
    }
    // Begin to copy it.
    __device__ __forceinline__ void copy(u8* to, int lane) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int n = 0; n < D / 32; n++)
                copy_16(to + (4 * i + lane / 8) * WHOLE_PITCH + n * 128 + lane % 8 * 16, from[i] + n * 128);
        }
    }
};
