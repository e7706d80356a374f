// One step of the whole model for up to MOST_ROWS rows, `Transformer.step`, in one region of threads.
//
// Starting and joining threads for each product, and Python between them, take longer than a small model's products. Here
// the threads start once. Each phase (a product, or attention) is divided among them; one that is done helps the next ones. What one
// computed the others read after the next barrier. All that is small, such as norms, each computes for itself. Numbers are rounded to
// the model's type T where `model.py` rounds them, and a row's numbers depend neither on the other rows nor on the number of threads.
//
// Several processes may share the model, each with its part of every matrix and of the heads. They run the same step at the same
// time; one thread of each sums and gathers with the others.
#pragma once
#include <omp.h>

#include <atomic>
#include <exception>
#include <initializer_list>
#include <memory>
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
    DIGITS_8,  // tiles of 8 bits, scales of whole rows apart, activations in several digits (int8)
    DIGITS_4   // tiles of 4 bits, activations in several digits (int4)
};

struct Matrix {
    Form form;
    const uint8_t* data;
    int64_t rows, columns, group;
    const float* scales;  // DIGITS_8: of its rows

    bool in_digits() const { return form == DIGITS_8 || form == DIGITS_4; }
    bool halves() const { return form == GROUPS_4 || form == DIGITS_4; }
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
        return {form, data, rows, columns, group, (const float*)place()};
    }
};

// What a step is asked for: a token of each row, its position, and its row of the cache.
struct Asked {
    int64_t rows;
    const int64_t *tokens, *positions, *slots;
};

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

// `height` rows of plain weights times `rows` rows of activations. Meanwhile `ahead` is asked for: as much as `each` rows of weights.
template <typename T, int height, int rows>
void multiply_plain(const T* w, const T* x, int64_t columns, Line* lines, int64_t first, const T* ahead, int64_t each) {
    Floats sum[rows][height];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int r = 0; r < height; r++) sum[m][r] = repeat(0.0f);
    int64_t i = 0, bytes = each * 2 * V * sizeof(T);
    for (; i + 2 * V <= columns; i += 2 * V) {
        for (int64_t line = 0; line < bytes; line += 64) prefetch((const uint8_t*)ahead + line);
        ahead += each * 2 * V;
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
            for (int r = 0; r < height; r++) sum[m][r] = add_products(sum[m][r], w + r * columns + i, x + m * columns + i);
    }
#pragma GCC unroll 8  // these loops too: else the sums would lie in memory, and not in registers
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 8
        for (int r = 0; r < height; r++) {
            float all = total(sum[m][r]);
            for (int64_t j = i; j < columns; j++) all = std::fmaf((float)x[m * columns + j], (float)w[r * columns + j], all);
            lines[m][first + r] = all;
        }
}

constexpr int SHARING = 4;               // most rows of activations that share loaded weights
constexpr int HEIGHT = V == 16 ? 4 : 2;  // rows of weights that share loaded activations; the sums of both fit into registers

// `height` rows of plain weights times all rows of activations, which take turns; each turn asks for `each` rows of weights ahead, until
// none of them are left.
template <typename T, int height, int rows = SHARING>
void multiply_plain_rows(const T* w, const T* x, int64_t count, int64_t columns, Line* lines, int64_t first, const T* ahead, int64_t each,
                         int64_t left = height) {
    for (; count >= rows; count -= rows, x += rows * columns, lines += rows, ahead += each * columns, left -= each)
        multiply_plain<T, height, rows>(w, x, columns, lines, first, ahead, left > 0 ? each : 0);
    if constexpr (rows > 1)
        if (count) multiply_plain_rows<T, height, rows - 1>(w, x, count, columns, lines, first, ahead, each, left);
}

// A tile of plain weights, of up to R rows, times `count` rows of activations. One row is multiplied fastest with one row of weights
// at a time. Several take turns with HEIGHT rows of weights, and share the work of bringing in the next ones.
template <typename T>
void multiply_plain_tile(const T* w, int64_t tile_rows, const T* x, int64_t count, int64_t columns, Line* lines) {
    int64_t r = 0, turns = (count + SHARING - 1) / SHARING, each = (HEIGHT + turns - 1) / turns;
    if (count > 1)
        for (; r + HEIGHT <= tile_rows; r += HEIGHT)
            multiply_plain_rows<T, HEIGHT>(w + r * columns, x, count, columns, lines, r, w + (r + HEIGHT) * columns, each);
    for (; r < tile_rows; r++)
        multiply_plain_rows<T, 1>(w + r * columns, x, count, columns, lines, r, w + r * columns + AHEAD / sizeof(T), 1);
}

