// One step of the whole model for up to MOST_ROWS rows, `Transformer.step`, in one region of threads.
//
// Starting and joining threads for each product, and Python between them, take longer than a small model's products. Here
// the threads start once. A phase (a product, or attention) is shared out among them, and what one computed the others read
// after the next barrier; all that is small, such as norms, each computes for itself. Numbers are rounded to the model's type
// T where `model.py` rounds them, and a row's numbers depend neither on the other rows nor on the number of threads.
//
// Several processes may share the model, each with its part of every matrix and of the heads. They run the same step at the same
// time; one thread of each sums and gathers with the others.
#pragma once
#include <omp.h>

#include <exception>
#include <vector>

#include "cpu_products.h"
#include "messages.h"

namespace {

constexpr int64_t MOST_ROWS = 32;

// How a matrix lies in memory; `FORMS` of own_kernels.py.
enum Form : int64_t {
    PLAIN,     // numbers of type T, row by row
    GROUPS_8,  // tiles of 8 bits, activations in groups (w8a8)
    GROUPS_4,  // tiles of 4 bits, activations in groups (w4a8)
    ROWS_8,    // tiles of 8 bits, scales of whole rows, activations in several digits (int8)
    TORCHS_4   // torch's own form for CPUs with AVX-512 (int4); see `multiply_torchs`
};

struct Matrix {
    Form form;
    const uint8_t* data;
    int64_t rows, columns, group;
    const void* scales;  // ROWS_8: float32 (rows,); TORCHS_4: bfloat16 (columns / group, rows, 2), scales and zeros
};

struct Norm {
    const void* weight;
    float eps;
};

struct Layer {
    Norm attention_norm;
    Matrix wq, wk, wv, wo;
    void *cache_k, *cache_v;
    Norm ffn_norm;
    Matrix w1, w3, w2;
};

// A model's sizes, and the addresses of its tensors, in the order in which `decoding/cpu_step.py` writes them down.
// Of what the processes share it has this one's part: heads, kv_heads, and the rows and columns of matrices. The whole embeddings
// have `dim` columns.
struct Model {
    int64_t ranks, room;       // how many processes share the model, and where they speak
    const Messages* messages;  // none for one process
    int64_t type, dim, heads, kv_heads, size, vocabulary, slots, positions;
    const void* embeddings;
    const float* rotations;                        // (positions, size / 2, 2)
    int64_t slot_stride, head_stride, key_stride;  // of the caches, in numbers
    std::vector<Layer> layers;
    Norm norm;
    Matrix output;

    int64_t most_columns() const {
        int64_t most = std::max(dim, heads * size);
        for (const Layer& layer : layers) most = std::max(most, layer.w2.columns);
        return most;
    }

    explicit Model(const int64_t* plan) : at(plan) {
        ranks = next(), room = next(), messages = (const Messages*)place();
        for (auto* number : {&type, &dim, &heads, &kv_heads, &size, &vocabulary, &slots, &positions}) *number = next();
        embeddings = place(), rotations = (const float*)place();
        for (auto* number : {&slot_stride, &head_stride, &key_stride}) *number = next();
        layers.resize(next());
        for (Layer& layer : layers) {
            layer.attention_norm = read_norm();
            for (auto* matrix : {&layer.wq, &layer.wk, &layer.wv, &layer.wo}) *matrix = read();
            layer.cache_k = place(), layer.cache_v = place();
            layer.ffn_norm = read_norm();
            for (auto* matrix : {&layer.w1, &layer.w3, &layer.w2}) *matrix = read();
        }
        norm = read_norm(), output = read();
    }

