// Operators for CPUs: products with 8-bit activations, and the decode step. Compiled for the processor that it runs on
// (-march=native).
#include <vector>

#include "cpu_step.h"
#include "tensors.h"

namespace {

enum { FLOAT32, BFLOAT16, FLOAT16 };  // types of activations

int64_t type_of(int32_t dtype) {
    if (dtype == aoti_torch_dtype_bfloat16()) return BFLOAT16;
    if (dtype == aoti_torch_dtype_float16()) return FLOAT16;
    Tensor::check(dtype == aoti_torch_dtype_float32());
    return FLOAT32;
}

template <bool HALVES, typename T>
void multiply_all(const Product& p, int64_t count, int64_t outputs, T* y) {
#pragma omp parallel for schedule(static) if (tiles_of(outputs) * R * p.columns * count > SHARE)
    for (int64_t tile = 0; tile < tiles_of(outputs); tile++) {
        for (int64_t first = 0; first < count; first += M) {
            Line lines[M];
            int64_t rows = std::min<int64_t>(M, count - first);
            multiply_tile<HALVES>(p, tile, first, rows, lines);
            for (int64_t m = 0; m < rows; m++)
                for (int64_t i = tile * R; i < std::min(outputs, (tile + 1) * R); i++)
                    y[(first + m) * outputs + i] = (T)lines[m][i - tile * R];
        }
    }
}

// numbers int8 (rows, columns), unit float32 (rows, groups), weight uint8 (tiles, bytes), outputs, bits, type -> (rows, outputs)
void product(StableIValue* stack, uint64_t, uint64_t) {
    Tensor numbers(stack[0]), unit(stack[1]), weight(stack[2]);
    auto outputs = (int64_t)stack[3], bits = (int64_t)stack[4], type = (int64_t)stack[5];
    int64_t count = numbers.size(0), columns = numbers.size(1), groups = std::max<int64_t>(1, unit.size(1));
    int64_t group = columns / groups;
    int64_t bytes = tile_bytes(columns, groups, bits);
    Tensor::check((bits == 8 || bits == 4) && group % 8 == 0 && groups * group == columns &&
                  numbers.is(aoti_torch_dtype_int8(), count, columns) && unit.is(aoti_torch_dtype_float32(), count, groups) &&
                  weight.is(aoti_torch_dtype_uint8(), tiles_of(outputs), bytes));
    int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
    Tensor::check(type >= 0 && type < 3);
    Tensor y({count, outputs}, dtypes[type]);
    const auto* x = numbers.numbers<int8_t>();
    std::vector<int32_t> sums(count * groups);
    for (int64_t i = 0; i < count * groups; i++) {
        int32_t sum = 0;
        for (int64_t j = 0; j < group; j++) sum += x[i * group + j];
        sums[i] = sum;
    }
    Product p{x, unit.numbers<float>(), sums.data(), columns, group, groups, weight.numbers<uint8_t>(), bytes};
    auto all = [&](auto* to) { bits == 4 ? multiply_all<true>(p, count, outputs, to) : multiply_all<false>(p, count, outputs, to); };
    if (type == BFLOAT16) all(y.numbers<BFloat16>());
    else if (type == FLOAT16) all(y.numbers<Float16>());
    else all(y.numbers<float>());
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
    auto all = [&](auto* from) { round_all(from, count * groups, group, numbers.numbers<int8_t>(), unit.numbers<float>()); };
    int64_t type = type_of(x.dtype());
    if (type == BFLOAT16) all(x.numbers<BFloat16>());
    else if (type == FLOAT16) all(x.numbers<Float16>());
    else all(x.numbers<float>());
    stack[0] = numbers.given();
    stack[1] = unit.given();
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
            !aoti_torch_library_def(names, "step(Tensor plan, Tensor tokens, Tensor positions, Tensor slots) -> Tensor") &&
            !aoti_torch_library_init_impl("llama_cpu", "CPU", __FILE__, __LINE__, &functions);
        if (!named) return;
        aoti_torch_library_impl(functions, "round_groups", &round_groups);
        aoti_torch_library_impl(functions, "product", &product);
        aoti_torch_library_impl(functions, "step", &step);
    }
} operators;

}  // namespace
