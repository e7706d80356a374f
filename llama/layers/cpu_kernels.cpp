// Operators for CPUs: products with 8-bit activations, and the decode step. Compiled for the processor that it runs on
// (-march=native).
#include <omp.h>

#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu_attention.h"
#include "cpu_pairs.h"
#include "cpu_rounding.h"
#include "cpu_step.h"
#include "cpu_tiles.h"
#include "tensors.h"

namespace {

enum { FLOAT32, BFLOAT16, FLOAT16 };  // types of activations

int64_t type_of(int32_t dtype) {
    if (dtype == aoti_torch_dtype_bfloat16()) return BFLOAT16;
    if (dtype == aoti_torch_dtype_float16()) return FLOAT16;
    Tensor::check(dtype == aoti_torch_dtype_float32());
    return FLOAT32;
}

// Results become numbers of type T. Written so, the compiler makes vectors of it.
template <typename T>
void put(const float* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; i++) to[i] = (T)from[i];
}
inline void put(const float* from, int64_t count, BFloat16* to) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) to[i].bits = BFloat16(from[i]).bits;
}

// Calls `use` with a pointer to numbers of the tensor's type.
template <typename Use>
void with_numbers(const Tensor& x, Use use) {
    int64_t type = type_of(x.dtype());
    if (type == BFLOAT16) use(x.numbers<BFloat16>());
    else if (type == FLOAT16) use(x.numbers<Float16>());
    else use(x.numbers<float>());
}

Tiles tiles_of(const Tensor& weight, int64_t outputs, int64_t columns, int64_t group, int64_t bits) {
    Tensor::check((bits == 8 || bits == 4) && group > 0 && group % 8 == 0 && columns % group == 0);
    Tiles tiles(weight.numbers<uint8_t>(), outputs, columns, columns / group, bits == 4);
    Tensor::check(weight.is(aoti_torch_dtype_uint8(), tiles_of(outputs), tiles.bytes));
    return tiles;
}

const float* scales_of(const Tensor& scales, int64_t outputs) {
    bool some = scales.size(1) > 0;
    Tensor::check(scales.is(aoti_torch_dtype_float32(), 1, some ? outputs : 0));
    return some ? scales.numbers<float>() : nullptr;
}

// Rows times all tiles -> (rows, outputs). scales: of the outputs, or null.
template <int D, typename T>
void multiply_all(const Rows& all, const Tiles& tiles, const float* scales, int64_t count, T* y) {
#pragma omp parallel for schedule(static) if (tiles.outputs * all.columns * count > SHARE)
    for (int64_t tile = 0; tile < tiles_of(tiles.outputs); tile++) {
        Line lines[M];
        for (int64_t first = 0; first < count; first += M) {
            int64_t some = std::min<int64_t>(M, count - first);
            multiply_tile<D>(all, tiles, tile, first, some, lines);
            if (scales) scale_rows(scales + tile * R, tiles.height(tile), some, lines);
            for (int64_t m = 0; m < some; m++) put(lines[m], tiles.height(tile), y + (first + m) * tiles.outputs + tile * R);
        }
    }
}

// numbers int8 (rows, columns), unit float32 (rows, groups), weight uint8 (tiles, bytes), outputs, bits, type -> (rows, outputs)
void product(StableIValue* stack, uint64_t, uint64_t) {
    Tensor numbers(stack[0]), unit(stack[1]), weight(stack[2]);
    auto outputs = (int64_t)stack[3], bits = (int64_t)stack[4], type = (int64_t)stack[5];
    int64_t count = numbers.size(0), columns = numbers.size(1), groups = std::max<int64_t>(1, unit.size(1));
    Tiles tiles = tiles_of(weight, outputs, columns, columns / groups, bits);
    Tensor::check(numbers.is(aoti_torch_dtype_int8(), count, columns) && unit.is(aoti_torch_dtype_float32(), count, groups));
    int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
    Tensor::check(type >= 0 && type < 3);
    Tensor y({count, outputs}, dtypes[type]);
    std::vector<int32_t> starts(count * groups);
    std::vector<float> sums(count * groups);
    Rows all{numbers.numbers<int8_t>(), unit.numbers<float>(), starts.data(), sums.data(), columns, columns / groups, groups, 1};
    for (int64_t m = 0; m < count; m++) begin(all, m, tiles.halves, starts.data(), sums.data());
    with_numbers(y, [&](auto* to) { multiply_all<1>(all, tiles, nullptr, count, to); });
    stack[0] = y.given();
}