   private:
    const int64_t* at;
    int64_t next() { return *at++; }
    void* place() { return (void*)next(); }
    Norm read_norm() {
        auto* weight = place();
        return {weight, as_float((uint32_t)next())};
    }
    Matrix read() {
        auto form = (Form)next();
        auto* data = (const uint8_t*)place();
        int64_t rows = next(), columns = next(), group = next();
        return {form, data, rows, columns, group, place()};
    }
};

// What a step is asked for: a token of each row, its position, and its row of the cache.
struct Asked {
    int64_t rows;
    const int64_t *tokens, *positions, *slots;
};

// e^x, off by two units in the last place (the polynomial of Cephes). Loops over it become vectors.
inline float exponential(float x) {
    x = std::min(std::max(x, -104.0f), 89.0f);  // in this order NaN stays
    float n = std::nearbyintf(x * 1.44269504f);
    float r = std::fmaf(n, 2.12194440e-4f, std::fmaf(n, -0.693359375f, x));
    float p = std::fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = std::fmaf(p, r, 8.3334519073e-3f);
    p = std::fmaf(p, r, 4.1665795894e-2f);
    p = std::fmaf(p, r, 1.6666665459e-1f);
    p = std::fmaf(p, r, 5.0000001201e-1f);
    p = std::fmaf(p * r, r, r) + 1;
    int32_t all = (int32_t)n, half = all / 2;  // 2^n itself may be too large or too small for a float
    return p * as_float((uint32_t)(half + 127) << 23) * as_float((uint32_t)(all - half + 127) << 23);
}

template <typename T>
inline float rounded(float number) {
    return (float)(T)number;
}

// The sum of x[i] w[i].
template <typename T>
float dot(const float* x, const T* w, int64_t count) {
    Floats sum = repeat(0.0f);
    int64_t i = 0;
    for (; i + V <= count; i += V) sum = fma(load_floats(x + i), load_floats(w + i), sum);
    float all = total(sum);
    for (; i < count; i++) all = std::fmaf(x[i], (float)w[i], all);
    return all;
}

// `height` rows of plain weights times `rows` rows of activations.
template <typename T, int height, int rows>
void multiply_plain(const T* w, const T* x, int64_t columns, Line* lines, int64_t first) {
    Floats sum[rows][height];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int r = 0; r < height; r++) sum[m][r] = repeat(0.0f);
    const auto* ahead = (const uint8_t*)w + AHEAD;
    int64_t i = 0;
    for (; i + 2 * V <= columns; i += 2 * V) {
        for (int64_t line = 0; line < height * 2 * V * (int64_t)sizeof(T); line += 64) prefetch(ahead + line);
        ahead += height * 2 * V * sizeof(T);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
            for (int r = 0; r < height; r++) sum[m][r] = add_products(sum[m][r], w + r * columns + i, x + m * columns + i);
    }
    for (int m = 0; m < rows; m++)
        for (int r = 0; r < height; r++) {
            float all = total(sum[m][r]);
            for (int64_t j = i; j < columns; j++) all = std::fmaf((float)x[m * columns + j], (float)w[r * columns + j], all);
            lines[m][first + r] = all;
        }
}

// A tile of plain weights, of up to R rows, times up to `rows` rows of activations. One row of weights at a time is read
// fastest; for several rows of activations, two of them share what was loaded.
template <typename T, int rows = 4>
void multiply_plain_tile(const T* w, int64_t tile_rows, const T* x, int64_t count, int64_t columns, Line* lines) {
    if (count == rows) {
        constexpr int height = rows == 1 ? 1 : 2;
        int64_t r = 0;
        for (; r + height <= tile_rows; r += height) multiply_plain<T, height, rows>(w + r * columns, x, columns, lines, r);
        for (; r < tile_rows; r++) multiply_plain<T, 1, rows>(w + r * columns, x, columns, lines, r);
    } else if constexpr (rows > 1) {
        multiply_plain_tile<T, rows - 1>(w, tile_rows, x, count, columns, lines);
    }
}

// A tile in torch's form times `rows` rows of activations: blocks of 2 R rows, column after column, the first R rows in the
// lower halves of R bytes and the others in the upper ones. sums: of x over each group.
template <bool UPPER, int rows>
void multiply_torchs(const Matrix& matrix, int64_t tile, const float* x, const float* sums, Line* lines) {
    int64_t groups = matrix.columns / matrix.group;
    const uint8_t* w = matrix.data + tile / 2 * R * matrix.columns;
    Floats total[rows][W];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < W; v++) total[m][v] = repeat(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        Floats sum[rows][W];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < W; v++) sum[m][v] = repeat(0.0f);
        for (int64_t c = g * matrix.group; c < (g + 1) * matrix.group; c++, w += R) {
            if (!UPPER) prefetch(w + AHEAD);
#pragma GCC unroll 4
            for (int v = 0; v < W; v++) {
                Floats some = from_halves<UPPER>(w + V * v);
#pragma GCC unroll 8
                for (int m = 0; m < rows; m++) sum[m][v] = fma(repeat(x[m * matrix.columns + c]), some, sum[m][v]);
            }
        }
        const auto* both = (const BFloat16*)matrix.scales + (g * matrix.rows + tile * R) * 2;
        float scales[R], zeros[R];
        for (int64_t i = 0; i < R; i++) scales[i] = (float)both[2 * i], zeros[i] = (float)both[2 * i + 1];
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < W; v++) {
                Floats all = fma(sum[m][v], load_floats(scales + V * v), total[m][v]);
                total[m][v] = fma(repeat(sums[m * groups + g]), load_floats(zeros + V * v), all);
            }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < W; v++) store(lines[m] + V * v, total[m][v]);
}

