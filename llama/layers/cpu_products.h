// The product of a tile of weights in 8 or 4 bits with activations in 8 bits, and how activations are rounded. The plain form
// of each is in one_digit.py, which has the formulas, and gives the same bits.
//
// Weights lie in tiles of R rows, and in the order in which a product reads them. A tile has its groups of columns one after
// the other, and a group has
//     8 bits:  group / 4 times R x 4 bytes, the weights of four columns plus 128
//     4 bits:  group / 8 times R x 4 bytes, four columns in the lower halves and the next four in the upper ones
//     R scales in bfloat16;  4 bits: R zeros in bfloat16
#pragma once
#include "cpu_vectors.h"

namespace {

constexpr int64_t R = 32;              // rows of a tile
constexpr int64_t SHARE = 256 * 1024;  // products of bytes that are worth a thread
using Line = float[R];                 // the results of a tile with one row of activations

inline int64_t tiles_of(int64_t rows) { return (rows + R - 1) / R; }

inline int64_t tile_bytes(int64_t columns, int64_t groups, int64_t bits) {
    return R * (columns * bits / 8 + groups * (bits == 4 ? 4 : 2));
}

constexpr int W = R / V;  // vectors that hold a number for each row of a tile

struct Product {
    const int8_t* x;      // (rows of activations, columns)
    const float* unit;    // (rows of activations, groups)
    const int32_t* sums;  // the same, of x
    int64_t columns, group, groups;
    const uint8_t* weight;  // tiles
    int64_t tile_bytes;
};

inline int32_t four(const int8_t* x) {
    int32_t n;
    std::memcpy(&n, x, 4);
    return n;
}

// One tile times `rows` rows of activations from `first` on.
template <bool HALVES, int rows>
void multiply(const Product& p, int64_t tile, int64_t first, Line* lines) {
    const uint8_t* w = p.weight + tile * p.tile_bytes;
    const int8_t* x = p.x + first * p.columns;
    const float* unit = p.unit + first * p.groups;
    const int32_t* sums = p.sums + first * p.groups;
    Floats total[rows][W];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) total[m][v] = repeat(0.0f);
    for (int64_t g = 0; g < p.groups; g++) {
        Ints sum[rows][W];
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) sum[m][v] = repeat(-(HALVES ? 8 : OFFSET) * sums[m * p.groups + g]);
        for (int64_t c = 0; c < p.group; c += HALVES ? 8 : 4) {
            const int8_t* at = x + g * p.group + c;
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) {
                Ints some = load(w + 4 * V * v);
                if (rows == 1) prefetch(w + 4 * V * v + AHEAD);
#pragma GCC unroll 8
                for (int m = 0; m < rows; m++) {
                    if (HALVES) {
                        sum[m][v] = dot_halves(sum[m][v], lower(some), repeat(four(at + m * p.columns)));
                        sum[m][v] = dot_halves(sum[m][v], upper(some), repeat(four(at + m * p.columns + 4)));
                    } else {
                        sum[m][v] = dot(sum[m][v], some, repeat(four(at + m * p.columns)));
                    }
                }
            }
            w += 4 * R;
        }
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) {
            Floats scale = from_bfloat16(w + 2 * V * v);
            if (rows == 1) prefetch(w + (HALVES ? 4 : 2) * V * v + AHEAD);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) {
                float one = unit[m * p.groups + g];
                total[m][v] = fma(from_ints(sum[m][v]), times(scale, repeat(one)), total[m][v]);
                if (HALVES)
                    total[m][v] = fma(repeat((float)sums[m * p.groups + g] * one), from_bfloat16(w + 2 * R + 2 * V * v), total[m][v]);
            }
        }
        w += (HALVES ? 4 : 2) * R;
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < W; v++) store(lines[m] + V * v, total[m][v]);
}

// The same for up to M rows.
template <bool HALVES, int rows = M>
void multiply_tile(const Product& p, int64_t tile, int64_t first, int64_t count, Line* lines) {
    if (count == rows) multiply<HALVES, rows>(p, tile, first, lines);
    else if constexpr (rows > 1) multiply_tile<HALVES, rows - 1>(p, tile, first, count, lines);
}

// The largest size of a number, at least 1e-30; infinity and NaN stay.
template <typename T>
float largest_of(const T* x, int64_t count) {
    uint32_t top = as_bits(1e-30f);  // bits of sizes are in the sizes' order, and those of NaN are above all
    for (int64_t i = 0; i < count; i++) top = std::max(top, as_bits((float)x[i]) & 0x7fffffff);
    return as_float(top);
}

template <typename T>
void round_group(const T* x, int64_t columns, int8_t* numbers, float* unit) {
    float largest = largest_of(x, columns);
    *unit = largest * (float)(1.0 / 127);
    if (!std::isfinite(largest)) {  // infinity and NaN go from here into the result
        std::memset(numbers, 0, columns);
        return;
    }
    float steps = 1 / largest * 127;  // as torch divides a number by a tensor
    for (int64_t i = 0; i < columns; i++) numbers[i] = (int8_t)(int32_t)std::nearbyintf((float)x[i] * steps);
}

}  // namespace