template <typename T>
void multiply_digits(const T* x, int64_t count, int64_t columns, int64_t group, const Tiles& tiles, const float* scales, T* y) {
    constexpr int D = digits_of<T>;
    int64_t groups = columns / group;
    std::vector<int8_t> numbers(count * D * columns);
    std::vector<float> unit(count), sums(count * groups);
    std::vector<int32_t> starts(count * D * groups);
    Rows all{numbers.data(), unit.data(), starts.data(), sums.data(), columns, group, groups, D};
#pragma omp parallel for schedule(static) if (count * columns > SHARE)
    for (int64_t m = 0; m < count; m++) {
        to_digits<D>(x + m * columns, columns, &numbers[m * D * columns], &unit[m]);
        begin(all, m, tiles.halves, starts.data(), sums.data());
    }
    multiply_all<D>(all, tiles, scales, count, y);
}

// x (rows, columns), weight uint8 (tiles, bytes), scales float32 (1, outputs) or (1, 0), outputs, bits, group -> (rows, outputs)
// of x's type: the product with x as it is, in digits.
void exact_product(StableIValue* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), weight(stack[1]), scales(stack[2]);
    auto outputs = (int64_t)stack[3], bits = (int64_t)stack[4], group = (int64_t)stack[5];
    int64_t count = x.size(0), columns = x.size(1);
    Tiles tiles = tiles_of(weight, outputs, columns, group, bits);
    Tensor::check(x.is(x.dtype(), count, columns));
    Tensor y({count, outputs}, x.dtype());
    with_numbers(x, [&](auto* from) {
        using T = std::remove_reference_t<decltype(*from)>;
        multiply_digits(from, count, columns, group, tiles, scales_of(scales, outputs), y.numbers<T>());
    });
    stack[0] = y.given();
}

// to bfloat16 (columns, outputs), weight uint8 (tiles, bytes), scales float32 (1, outputs) or (1, 0), bits, group: the transposed
// matrix enters `to`, which the caller keeps for the next one, since new memory takes longer than the unpacking. It is written past
// the caches: where two cores have read the last one, each line that stays in a cache would be fetched from there first.
void unpack_into(StableIValue* stack, uint64_t, uint64_t) {
    Tensor to(stack[0]), weight(stack[1]), scales(stack[2]);
    auto bits = (int64_t)stack[3], group = (int64_t)stack[4];
    int64_t columns = to.size(0), outputs = to.size(1);
    Tensor::check(to.is(aoti_torch_dtype_bfloat16(), columns, outputs));
    Tiles tiles = tiles_of(weight, outputs, columns, group, bits);
    const float* of_rows = scales_of(scales, outputs);
    auto* numbers = to.numbers<BFloat16>();
#pragma omp parallel if (outputs * columns > SHARE)
    {
#pragma omp for schedule(static) nowait
        for (int64_t tile = 0; tile < tiles_of(outputs); tile++)
            tiles.halves ? unpack<true>(tiles, tile, columns, group, of_rows, numbers + tile * R, outputs)
                         : unpack<false>(tiles, tile, columns, group, of_rows, numbers + tile * R, outputs);
        streamed();
    }
}

// x bfloat16 (rows, columns), weight uint8 (tiles, bytes), scales float32 (1, outputs) or (1, 0), outputs, bits, group -> bfloat16
// (rows, outputs), with each weight rounded to bfloat16
void bfloat16_product(StableIValue* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), weight(stack[1]), scales(stack[2]);
    auto outputs = (int64_t)stack[3], bits = (int64_t)stack[4], group = (int64_t)stack[5];
    int64_t count = x.size(0), columns = x.size(1);
    Tensor::check(x.is(aoti_torch_dtype_bfloat16(), count, columns));
    Tiles tiles = tiles_of(weight, outputs, columns, group, bits);
    const float* of_rows = scales_of(scales, outputs);
    Tensor y({count, outputs}, aoti_torch_dtype_bfloat16());
    const auto* from = x.numbers<BFloat16>();
    auto* to = y.numbers<BFloat16>();
    int64_t blocks = (count + SHARED - 1) / SHARED, pairs = columns / 2;
    auto rows_of = [=](int64_t block) { return std::min<int64_t>(SHARED, count - block * SHARED); };
    // Made before the region of threads, in which memory that runs out would end the process.
    std::unique_ptr<uint32_t[]> all(new uint32_t[blocks * pairs * SHARED]), tile_of_each(new uint32_t[omp_get_max_threads() * pairs * R]);