constexpr int64_t SHARING = 8;  // most rows for which weights are unpacked once

// The same for up to `rows` rows.
template <int rows = SHARING>
void multiply_torchs_tile(const Matrix& matrix, int64_t tile, const float* x, const float* sums, int64_t count, Line* lines) {
    if (count == rows)
        tile % 2 ? multiply_torchs<true, rows>(matrix, tile, x, sums, lines) : multiply_torchs<false, rows>(matrix, tile, x, sums, lines);
    else if constexpr (rows > 1)
        multiply_torchs_tile<rows - 1>(matrix, tile, x, sums, count, lines);
}

// Activations in the form that matrices multiply.
template <typename T>
struct Activations {
    static constexpr int DIGITS = sizeof(T) == 4 ? 3 : 2;  // of int8.py
    static constexpr float BASE = 254;
    int64_t rows, columns = 0, groups = 1;
    const float* floats = nullptr;
    std::vector<T> plain;
    std::vector<int8_t> numbers;
    std::vector<float> unit, ones;
    std::vector<int32_t> sums;

    // Memory that runs out within the region of threads would end the process, so all that is needed is made before.
    Activations(int64_t rows, int64_t most_columns)
        : rows(rows), plain(rows * most_columns), numbers(rows * DIGITS * most_columns), unit(rows * (most_columns / 8 + DIGITS)), ones(unit.size(), 1.0f),
          sums(unit.size()) {}

    // For this matrix, and others of its form and width.
    void take(const Matrix& matrix, const float* x) {
        floats = x, columns = matrix.columns, groups = columns / matrix.group;
        if (matrix.form == PLAIN) {
            for (int64_t i = 0; i < rows * columns; i++) plain[i] = (T)x[i];
            return;
        }
        if (matrix.form == TORCHS_4) {
            for (int64_t i = 0; i < rows * groups; i++) {
                unit[i] = 0;
                for (int64_t j = 0; j < matrix.group; j++) unit[i] += x[i * matrix.group + j];
            }
            return;
        }
        int64_t parts = rows * (matrix.form == ROWS_8 ? DIGITS : groups);
        if (matrix.form == ROWS_8) {
            for (int64_t m = 0; m < rows; m++) to_digits(x + m * columns, numbers.data() + m * DIGITS * columns, &unit[m]);
        } else {
            for (int64_t i = 0; i < parts; i++)
                round_group(x + i * matrix.group, matrix.group, numbers.data() + i * matrix.group, &unit[i]);
        }
        for (int64_t i = 0; i < parts; i++) {
            int32_t sum = 0;
            for (int64_t j = 0; j < matrix.group; j++) sum += numbers[i * matrix.group + j];
            sums[i] = sum;
        }
    }

    // A tile of a matrix times all rows -> R numbers for each, of which those beyond the matrix mean nothing.
    void multiply(const Matrix& matrix, int64_t tile, Line* lines) const {
        if (matrix.form == PLAIN) {
            int64_t height = std::min(R, matrix.rows - tile * R);
            for (int64_t m = 0; m < rows; m += 4)
                multiply_plain_tile((const T*)matrix.data + tile * R * columns, height, plain.data() + m * columns,
                                    std::min<int64_t>(4, rows - m), columns, lines + m);
            return;
        }
        if (matrix.form == TORCHS_4) {
            for (int64_t m = 0; m < rows; m += SHARING)
                multiply_torchs_tile(matrix, tile, floats + m * columns, unit.data() + m * groups, std::min(SHARING, rows - m),
                                     lines + m);
            return;
        }
        bool halves = matrix.form == GROUPS_4, digits = matrix.form == ROWS_8;
        int64_t bytes = tile_bytes(columns, groups, halves ? 4 : 8), count = digits ? rows * DIGITS : rows;
        Product p{numbers.data(), digits ? ones.data() : unit.data(), sums.data(), columns, matrix.group, groups, matrix.data, bytes};
        for (int64_t m = 0; m < count; m += M) {
            int64_t some = std::min<int64_t>(M, count - m);
            halves ? multiply_tile<true>(p, tile, m, some, lines + m) : multiply_tile<false>(p, tile, m, some, lines + m);
        }
        if (digits) join((const float*)matrix.scales + tile * R, std::min(R, matrix.rows - tile * R), lines);
    }

