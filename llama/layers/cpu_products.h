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

constexpr int W = R / V;  // vectors that hold a number for each row of a tile

// Rows of activations in whole numbers, and what their products with a matrix begin with. A row has `digits` rows of numbers:
// one, rounded group by group (w8a8, w4a8), or several, the highest first, which keep it exact (int8, int4).
struct Rows {
    const int8_t* numbers;  // (rows, digits, columns)
    const float* unit;      // one digit: (rows, groups); several: (rows,)
    const int32_t* starts;  // (rows, digits, groups): what makes good that `dot` takes weights without a sign
    const float* sums;      // (rows, groups): of the numbers of a group, in units where groups have some; only for 4 bits
    int64_t columns, group, groups;
    int digits;
};

// A matrix in tiles.
struct Tiles {
    const uint8_t* data;
    int64_t outputs, bytes;  // rows of the matrix; bytes of a tile
    bool halves;             // 4 bits

    Tiles(const uint8_t* data, int64_t outputs, int64_t columns, int64_t groups, bool halves)
        : data(data), outputs(outputs), bytes(R * (columns / (halves ? 2 : 1) + groups * (halves ? 4 : 2))), halves(halves) {}
    int64_t height(int64_t tile) const { return std::min(R, outputs - tile * R); }
};

constexpr float BASE = 254;  // of the digits

inline int32_t four(const int8_t* x) {
    int32_t n;
    std::memcpy(&n, x, 4);
    return n;
}

// One tile times `rows` rows of activations from `first` on.
template <bool HALVES, int D, int rows>
void multiply(const Rows& all, const uint8_t* w, int64_t first, Line* lines) {
    const int8_t* x = all.numbers + first * D * all.columns;
    const int32_t* starts = all.starts + first * D * all.groups;
    const float *unit = all.unit + first * (D == 1 ? all.groups : 1), *sums = all.sums + first * all.groups;
    Floats total[rows][W];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) total[m][v] = repeat(0.0f);
    for (int64_t g = 0; g < all.groups; g++) {
        Ints sum[rows * D][W];
#pragma GCC unroll 8
        for (int m = 0; m < rows * D; m++)
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) sum[m][v] = repeat(starts[m * all.groups + g]);
        for (int64_t c = 0; c < all.group; c += HALVES ? 8 : 4) {
            const int8_t* at = x + g * all.group + c;
            Ints some[W];
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) {
                some[v] = load(w + 4 * V * v);
                if (first == 0) prefetch(w + 4 * V * v + AHEAD);
            }
#pragma GCC unroll 8
            for (int m = 0; m < rows * D; m++) {
                Ints numbers = repeat(four(at + m * all.columns));
#pragma GCC unroll 4
                for (int v = 0; v < W; v++) sum[m][v] = HALVES ? dot_halves(sum[m][v], lower(some[v]), numbers) : dot(sum[m][v], some[v], numbers);
                if (!HALVES) continue;
                numbers = repeat(four(at + m * all.columns + 4));
#pragma GCC unroll 4
                for (int v = 0; v < W; v++) sum[m][v] = dot_halves(sum[m][v], upper(some[v]), numbers);
            }
            w += 4 * R;
        }
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) {
            Floats scale = from_bfloat16(w + 2 * V * v);
            if (first == 0) prefetch(w + (HALVES ? 4 : 2) * V * v + AHEAD);
#pragma GCC unroll 8
            for (int m = 0; m < rows; m++) {
                Floats number = from_ints(sum[m * D][v]);
#pragma GCC unroll 4
                for (int d = 1; d < D; d++) number = fma(number, repeat(BASE), from_ints(sum[m * D + d][v]));
                total[m][v] = fma(number, D == 1 ? times(scale, repeat(unit[m * all.groups + g])) : scale, total[m][v]);
                if (HALVES) total[m][v] = fma(repeat(sums[m * all.groups + g]), from_bfloat16(w + 2 * R + 2 * V * v), total[m][v]);
            }
        }
        w += (HALVES ? 4 : 2) * R;
    }
#pragma GCC unroll 8  // these loops too: else the totals would lie in memory, and not in registers
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < W; v++) store(lines[m] + V * v, D == 1 ? total[m][v] : times(total[m][v], repeat(unit[m])));
}

// The same for up to `rows` rows.
template <bool HALVES, int D, int rows>
void multiply_some(const Rows& all, const uint8_t* w, int64_t first, int64_t count, Line* lines) {
    if (count == rows) multiply<HALVES, D, rows>(all, w, first, lines);
    else if constexpr (rows > 1) multiply_some<HALVES, D, rows - 1>(all, w, first, count, lines);
}

// The same for `count` rows.
template <int D>
void multiply_tile(const Rows& all, const Tiles& tiles, int64_t tile, int64_t first, int64_t count, Line* lines) {
    constexpr int most = M < D ? 1 : M / D;
    const uint8_t* w = tiles.data + tile * tiles.bytes;
    for (; count > 0; first += most, count -= most, lines += most) {
        int64_t some = std::min<int64_t>(most, count);
        tiles.halves ? multiply_some<true, D, most>(all, w, first, some, lines) : multiply_some<false, D, most>(all, w, first, some, lines);
    }
}

// The largest size of a number, at least `least`; infinity and NaN stay.
template <typename T>
float largest_of(const T* x, int64_t count, float least = 1e-30f) {
    uint32_t top = as_bits(least);  // bits of sizes are in the sizes' order, and those of NaN are above all
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

inline void scale_rows(const float* scales, int64_t height, int64_t count, Line* lines) {
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < height; i++) lines[m][i] *= scales[i];
}

template <typename T>
constexpr int digits_of = sizeof(T) == 4 ? 3 : 2;  // that keep it exact

// A row becomes `count` rows of digits, as `in_digits` of int8.py makes them, times `unit`.
template <int count, typename T>
void to_digits(const T* x, int64_t columns, int8_t* digits, float* unit) {
    float largest = largest_of(x, columns);
    *unit = largest * (float)(count == 3 ? 1.0 / (127 * 254 * 254) : 1.0 / (127 * 254));
    float steps = 1 / largest * 127;
    for (int64_t i = 0; i < columns; i++) {
        float rest = (float)x[i] * steps;
        for (int d = 0; d < count; d++) {
            float digit = std::nearbyintf(rest);
            digits[d * columns + i] = (int8_t)(int32_t)digit;
            rest = (rest - digit) * BASE;
        }
    }
}

// `starts` and `sums` of a row whose numbers and units are there.
inline void begin(const Rows& all, int64_t row, bool halves, int32_t* starts, float* sums) {
    starts += row * all.digits * all.groups, sums += row * all.groups;
    for (int64_t g = 0; g < all.groups; g++) {
        float joined = 0;
        for (int d = 0; d < all.digits; d++) {
            const int8_t* numbers = all.numbers + (row * all.digits + d) * all.columns + g * all.group;
            int32_t sum = 0;
            for (int64_t i = 0; i < all.group; i++) sum += numbers[i];
            starts[d * all.groups + g] = -(halves ? 8 : OFFSET) * sum;
            joined = joined * BASE + (float)sum;
        }
        sums[g] = all.digits == 1 ? joined * all.unit[row * all.groups + g] : joined;
    }
}

}  // namespace