// Activations in the form that matrices multiply.
template <typename T>
struct Activations {
    static constexpr int DIGITS = digits_of<T>;
    std::vector<T> plain;
    std::vector<int8_t> numbers;
    std::vector<float> unit, sums;
    std::vector<int32_t> starts;
    int64_t count;
    Rows rows{};

    // Memory that runs out within the region of threads would end the process, so all that is needed is made before.
    Activations(int64_t count, int64_t most_columns)
        : plain(count * most_columns), numbers(count * DIGITS * most_columns), unit(count * (most_columns / 8 + 1)), sums(unit.size()),
          starts(unit.size() * DIGITS), count(count) {}

    // For this matrix, and others of its form and width.
    void take(const Matrix& matrix, const float* x) {
        int64_t columns = matrix.columns, group = matrix.group;
        int digits = matrix.in_digits() ? DIGITS : 1;
        rows = {numbers.data(), unit.data(), starts.data(), sums.data(), columns, group, columns / group, digits};
        for (int64_t m = 0; m < count; m++) {
            const float* row = x + m * columns;
            if (matrix.form == PLAIN) {
                for (int64_t i = 0; i < columns; i++) plain[m * columns + i] = (T)row[i];
                continue;
            }
            if (digits > 1) to_digits<DIGITS>(row, columns, &numbers[m * DIGITS * columns], &unit[m]);
            else
                for (int64_t g = 0; g < rows.groups; g++)
                    round_group(row + g * group, group, &numbers[m * columns + g * group], &unit[m * rows.groups + g]);
            begin(rows, m, matrix.halves(), starts.data(), sums.data());
        }
    }

    // A tile of a matrix times all rows -> R numbers for each, of which those beyond the matrix mean nothing.
    void multiply(const Matrix& matrix, int64_t tile, Line* lines) const {
        if (matrix.form == PLAIN) {
            int64_t height = std::min(R, matrix.rows - tile * R);
            multiply_plain_tile((const T*)matrix.data + tile * R * rows.columns, height, plain.data(), count, rows.columns, lines);
            return;
        }
        Tiles tiles(matrix.data, matrix.rows, rows.columns, rows.groups, matrix.halves());
        if (rows.digits == 1) multiply_tile<1>(rows, tiles, tile, 0, count, lines);
        else multiply_tile<DIGITS>(rows, tiles, tile, 0, count, lines);
        if (matrix.form == DIGITS_8) scale_rows(matrix.scales + tile * R, tiles.height(tile), count, lines);
    }
};

// Tasks of a thread that nobody has begun: the next one in the lower half, the end in the upper one.
struct alignas(64) Tasks {
    std::atomic<uint64_t> left{0};
    void set(uint64_t from, uint64_t end) { left = end << 32 | from; }
    // -> the next task, or -1
    int64_t take() {
        auto none = [](uint64_t tasks) { return (tasks & 0xffffffff) >= tasks >> 32; };
        if (none(left.load(std::memory_order_relaxed))) return -1;
        uint64_t tasks = left.fetch_add(1);
        return none(tasks) ? -1 : (int64_t)(tasks & 0xffffffff);
    }
};

// One thread's part of a step.
template <typename T>
class Worker {
   public:
    // What the threads write for each other.
    struct Shared {
        std::vector<float> qkv, attended, gate, delta, logits;
        std::unique_ptr<Tasks[]> tasks;  // of each thread
        std::exception_ptr failure;  // of a message
    };

    Worker(const Model& model, const Asked& asked, Shared& shared, float* logits)
        : model(model), asked(asked), shared(shared), logits(logits), h(asked.rows * model.dim), x(h.size()), turned(model.size),
          scores(model.positions), lines(asked.rows * R), more_lines(lines.size()),
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