   private:
    // `in_digits` of int8.py, for one row.
    void to_digits(const float* from, int8_t* to, float* step) const {
        float largest = largest_of(from, columns);
        *step = largest * (DIGITS == 3 ? 1 / (127 * BASE * BASE) : 1 / (127 * BASE));
        float steps = 1 / largest * 127;
        for (int64_t i = 0; i < columns; i++) {
            float rest = from[i] * steps;
            for (int d = 0; d < DIGITS; d++) {
                float digit = std::nearbyintf(rest);
                to[d * columns + i] = (int8_t)(int32_t)digit;
                rest = (rest - digit) * BASE;
            }
        }
    }

    // Rows of digits become rows of numbers.
    void join(const float* scales, int64_t height, Line* lines) const {
        for (int64_t m = 0; m < rows; m++)
            for (int64_t i = 0; i < height; i++) {
                float sum = lines[m * DIGITS][i] * scales[i];
                for (int d = 1; d < DIGITS; d++) sum = lines[m * DIGITS + d][i] * scales[i] + sum * BASE;
                lines[m][i] = sum * unit[m];
            }
    }
};

// One thread's part of a step.
template <typename T>
class Worker {
   public:
    // What the threads write for each other.
    struct Shared {
        std::vector<float> qkv, attended, gate, delta, logits;
        std::exception_ptr failure;  // of a message
    };

    Worker(const Model& model, const Asked& asked, Shared& shared, float* logits)
        : model(model), asked(asked), shared(shared), logits(logits), h(asked.rows * model.dim), x(h.size()), turned(model.size),
          scores(model.positions), lines(asked.rows * Activations<T>::DIGITS * R), more_lines(lines.size()),
          activations(asked.rows, model.most_columns()) {}

    void run(int64_t number, int64_t count) {
        self = number, threads = count;
        if (!embed()) return;
        for (const Layer& layer : model.layers) {
            normalize(layer.attention_norm, layer.wq);
            multiply({&layer.wq, &layer.wk, &layer.wv}, shared.qkv.data());
            wait();
            store(layer);
            wait();
            attend(layer);
            wait();
            activations.take(layer.wo, shared.attended.data());
            multiply({&layer.wo}, shared.delta.data());
            if (!add()) return;
            normalize(layer.ffn_norm, layer.w1);
            multiply_gated(layer.w1, layer.w3, shared.gate.data());
            wait();
            activations.take(layer.w2, shared.gate.data());
            multiply({&layer.w2}, shared.delta.data());
            if (!add()) return;
        }
        normalize(model.norm, model.output);
        multiply({&model.output}, model.ranks > 1 ? shared.logits.data() : logits);
        if (model.ranks > 1)
            meet([&] { model.messages->gather(model.room, shared.logits.data(), logits, asked.rows, model.output.rows); });
    }

   private:
    const Model& model;
    const Asked& asked;
    Shared& shared;
    float* logits;
    std::vector<float> h, x;  // the residual stream, and what a product gets of it: (rows, dim)
    std::vector<float> turned, scores;
    std::vector<float> lines, more_lines;
    Activations<T> activations;
    int64_t self = 0, threads = 1;

    static void wait() {
#pragma omp barrier
    }

    // Wait for the other threads; then one speaks with the other processes, if there are any, and the others wait for it. -> whether
    // it could. What is thrown must not leave the region of threads here.
    template <typename Speak>
    bool meet(Speak speak) {
        wait();
        if (model.ranks == 1) return true;
        if (self == 0) {
            try {
                speak();
            } catch (...) {
                shared.failure = std::current_exception();
            }
        }
        wait();
        return !shared.failure;
    }

