// Weights in 4 and 8 bits, as rounding.py says it, which is torch's form of the same: there each of its passes goes through
// memory, and starts all threads anew.
#pragma once
#include "cpu_vectors.h"

namespace {

constexpr int64_t MOST_GROUP = 256;

inline float stored(float number) { return (float)BFloat16(number); }

// A group of `count` weights, a multiple of V.
struct Group {
    const float* w;
    float mean, scale, zero, least, best_scale, best_zero;
    float centred[MOST_GROUP], n[MOST_GROUP];

    void begin(const float* weights, int64_t count) {
        w = weights;
        float lows[V], highs[V];
        Floats sum = repeat(0.0f);
        std::copy(w, w + V, lows), std::copy(w, w + V, highs);
        for (int64_t i = 0; i < count; i += V) {
            for (int64_t j = 0; j < V; j++) lows[j] = std::min(lows[j], w[i + j]), highs[j] = std::max(highs[j], w[i + j]);
            sum = fma(load_floats(w + i), repeat(1.0f), sum);
        }
        float low = *std::min_element(lows, lows + V), high = *std::max_element(highs, highs + V);
        mean = total(sum) / (float)count;
        for (int64_t i = 0; i < count; i++) centred[i] = w[i] - mean;
        take((high - low) / 15);
        best_scale = scale, best_zero = zero = stored(low + 8 * scale), least = INFINITY;
    }

    void take(float wanted) { scale = stored(std::max(wanted, 0x1p-100f)); }

    void round(int64_t count) {
        float times = 1 / scale, plus = -zero / scale;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) n[i] = std::min(std::max(std::nearbyintf(std::fmaf(w[i], times, plus)), -8.0f), 7.0f);
    }

    // Keep scale and zero if they are the best so far, and fit both to the rounded numbers by least squares.
    void refine(int64_t count) {
        Floats errors = repeat(0.0f), sum = errors, squares = errors, slopes = errors;
        for (int64_t i = 0; i < count; i += V) {
            Floats x = load_floats(n + i), off = fma(x, repeat(-scale), fma(load_floats(w + i), repeat(1.0f), repeat(-zero)));
            errors = fma(off, off, errors), sum = fma(x, repeat(1.0f), sum);
            squares = fma(x, x, squares), slopes = fma(x, load_floats(centred + i), slopes);
        }
        float error = total(errors), size = (float)count, middle = total(sum) / size;
        float spread = total(squares) - size * middle * middle;
        if (error < least) least = error, best_scale = scale, best_zero = zero;
        take(spread > 0.5f ? total(slopes) / spread : scale);
        zero = stored(mean - scale * middle);
    }

    void end(int64_t count, uint8_t* pairs, BFloat16* scale_out, BFloat16* zero_out) {
        scale = best_scale, zero = best_zero;
        if (!std::isfinite(mean)) scale = zero = NAN;  // infinity and NaN go into all numbers of the group
        *scale_out = BFloat16(scale), *zero_out = BFloat16(zero);
        round(count);
        for (int64_t i = 0; i < count; i += 2) pairs[i / 2] = (uint8_t)(((int32_t)n[i] + 8) << 4 | ((int32_t)n[i + 1] + 8));
    }
};

constexpr int64_t TOGETHER = 4;  // groups that take turns: each waits long for its own sums

// w (groups, count) -> numbers 0 ... 15, two in a byte, scales and zeros (groups,)
template <typename T>
void round_to_int4(const T* w, int64_t groups, int64_t count, int64_t refinements, uint8_t* pairs, BFloat16* scales, BFloat16* zeros) {
    float floats[TOGETHER][MOST_GROUP];
    Group all[TOGETHER];
    for (int64_t first = 0; first < groups; first += TOGETHER) {
        int64_t some = std::min(TOGETHER, groups - first);
        for (int64_t g = 0; g < some; g++) {
            for (int64_t i = 0; i < count; i++) floats[g][i] = (float)w[(first + g) * count + i];
            all[g].begin(floats[g], count);
        }
        for (int64_t step = 0; step <= refinements; step++) {
            for (int64_t g = 0; g < some; g++) all[g].round(count);
            for (int64_t g = 0; g < some; g++) all[g].refine(count);
        }
        for (int64_t g = 0; g < some; g++) all[g].end(count, pairs + (first + g) * count / 2, scales + first + g, zeros + first + g);
    }
}

template <typename T>
void round_to_int8(const T* w, int64_t count, float scale, int8_t* numbers) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        numbers[i] = (int8_t)(int32_t)std::min(std::max(std::nearbyintf((float)w[i] / scale), -127.0f), 127.0f);
}

}  // namespace