    // Calls `use` with this thread's part of the tasks, and then with what the next threads have not begun. Between two such phases
    // lies a barrier, before which all tasks were begun.
    template <typename Use>
    void share_out(int64_t tasks, Use use) {
        constexpr int64_t HELPED = 4;  // threads
        shared.tasks[self].set(tasks * self / threads, tasks * (self + 1) / threads);
        for (int64_t i = 0; i < std::min(threads, 1 + HELPED); i++)
            for (int64_t task; (task = shared.tasks[(self + i) % threads].take()) >= 0;) use(task);
    }

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

    // Matrices that lie side by side in y.
    void multiply(std::initializer_list<const Matrix*> matrices, float* y) {
        int64_t tiles = 0, width = 0;
        for (auto* matrix : matrices) tiles += tiles_of(matrix->rows), width += matrix->rows;
        auto* of_tile = (Line*)lines.data();
        share_out(tiles, [&](int64_t tile) {
            auto* place = y;
            auto at = matrices.begin();
            for (; tile >= tiles_of((*at)->rows); at++) tile -= tiles_of((*at)->rows), place += (*at)->rows;
            activations.multiply(**at, tile, of_tile);
            int64_t height = std::min(R, (*at)->rows - tile * R);
            for (int64_t m = 0; m < asked.rows; m++)
                for (int64_t i = 0; i < height; i++) place[m * width + tile * R + i] = rounded<T>(of_tile[m][i]);
        });
    }

    // silu(w1 x) * w3 x
    void multiply_gated(const Matrix& w1, const Matrix& w3, float* y) {
        auto *gate = (Line*)lines.data(), *up = (Line*)more_lines.data();
        share_out(tiles_of(w1.rows), [&](int64_t tile) {
            activations.multiply(w1, tile, gate);
            activations.multiply(w3, tile, up);
            int64_t height = std::min(R, w1.rows - tile * R);
            for (int64_t m = 0; m < asked.rows; m++)
                for (int64_t i = 0; i < height; i++) {
                    float g = rounded<T>(gate[m][i]);
                    y[m * w1.rows + tile * R + i] = rounded<T>(rounded<T>(g / (1 + exponential(-g))) * rounded<T>(up[m][i]));
                }
        });
    }

    // x (size), each adjacent pair turned by its angle.
    void rotate(const float* from, int64_t position, float* to) const {
        const float* turn = model.rotations + position * model.size;
        for (int64_t i = 0; i < model.size; i += 2) {
            to[i] = rounded<T>(from[i] * turn[i] - from[i + 1] * turn[i + 1]);
            to[i + 1] = rounded<T>(from[i] * turn[i + 1] + from[i + 1] * turn[i]);
        }
    }

    // The new keys and values enter the cache.
    void store(const Layer& layer) {
        share_out(asked.rows * model.kv_heads, [&](int64_t task) {
            int64_t m = task / model.kv_heads, head = task % model.kv_heads, position = asked.positions[m];
            const float* key = projected(m) + (model.heads + head) * model.size;
            const float* value = key + model.kv_heads * model.size;
            int64_t place = of_cache(m, head) + position * model.key_stride;
            rotate(key, position, turned.data());
            for (int64_t i = 0; i < model.size; i++) {
                ((T*)layer.cache_k)[place + i] = (T)turned[i];
                ((T*)layer.cache_v)[place + i] = (T)value[i];
            }
        });
    }

    // The queries see all keys up to their position.
    void attend(const Layer& layer) {
        share_out(asked.rows * model.heads, [&](int64_t task) {
            int64_t m = task / model.heads, head = task % model.heads, position = asked.positions[m];
            int64_t place = of_cache(m, head / (model.heads / model.kv_heads));
            rotate(projected(m) + head * model.size, position, turned.data());
            weigh((const T*)layer.cache_k + place, position + 1);
            sum((const T*)layer.cache_v + place, position + 1, shared.attended.data() + task * model.size);
        });
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
        std::vector<float>(model.ranks > 1 ? rows * model.output.rows : 0), nullptr, nullptr};
    int64_t useful = 1 + rows * model.dim * width / SHARE;  // threads that a small model keeps busy
    int64_t count = std::min<int64_t>(omp_get_max_threads(), useful);
    shared.tasks.reset(new Tasks[count]);
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