    // h = the tokens' embeddings, of which each process has some columns
    bool embed() {
        int64_t width = model.dim / model.ranks;
        for (int64_t m = 0; m < asked.rows; m++) {
            const T* row = (const T*)model.embeddings + asked.tokens[m] * width;
            for (int64_t i = 0; i < width; i++) x[m * width + i] = (float)row[i];
        }
        if (model.ranks == 1) {
            h.swap(x);
            return true;
        }
        if (!meet([&] { model.messages->gather(model.room, x.data(), shared.delta.data(), asked.rows, width); })) return false;
        std::copy(shared.delta.begin(), shared.delta.end(), h.begin());
        return true;
    }

    // x = h / rms(h) * weight
    void normalize(const Norm& norm, const Matrix& next) {
        for (int64_t m = 0; m < asked.rows; m++) {
            const float* from = h.data() + m * model.dim;
            float scale = 1 / std::sqrt(dot(from, from, model.dim) / (float)model.dim + norm.eps);
            for (int64_t i = 0; i < model.dim; i++)
                x[m * model.dim + i] = rounded<T>(rounded<T>(from[i] * scale) * (float)((const T*)norm.weight)[i]);
        }
        activations.take(next, x.data());
    }

    // h += the sum of what each process has of `delta`, which `all_reduce` rounds once
    bool add() {
        if (!meet([&] { model.messages->sum(model.room, shared.delta.data(), (int64_t)shared.delta.size()); })) return false;
        for (size_t i = 0; i < h.size(); i++) h[i] = rounded<T>(h[i] + rounded<T>(shared.delta[i]));
        return true;
    }

    // This thread's tiles of matrices that lie side by side in y.
    void multiply(std::initializer_list<const Matrix*> matrices, float* y) {
        int64_t tiles = 0, width = 0, before = 0;
        for (auto* matrix : matrices) tiles += tiles_of(matrix->rows), width += matrix->rows;
        int64_t from = tiles * self / threads, end = tiles * (self + 1) / threads;
        auto* of_tile = (Line*)lines.data();
        for (auto* matrix : matrices) {
            int64_t here = tiles_of(matrix->rows);
            for (int64_t tile = std::max<int64_t>(0, from - before); tile < std::min(here, end - before); tile++) {
                activations.multiply(*matrix, tile, of_tile);
                int64_t height = std::min(R, matrix->rows - tile * R);
                for (int64_t m = 0; m < asked.rows; m++)
                    for (int64_t i = 0; i < height; i++) y[m * width + tile * R + i] = rounded<T>(of_tile[m][i]);
            }
            before += here, y += matrix->rows;
        }
    }

    // silu(w1 x) * w3 x
    void multiply_gated(const Matrix& w1, const Matrix& w3, float* y) {
        int64_t tiles = tiles_of(w1.rows);
        auto *gate = (Line*)lines.data(), *up = (Line*)more_lines.data();
        for (int64_t tile = tiles * self / threads; tile < tiles * (self + 1) / threads; tile++) {
            activations.multiply(w1, tile, gate);
            activations.multiply(w3, tile, up);
            int64_t height = std::min(R, w1.rows - tile * R);
            for (int64_t m = 0; m < asked.rows; m++)
                for (int64_t i = 0; i < height; i++) {
                    float g = rounded<T>(gate[m][i]);
                    y[m * w1.rows + tile * R + i] = rounded<T>(rounded<T>(g / (1 + exponential(-g))) * rounded<T>(up[m][i]));
                }
        }
    }

    // x (size), each adjacent pair turned by its angle.
    void rotate(const float* from, int64_t position, float* to) const {
        const float* turn = model.rotations + position * model.size;
        for (int64_t i = 0; i < model.size; i += 2) {
            to[i] = rounded<T>(from[i] * turn[i] - from[i + 1] * turn[i + 1]);
            to[i + 1] = rounded<T>(from[i] * turn[i + 1] + from[i + 1] * turn[i]);
        }
    }

    // The new keys and values of this thread's heads enter the cache.
    void store(const Layer& layer) {
        int64_t tasks = asked.rows * model.kv_heads;
        for (int64_t task = tasks * self / threads; task < tasks * (self + 1) / threads; task++) {
            int64_t m = task / model.kv_heads, head = task % model.kv_heads, position = asked.positions[m];
            const float* key = projected(m) + (model.heads + head) * model.size;
            const float* value = key + model.kv_heads * model.size;
            int64_t place = of_cache(m, head) + position * model.key_stride;
            rotate(key, position, turned.data());
            for (int64_t i = 0; i < model.size; i++) {
                ((T*)layer.cache_k)[place + i] = (T)turned[i];
                ((T*)layer.cache_v)[place + i] = (T)value[i];
            }
        }
    }

