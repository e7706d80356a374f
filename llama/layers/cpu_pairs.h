// Products of many rows in bfloat16 with a tile of weights: these become bfloat16 once for all rows, in pairs of neighbouring
// columns, as processors multiply them.
#pragma once
#include "cpu_tiles.h"

namespace {

constexpr int SHARED = V == 16 ? 12 : 2;  // rows that share a loaded weight: their sums fill the registers

// A tile -> (columns / 2, R) pairs
template <bool HALVES>
void unpack_pairs(const Tiles& tiles, int64_t tile, int64_t columns, int64_t group, const float* scales, uint32_t* to) {
    for_columns<HALVES>(tiles, tile, columns, group, scales, [&](int64_t c, const auto& number) {
        if (c % 2 == 0)
#pragma omp simd
            for (int64_t i = 0; i < R; i++) to[c / 2 * R + i] = number(i, 0) | (uint32_t)number(i, 1) << 16;
    });
}

// `count` rows of x -> (columns / 2, SHARED) pairs, so that a product reads them in order
inline void pair_rows(const BFloat16* x, int64_t count, int64_t columns, uint32_t* to) {
    constexpr int64_t LINE = 32;  // columns that lie in one line of a cache
    for (int64_t first = 0; first < columns; first += LINE)
        for (int64_t m = 0; m < count; m++)
            for (int64_t c = first; c < std::min(columns, first + LINE); c += 2) std::memcpy(to + c / 2 * SHARED + m, x + m * columns + c, 4);
}

// `rows` rows times a tile, both in pairs
template <int rows>
void multiply_pairs(const uint32_t* x, const uint32_t* w, int64_t pairs, Line* lines) {
    Floats total[rows][W];
#pragma GCC unroll 16
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) total[m][v] = repeat(0.0f);
    for (int64_t c = 0; c < pairs; c++, x += SHARED, w += R) {
        Ints some[W];
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) some[v] = load((const uint8_t*)(w + v * V));
        prefetch((const uint8_t*)x + AHEAD);
#pragma GCC unroll 16
        for (int m = 0; m < rows; m++) {
            Ints pair = repeat((int32_t)x[m]);
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) total[m][v] = add_pairs(total[m][v], some[v], pair);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < W; v++) store(lines[m] + V * v, total[m][v]);
}

// The same for `count` rows.
template <int rows>
void multiply_some_pairs(const uint32_t* x, const uint32_t* w, int64_t pairs, int64_t count, Line* lines) {
    if (count == rows) multiply_pairs<rows>(x, w, pairs, lines);
    else if constexpr (rows > 1) multiply_some_pairs<rows - 1>(x, w, pairs, count, lines);
}

}  // namespace
