// Attention of a prompt's queries over all keys before them, in bfloat16: FlashAttention's blocks (Dao et al. 2022), products
// of pairs, and softmax in float32.
//
// Keys and values are put into pairs first, once for all queries: of keys, two neighbouring numbers of V keys side by side; of
// values, the numbers of two neighbouring keys. A block of queries then takes KEYS of them at a time.
#pragma once
#include <vector>

#include "cpu_vectors.h"

namespace {

constexpr int64_t KEYS = 256;   // of a block; a multiple of 2 V
constexpr int QUERIES = 6;      // of a block: as many as share what was loaded

struct Strides {
    int64_t row, position, head;  // in numbers; those of a head lie one after the other
};

// What is asked for of one row of the batch: queries (S, H, D) at the last S of T positions; keys, values (T, K, D).
struct Prompt {
    const BFloat16 *q, *k, *v;
    Strides of_q, of_k, of_v;
    int64_t queries, keys, heads, kv_heads, size;
    BFloat16* out;  // (S, H, D)

    int64_t blocks() const { return (queries + QUERIES - 1) / QUERIES; }
    int64_t padded() const { return (keys + KEYS - 1) / KEYS * KEYS; }
    int64_t room() const { return padded() * size; }  // numbers that a head's keys take in pairs, as do its values
};

inline uint32_t pair(const BFloat16& first, const BFloat16& second) { return first.bits | (uint32_t)second.bits << 16; }

// A head's keys in pairs: (padded / V, size / 2, V, 2); those behind the last are zeros.
inline void pair_keys(const Prompt& p, int64_t head, uint32_t* to) {
    std::fill(to, to + p.room() / 2, 0);
    for (int64_t t = 0; t < p.keys; t++) {
        const BFloat16* key = p.k + t * p.of_k.position + head * p.of_k.head;
        uint32_t* place = to + t / V * V * p.size / 2 + t % V;
        for (int64_t i = 0; i < p.size / 2; i++) place[i * V] = pair(key[2 * i], key[2 * i + 1]);
    }
}

// A head's values in pairs: (padded / 2, size, 2).
inline void pair_values(const Prompt& p, int64_t head, uint32_t* to) {
    const BFloat16 zero(0.0f);
    for (int64_t t = 0; t < p.padded(); t += 2, to += p.size) {
        const BFloat16* value = p.v + t * p.of_v.position + head * p.of_v.head;
        for (int64_t i = 0; i < p.size; i++)
            to[i] = pair(t < p.keys ? value[i] : zero, t + 1 < p.keys ? value[p.of_v.position + i] : zero);
    }
}

// Scores of the queries with 2 V keys -> (QUERIES, KEYS)
template <int rows>
void score(const uint32_t* const* q, const uint32_t* keys, int64_t pairs, float scale, float* scores) {
    Floats sum[rows][2];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = repeat(0.0f);
    for (int64_t i = 0; i < pairs; i++) {
        Ints first = load((const uint8_t*)(keys + i * V)), second = load((const uint8_t*)(keys + (pairs + i) * V));
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            Ints x = repeat((int32_t)q[m][i]);
            sum[m][0] = add_pairs(sum[m][0], first, x), sum[m][1] = add_pairs(sum[m][1], second, x);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < 2; v++) store(scores + m * KEYS + v * V, times(sum[m][v], repeat(scale)));
}

// out (QUERIES, size) += weights (QUERIES, KEYS) x values, for `vectors` V numbers of a head.
template <int rows, int vectors>
void weigh(const uint32_t* weights, const uint32_t* values, int64_t pairs, int64_t size, float* out) {
    Floats sum[rows][vectors];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[m][v] = load_floats(out + m * size + v * V);
    for (int64_t t = 0; t < pairs; t++, values += size) {
        Ints some[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) some[v] = load((const uint8_t*)(values + v * V));
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            Ints x = repeat((int32_t)weights[m * KEYS / 2 + t]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[m][v] = add_pairs(sum[m][v], some[v], x);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++) store(out + m * size + v * V, sum[m][v]);
}

// Up to `rows` queries of a head from `first` on. keys, values: in pairs.
template <int rows = QUERIES>
void attend_block(const Prompt& p, int64_t head, int64_t first, const uint32_t* keys, const uint32_t* values, float* out) {
    if (first + rows > p.queries) {
        if constexpr (rows > 1) attend_block<rows - 1>(p, head, first, keys, values, out);
        return;
    }
    const uint32_t* q[rows];
    for (int m = 0; m < rows; m++) q[m] = (const uint32_t*)(p.q + (first + m) * p.of_q.position + head * p.of_q.head);
    float scores[rows * KEYS], most[rows], all[rows], scale = 1 / std::sqrt((float)p.size);
    BFloat16 weights[rows * KEYS];
    std::fill(most, most + rows, -INFINITY), std::fill(all, all + rows, 0.0f), std::fill(out, out + rows * p.size, 0.0f);
    int64_t before = p.keys - p.queries + first + 1;  // keys that the first of the queries sees
    for (int64_t from = 0; from < before + rows - 1; from += KEYS) {
        int64_t end = std::min(KEYS, before + rows - 1 - from), filled = (end + 2 * V - 1) / (2 * V) * 2 * V;
        for (int64_t t = 0; t < end; t += 2 * V) score<rows>(q, keys + (from + t) * p.size / 2, p.size / 2, scale, scores + t);
        for (int m = 0; m < rows; m++) {
            float* row = scores + m * KEYS;
            int64_t seen = std::min(filled, std::max<int64_t>(0, before + m - from));
            float top = most[m], sum = 0;
#pragma omp simd reduction(max : top)
            for (int64_t t = 0; t < seen; t++)
                if (row[t] > top) top = row[t];  // NaN, which is left out here, stays in the next line
            for (int64_t t = 0; t < seen; t++) row[t] = exponential(row[t] - top);
            for (int64_t t = seen; t < filled; t++) row[t] = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t t = 0; t < filled; t++) sum += row[t];
#pragma omp simd
            for (int64_t t = 0; t < filled; t++) weights[m * KEYS + t].bits = BFloat16(row[t]).bits;
            float less = exponential(most[m] - top);
            if (most[m] == top) less = 1;
            most[m] = top, all[m] = all[m] * less + sum;
            if (less != 1)
                for (int64_t i = 0; i < p.size; i++) out[m * p.size + i] *= less;
        }
        const uint32_t* some = values + from / 2 * p.size;
        int64_t i = 0;
        for (; i + 4 * V <= p.size; i += 4 * V) weigh<rows, 4>((uint32_t*)weights, some + i, filled / 2, p.size, out + i);
        for (; i < p.size; i += V) weigh<rows, 1>((uint32_t*)weights, some + i, filled / 2, p.size, out + i);
    }
    for (int m = 0; m < rows; m++) {
        BFloat16* to = p.out + ((first + m) * p.heads + head) * p.size;
        for (int64_t i = 0; i < p.size; i++) to[i] = BFloat16(out[m * p.size + i] / all[m]);
    }
}

// A row of the batch. room: for the keys and values of all heads in pairs, kv_heads * 2 * room() numbers.
inline void attend_prompt(const Prompt& p, uint32_t* room) {
    int64_t of_head = p.room() / 2, tasks = p.heads * p.blocks();
#pragma omp parallel
    {
        std::vector<float> out(QUERIES * p.size);
#pragma omp for
        for (int64_t head = 0; head < p.kv_heads; head++) {
            pair_keys(p, head, room + 2 * head * of_head);
            pair_values(p, head, room + (2 * head + 1) * of_head);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t head = task / p.blocks(), kv_head = head / (p.heads / p.kv_heads);
            const uint32_t* keys = room + 2 * kv_head * of_head;
            attend_block(p, head, task % p.blocks() * QUERIES, keys, keys + of_head, out.data());
        }
    }
}

}  // namespace