#pragma omp parallel if (outputs * columns * count > SHARE)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++)
            pair_rows(from + block * SHARED * columns, rows_of(block), columns, &all[block * pairs * SHARED]);
        uint32_t* w = &tile_of_each[omp_get_thread_num() * pairs * R];
        Line lines[SHARED];
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles_of(outputs); tile++) {
            tiles.halves ? unpack_pairs<true>(tiles, tile, columns, group, of_rows, w)
                         : unpack_pairs<false>(tiles, tile, columns, group, of_rows, w);
            for (int64_t block = 0; block < blocks; block++) {
                multiply_some_pairs<SHARED>(&all[block * pairs * SHARED], w, pairs, rows_of(block), lines);
                for (int64_t m = 0; m < rows_of(block); m++)
                    put(lines[m], tiles.height(tile), to + (block * SHARED + m) * outputs + tile * R);
            }
        }
    }
    stack[0] = y.given();
}

template <typename T>
void round_all(const T* x, int64_t groups, int64_t group, int8_t* numbers, float* unit) {
#pragma omp parallel for schedule(static) if (groups * group > SHARE)
    for (int64_t i = 0; i < groups; i++) round_group(x + i * group, group, numbers + i * group, unit + i);
}

// x (rows, columns), group -> int8 of the same shape, and float32 (rows, columns / group)
void round_groups(StableIValue* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]);
    auto group = (int64_t)stack[1];
    Tensor::check(group > 0);
    int64_t count = x.size(0), columns = x.size(1), groups = columns / group;
    Tensor::check(x.is(x.dtype(), count, groups * group));
    Tensor numbers({count, columns}, aoti_torch_dtype_int8()), unit({count, groups}, aoti_torch_dtype_float32());
    with_numbers(x, [&](auto* from) { round_all(from, count * groups, group, numbers.numbers<int8_t>(), unit.numbers<float>()); });
    stack[0] = numbers.given();
    stack[1] = unit.given();
}

// The rows of a matrix, which may lie apart, to `use` one by one, by all threads.
template <typename Use>
void with_rows(const Tensor& matrix, Use use) {
    int64_t rows = matrix.size(0), columns = matrix.size(1), apart = matrix.stride(0);
    Tensor::check(matrix.sizes().size() == 2 && (matrix.stride(1) == 1 || columns == 1));
    with_numbers(matrix, [&](auto* numbers) {
#pragma omp parallel for schedule(static) if (rows * columns > SHARE / 16)
        for (int64_t row = 0; row < rows; row++) use(row, numbers + row * apart);
    });
}

// weight (rows, columns), group, refinements -> numbers 0 ... 15, two in a byte, uint8 (rows, columns / 2), scales and zeros
// bfloat16 (rows, columns / group)
void round_int4(StableIValue* stack, uint64_t, uint64_t) {
    Tensor weight(stack[0]);
    auto group = (int64_t)stack[1], refinements = (int64_t)stack[2];
    int64_t rows = weight.size(0), columns = weight.size(1);
    Tensor::check(group > 0 && group <= MOST_GROUP && group % V == 0 && columns % group == 0);
    int64_t groups = columns / group;
    Tensor pairs({rows, columns / 2}, aoti_torch_dtype_uint8()), scales({rows, groups}, aoti_torch_dtype_bfloat16());
    Tensor zeros({rows, groups}, aoti_torch_dtype_bfloat16());
    auto* n = pairs.numbers<uint8_t>();
    auto *scale = scales.numbers<BFloat16>(), *zero = zeros.numbers<BFloat16>();
    with_rows(weight, [=](int64_t row, const auto* w) {
        round_to_int4(w, groups, group, refinements, n + row * columns / 2, scale + row * groups, zero + row * groups);
    });
    stack[0] = pairs.given();
    stack[1] = scales.given();
    stack[2] = zeros.given();
}

// weight (rows, columns), maxima float32: (1, rows), the largest sizes of its full rows, or (1, 0) if it has these -> int8 of the same
// shape, float32 (rows,)
void round_int8(StableIValue* stack, uint64_t, uint64_t) {
    Tensor weight(stack[0]), maxima(stack[1]);
    int64_t rows = weight.size(0), columns = weight.size(1);
    const float* given = scales_of(maxima, rows);
    Tensor numbers({rows, columns}, aoti_torch_dtype_int8()), scales({rows}, aoti_torch_dtype_float32());
    auto* n = numbers.numbers<int8_t>();
    auto* scale = scales.numbers<float>();
    with_rows(weight, [=](int64_t row, const auto* w) {
        scale[row] = std::max((given ? given[row] : largest_of(w, columns, 0)) / 127, std::numeric_limits<float>::min());
        round_to_int8(w, columns, scale[row], n + row * columns);
    });
    stack[0] = numbers.given();
    stack[1] = scales.given();
}

