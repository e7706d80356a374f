// How weights get into the tiles of `cpu_products.h`, and out of them.
#pragma once
#include "cpu_products.h"

namespace {

// Eight numbers of 4 bits, as `pairs` of rounding.py stores them -> four in the lower halves of the bytes, the next in the upper ones.
inline uint32_t halves_apart(uint32_t stored) {
    uint32_t left = stored >> 4 & 0x0f0f0f0f, right = stored & 0x0f0f0f0f;
    auto four = [](uint32_t l, uint32_t r) { return (l & 0xff) | (r & 0xff) << 8 | (l & 0xff00) << 8 | (r & 0xff00) << 16; };
    return four(left, right) | four(left >> 16, right >> 16) << 4;
}

// The stored rows of a tile, `height` of them, in groups of `words` numbers of 32 bits, and their scales and zeros -> the tile
template <bool HALVES>
void fill_tile(const uint8_t* rows, const BFloat16* const* of_groups, int64_t height, int64_t groups, int64_t words, uint8_t* to) {
    constexpr int64_t LINE = 8;
    const uint32_t empty = HALVES ? 0 : 0x80808080;
    for (int64_t g = 0; g < groups; g++) {
        for (int64_t first = 0; first < words; first += LINE) {
            int64_t some = std::min(LINE, words - first);
            for (int64_t i = 0; i < R; i++) {
                uint32_t line[LINE] = {};
                if (i < height) std::memcpy(line, rows + ((i * groups + g) * words + first) * 4, some * 4);
                for (int64_t c = 0; c < some; c++) {
                    uint32_t word = HALVES ? halves_apart(line[c]) : line[c] ^ empty;
                    std::memcpy(to + ((first + c) * R + i) * 4, &word, 4);
                }
            }
        }
        to += words * R * 4;
        for (int which = 0; which < (HALVES ? 2 : 1); which++)
            for (int64_t i = 0; i < R; i++, to += 2) {
                BFloat16 number = i < height ? of_groups[which][i * groups + g] : BFloat16(0);
                std::memcpy(to, &number, 2);
            }
    }
}

// Calls `use` with each column of a tile, and with `number(i, later)`: row i's weight in that column as bfloat16, or, where `later` is
// 1, in the next column; only from an even one on.
template <bool HALVES, typename Use>
void for_columns(const Tiles& tiles, int64_t tile, int64_t columns, int64_t group, const float* scales, Use use) {
    const uint8_t* w = tiles.data + tile * tiles.bytes;
    float scale[R], zero[R] = {};
    for (int64_t first = 0; first < columns; first += group) {
        const uint8_t* numbers = w;
        w += group / (HALVES ? 2 : 1) * R;
        for (int64_t i = 0; i < R; i++) scale[i] = (float)((const BFloat16*)w)[i];
        if (scales) for (int64_t i = 0; i < tiles.height(tile); i++) scale[i] = scales[tile * R + i];
        if (HALVES) for (int64_t i = 0; i < R; i++) zero[i] = (float)((const BFloat16*)w)[R + i];
        w += (HALVES ? 4 : 2) * R;
        for (int64_t c = 0; c < group; c++) {
            // Four columns are the bytes of 32 bits, or with the next four the halves of these bytes.
            uint32_t fours[R];
            std::memcpy(fours, numbers + c / (HALVES ? 8 : 4) * 4 * R, sizeof fours);
            int64_t shift = c % 4 * 8 + (HALVES && c % 8 >= 4 ? 4 : 0);
            use(first + c, [&](int64_t i, int later) {
                auto n = (float)((int32_t)(fours[i] >> (shift + 8 * later) & (HALVES ? 15 : 255)) - (HALVES ? 8 : 128));
                return BFloat16(HALVES ? std::fmaf(n, scale[i], zero[i]) : n * scale[i]).bits;
            });
        }
    }
}

// A tile becomes columns of the transposed matrix, `stride` numbers apart.
template <bool HALVES>
void unpack(const Tiles& tiles, int64_t tile, int64_t columns, int64_t group, const float* scales, BFloat16* to, int64_t stride) {
    int64_t height = tiles.height(tile);
    for_columns<HALVES>(tiles, tile, columns, group, scales, [&](int64_t c, const auto& number) {
        alignas(64) BFloat16 line[R];
#pragma omp simd
        for (int64_t i = 0; i < R; i++) line[i].bits = number(i, 0);
        if (height == R && (uintptr_t)(to + c * stride) % sizeof line == 0) stream(line, to + c * stride);
        else std::memcpy(to + c * stride, line, height * sizeof *line);
    });
}

}  // namespace