    // The queries of this thread's heads see all keys up to their position.
    void attend(const Layer& layer) {
        int64_t tasks = asked.rows * model.heads;
        for (int64_t task = tasks * self / threads; task < tasks * (self + 1) / threads; task++) {
            int64_t m = task / model.heads, head = task % model.heads, position = asked.positions[m];
            int64_t place = of_cache(m, head / (model.heads / model.kv_heads));
            rotate(projected(m) + head * model.size, position, turned.data());
            weigh((const T*)layer.cache_k + place, position + 1);
            sum((const T*)layer.cache_v + place, position + 1, shared.attended.data() + task * model.size);
        }
    }

    // The row's queries, keys and values.
    const float* projected(int64_t m) const { return shared.qkv.data() + m * (model.heads + 2 * model.kv_heads) * model.size; }

    int64_t of_cache(int64_t m, int64_t head) const { return asked.slots[m] * model.slot_stride + head * model.head_stride; }

    // scores = softmax(q k / sqrt(size)), q in `turned`
    void weigh(const T* keys, int64_t count) {
        float scale = 1 / std::sqrt((float)model.size), most = -INFINITY, all = 0;
        for (int64_t t = 0; t < count; t++) scores[t] = dot(turned.data(), keys + t * model.key_stride, model.size) * scale;
        for (int64_t t = 0; t < count; t++) most = std::max(most, scores[t]);
        for (int64_t t = 0; t < count; t++) scores[t] = exponential(scores[t] - most);
        for (int64_t t = 0; t < count; t++) all += scores[t];
        for (int64_t t = 0; t < count; t++) scores[t] /= all;
    }

    // y = the sum of scores v, some numbers of a head at a time, so that the sums stay in registers.
    void sum(const T* values, int64_t count, float* y) const {
        int64_t i = 0;
        for (; i + 4 * V <= model.size; i += 4 * V) sum_some<4>(values + i, count, y + i);
        for (; i + V <= model.size; i += V) sum_some<1>(values + i, count, y + i);
        for (; i < model.size; i++) {
            float all = 0;
            for (int64_t t = 0; t < count; t++) all += scores[t] * (float)values[t * model.key_stride + i];
            y[i] = rounded<T>(all);
        }
    }

    template <int vectors>
    void sum_some(const T* values, int64_t count, float* y) const {
        Floats all[vectors];
        for (int v = 0; v < vectors; v++) all[v] = repeat(0.0f);
        for (int64_t t = 0; t < count; t++)
            for (int v = 0; v < vectors; v++)
                all[v] = fma(repeat(scores[t]), load_floats(values + t * model.key_stride + v * V), all[v]);
        for (int v = 0; v < vectors; v++) ::store(y + v * V, all[v]);
        for (int i = 0; i < vectors * V; i++) y[i] = rounded<T>(y[i]);
    }
};

// -> logits (rows, rows of the output of all processes)
template <typename T>
void step(const Model& model, const Asked& asked, float* logits) {
    int64_t rows = asked.rows, width = model.layers.empty() ? 0 : model.layers[0].w1.rows;
    typename Worker<T>::Shared shared{
        std::vector<float>(rows * (model.heads + 2 * model.kv_heads) * model.size), std::vector<float>(rows * model.heads * model.size),
        std::vector<float>(rows * width), std::vector<float>(rows * model.dim),
        std::vector<float>(model.ranks > 1 ? rows * model.output.rows : 0), nullptr};
    int64_t useful = 1 + rows * model.dim * width / SHARE;  // threads that a small model keeps busy
    int64_t count = std::min<int64_t>(omp_get_max_threads(), useful);
    std::vector<Worker<T>> workers;
    workers.reserve(count);
    for (int64_t i = 0; i < count; i++) workers.emplace_back(model, asked, shared, logits);
#pragma omp parallel num_threads(count)
    {
        int64_t there = omp_get_num_threads();  // the system may give fewer
        workers[omp_get_thread_num()].run(omp_get_thread_num(), there);
    }
    if (shared.failure) std::rethrow_exception(shared.failure);
}

}  // namespace