// weight (rows, columns), group -> int8 of the same shape, bfloat16 (rows, columns / group)
void round_w8a8(StableIValue* stack, uint64_t, uint64_t) {
    Tensor weight(stack[0]);
    auto group = (int64_t)stack[1];
    int64_t rows = weight.size(0), columns = weight.size(1);
    Tensor::check(group > 0 && columns % group == 0);
    int64_t groups = columns / group;
    Tensor numbers({rows, columns}, aoti_torch_dtype_int8()), scales({rows, groups}, aoti_torch_dtype_bfloat16());
    auto* n = numbers.numbers<int8_t>();
    auto* scale = scales.numbers<BFloat16>();
    with_rows(weight, [=](int64_t row, const auto* w) {
        for (int64_t g = 0; g < groups; g++) {
            BFloat16& its = scale[row * groups + g];
            its = BFloat16(std::max(largest_of(w + g * group, group, 0) / 127, 0x1p-100f));
            round_to_int8(w + g * group, group, (float)its, n + row * columns + g * group);
        }
    });
    stack[0] = numbers.given();
    stack[1] = scales.given();
}

// weight int8 (rows, columns), or uint8 (rows, columns / 2); scales, and for the latter zeros, bfloat16 (rows, groups), else any
// -> uint8 (tiles, bytes)
void to_tiles(StableIValue* stack, uint64_t, uint64_t) {
    Tensor weight(stack[0]), scales(stack[1]), zeros(stack[2]);
    bool halves = weight.dtype() == aoti_torch_dtype_uint8();
    int64_t rows = weight.size(0), bytes = weight.size(1), groups = scales.size(1);
    Tensor::check(groups > 0 && bytes % (4 * groups) == 0 && scales.is(aoti_torch_dtype_bfloat16(), rows, groups));
    Tensor::check(weight.is(halves ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8(), rows, bytes));
    Tensor::check(!halves || zeros.is(aoti_torch_dtype_bfloat16(), rows, groups));
    Tiles tiles(nullptr, rows, bytes * (halves ? 2 : 1), groups, halves);
    Tensor made({tiles_of(rows), tiles.bytes}, aoti_torch_dtype_uint8());
    const auto* from = weight.numbers<uint8_t>();
    const auto *scale = scales.numbers<BFloat16>(), *zero = halves ? zeros.numbers<BFloat16>() : nullptr;
    auto* to = made.numbers<uint8_t>();
#pragma omp parallel for schedule(static) if (rows * bytes > SHARE)
    for (int64_t tile = 0; tile < tiles_of(rows); tile++) {
        int64_t first = tile * R * groups;
        const BFloat16* of_groups[] = {scale + first, zero ? zero + first : nullptr};
        auto fill = halves ? fill_tile<true> : fill_tile<false>;
        fill(from + tile * R * bytes, of_groups, tiles.height(tile), groups, bytes / groups / 4, to + tile * tiles.bytes);
    }
    stack[0] = made.given();
}

// q (B, S, H, D), the queries of the last S positions; k, v (B, T, K, D), all bfloat16, with the numbers of a head side by side
// -> (B, S, H, D): each query sees the keys up to its own position.
void attend(StableIValue* stack, uint64_t, uint64_t) {
    Tensor q(stack[0]), k(stack[1]), v(stack[2]);
    int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), size = q.size(3), keys = k.size(1), kv_heads = k.size(2);
    using Sizes = std::vector<int64_t>;
    Sizes of_keys{batch, keys, kv_heads, size};
    for (auto* each : {&q, &k, &v}) Tensor::check(each->dtype() == aoti_torch_dtype_bfloat16() && each->stride(3) == 1);
    Tensor::check(q.sizes().size() == 4 && k.sizes() == of_keys && v.sizes() == of_keys && queries <= keys && kv_heads > 0 &&
                  heads % kv_heads == 0 && size > 0 && size % 16 == 0 && q.stride(1) % 2 == 0 && q.stride(2) % 2 == 0);
    Tensor out(Sizes{batch, queries, heads, size}, aoti_torch_dtype_bfloat16());
    auto strides = [](const Tensor& of) { return Strides{of.stride(0), of.stride(1), of.stride(2)}; };
    Prompt p{nullptr, nullptr, nullptr, strides(q), strides(k), strides(v), queries, keys, heads, kv_heads, size, nullptr};
    std::vector<uint32_t> room(kv_heads * p.room());
    for (int64_t row = 0; row < batch; row++) {
        p.q = q.numbers<BFloat16>() + row * p.of_q.row, p.k = k.numbers<BFloat16>() + row * p.of_k.row;
        p.v = v.numbers<BFloat16>() + row * p.of_v.row, p.out = out.numbers<BFloat16>() + row * queries * heads * size;
        attend_prompt(p, room.data());
    }
    stack[0] = out.given();
}

// plan int64 (1, numbers): the model, as `Model` reads it; tokens, positions, slots int64 (1, rows) -> float32 (rows, rows of the
// output of all processes)
void step(StableIValue* stack, uint64_t, uint64_t) {
    Tensor plan(stack[0]), tokens(stack[1]), positions(stack[2]), slots(stack[3]);
    int64_t rows = tokens.size(1);
    Tensor::check(plan.is(aoti_torch_dtype_int64(), 1, plan.size(1)) && rows > 0 && rows <= MOST_ROWS);
    for (auto* given : {&tokens, &positions, &slots}) Tensor::check(given->is(aoti_torch_dtype_int64(), 1, rows));
    Model model(plan.numbers<int64_t>());
    Asked asked{rows, tokens.numbers<int64_t>(), positions.numbers<int64_t>(), slots.numbers<int64_t>()};
    auto below = [&](const int64_t* numbers, int64_t end) {
        return std::all_of(numbers, numbers + rows, [=](int64_t n) { return n >= 0 && n < end; });
    };
    Tensor::check(below(asked.tokens, model.vocabulary) && below(asked.positions, model.positions) && below(asked.slots, model.slots));
    Tensor logits({rows, model.output.rows * model.ranks}, aoti_torch_dtype_float32());
    model.type == BFLOAT16 ? step<BFloat16>(model, asked, logits.numbers<float>()) : step<float>(model, asked, logits.numbers<float>());
    stack[0] = logits.given();
}

// Makes the operators known when the file is loaded. The handles stay: without them the operators would be forgotten.
// Nothing is thrown, which would end the process here: whoever loads the file finds out whether they are known.
struct Operators {
    TorchLibraryHandle names = nullptr, functions = nullptr;
    Operators() {
        bool named =
            !aoti_torch_library_init_def("llama_cpu", __FILE__, __LINE__, &names) &&
            !aoti_torch_library_def(names, "round_groups(Tensor x, int group) -> (Tensor, Tensor)") &&
            !aoti_torch_library_def(
                names, "product(Tensor numbers, Tensor unit, Tensor weight, int outputs, int bits, int type) -> Tensor") &&
            !aoti_torch_library_def(
                names, "exact_product(Tensor x, Tensor weight, Tensor scales, int outputs, int bits, int group) -> Tensor") &&
            !aoti_torch_library_def(
                names, "bfloat16_product(Tensor x, Tensor weight, Tensor scales, int outputs, int bits, int group) -> Tensor") &&
            !aoti_torch_library_def(
                names, "unpack_(Tensor(a!) to, Tensor weight, Tensor scales, int bits, int group) -> ()") &&
            !aoti_torch_library_def(names, "round_int8(Tensor weight, Tensor maxima) -> (Tensor, Tensor)") &&
            !aoti_torch_library_def(names, "round_w8a8(Tensor weight, int group) -> (Tensor, Tensor)") &&
            !aoti_torch_library_def(names, "round_int4(Tensor weight, int group, int refinements) -> (Tensor, Tensor, Tensor)") &&
            !aoti_torch_library_def(names, "to_tiles(Tensor weight, Tensor scales, Tensor zeros) -> Tensor") &&
            !aoti_torch_library_def(names, "attend(Tensor q, Tensor k, Tensor v) -> Tensor") &&
            !aoti_torch_library_def(names, "step(Tensor plan, Tensor tokens, Tensor positions, Tensor slots) -> Tensor") &&
            !aoti_torch_library_init_impl("llama_cpu", "CPU", __FILE__, __LINE__, &functions);
        if (!named) return;
        aoti_torch_library_impl(functions, "round_groups", &round_groups);
        aoti_torch_library_impl(functions, "product", &product);
        aoti_torch_library_impl(functions, "exact_product", &exact_product);
        aoti_torch_library_impl(functions, "bfloat16_product", &bfloat16_product);
        aoti_torch_library_impl(functions, "unpack_", &unpack_into);
        aoti_torch_library_impl(functions, "round_int8", &round_int8);
        aoti_torch_library_impl(functions, "round_w8a8", &round_w8a8);
        aoti_torch_library_impl(functions, "round_int4", &round_int4);
        aoti_torch_library_impl(functions, "to_tiles", &to_tiles);
        aoti_torch_library_impl(functions, "attend", &attend);
        aoti_torch_library_impl(functions, "step", &step);
    }
} operators;

}  // namespace
