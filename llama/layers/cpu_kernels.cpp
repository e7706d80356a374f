// Products of 8-bit activations with 8-bit and 4-bit weights, for the processor that compiles this file (-march=native).
// The plain form of each is in one_digit.py, which has the formulas, and gives the same bits.
//
// Weights lie in tiles of R rows, and in the order in which a product reads them. A tile has its groups of columns one after
// the other, and a group has
//     8 bits:  group / 4 times R x 4 bytes, the weights of four columns plus 128
//     4 bits:  group / 8 times R x 4 bytes, four columns in the lower halves and the next four in the upper ones
//     R scales in bfloat16;  4 bits: R zeros in bfloat16
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tensors.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t R = 32;              // rows of a tile
constexpr int64_t SHARE = 256 * 1024;  // products of bytes that are worth a thread

// Vectors of V numbers. `dot` adds four products to each: those of bytes without a sign and of bytes with one.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int V = 16, M = 6;  // M: most rows of activations that share what was loaded
using Ints = __m512i;
using Floats = __m512;
inline Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Ints repeat(int32_t n) { return _mm512_set1_epi32(n); }
inline Floats repeat(float n) { return _mm512_set1_ps(n); }
inline Ints lower(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Ints upper(Ints v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline Ints dot(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints dot_halves(Ints sum, Ints w, Ints x) { return dot(sum, w, x); }
constexpr int OFFSET = 128;  // what `dot` counts each weight of 8 bits too high
inline Floats from_ints(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats from_bfloat16(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int V = 8, M = 2;
using Ints = __m256i;
using Floats = __m256;
inline Ints load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Ints repeat(int32_t n) { return _mm256_set1_epi32(n); }
inline Floats repeat(float n) { return _mm256_set1_ps(n); }
inline Ints lower(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Ints upper(Ints v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
#if defined(__AVXVNNI__)
inline Ints dot(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline Ints dot_halves(Ints sum, Ints w, Ints x) { return dot(sum, w, x); }
constexpr int OFFSET = 128;
#else
inline Ints add_fours(Ints sum, Ints pairs) { return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
// Pairs are added in 16 bits, in which 2 x 127 x 127 has room, but 2 x 255 x 127 has not.
inline Ints dot(Ints sum, Ints w, Ints x) {
    Ints n = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    return add_fours(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(n, x)));
}
inline Ints dot_halves(Ints sum, Ints w, Ints x) { return add_fours(sum, _mm256_maddubs_epi16(w, x)); }
constexpr int OFFSET = 0;
#endif
inline Floats from_ints(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats from_bfloat16(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
#else
constexpr int V = 8, M = 2;
struct Ints { int32_t at[V]; };
struct Floats { float at[V]; };
template <typename To, typename Make>
inline To each(Make make) {
    To made;
    for (int i = 0; i < V; i++) made.at[i] = make(i);
    return made;
}
inline Ints load(const uint8_t* p) { Ints v; std::memcpy(&v, p, sizeof v); return v; }
inline Ints repeat(int32_t n) { return each<Ints>([=](int) { return n; }); }
inline Floats repeat(float n) { return each<Floats>([=](int) { return n; }); }
inline Ints lower(const Ints& v) { return each<Ints>([&](int i) { return v.at[i] & 0x0f0f0f0f; }); }
inline Ints upper(const Ints& v) { return each<Ints>([&](int i) { return (v.at[i] >> 4) & 0x0f0f0f0f; }); }
inline Ints dot(const Ints& sum, const Ints& w, const Ints& x) {
    const auto* a = (const uint8_t*)&w;
    const auto* b = (const int8_t*)&x;
    return each<Ints>([&](int i) {
        int32_t four = 0;
        for (int j = 4 * i; j < 4 * i + 4; j++) four += a[j] * b[j];
        return sum.at[i] + four;
    });
}
inline Ints dot_halves(const Ints& sum, const Ints& w, const Ints& x) { return dot(sum, w, x); }
constexpr int OFFSET = 128;
inline Floats from_ints(const Ints& v) { return each<Floats>([&](int i) { return (float)v.at[i]; }); }
inline Floats from_bfloat16(const uint8_t* p) {
    return each<Floats>([=](int i) {
        uint16_t half;
        std::memcpy(&half, p + 2 * i, 2);
        uint32_t bits = (uint32_t)half << 16;
        float number;
        std::memcpy(&number, &bits, 4);
        return number;
    });
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return std::fmaf(a.at[i], b.at[i], c.at[i]); });
}
inline Floats times(const Floats& a, const Floats& b) { return each<Floats>([&](int i) { return a.at[i] * b.at[i]; }); }
inline void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
inline void prefetch(const uint8_t*) {}
#endif

constexpr int W = R / V;  // vectors that hold a number for each row of a tile

struct Product {
    const int8_t* x;      // (rows of activations, columns)
    const float* unit;    // (rows of activations, groups)
    const int32_t* sums;  // the same, of x
    int64_t columns, group, groups;
    const uint8_t* weight;  // tiles
    int64_t tile_bytes;
    void* y;  // (rows of activations, rows of weights)
    int64_t outputs;
    int64_t type;
};

inline int32_t four(const int8_t* x) {
    int32_t n;
    std::memcpy(&n, x, 4);
    return n;
}

enum { FLOAT32, BFLOAT16, FLOAT16 };  // types of activations

template <typename T>
inline void put(const float* from, void* y, int64_t at, int64_t count) {
    T* to = (T*)y + at;
    for (int64_t i = 0; i < count; i++) to[i] = (T)from[i];
}

// One tile times `rows` rows of activations from `first` on.
template <bool HALVES, int rows>
void multiply(const Product& p, int64_t tile, int64_t first) {
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
                if (rows == 1) prefetch(w + 4 * V * v + 2048);
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
    int64_t count = std::min(R, p.outputs - tile * R);
    for (int m = 0; m < rows; m++) {
        float line[R];
        for (int v = 0; v < W; v++) store(line + V * v, total[m][v]);
        int64_t at = (first + m) * p.outputs + tile * R;
        if (p.type == BFLOAT16) put<BFloat16>(line, p.y, at, count);
        else if (p.type == FLOAT16) put<_Float16>(line, p.y, at, count);
        else put<float>(line, p.y, at, count);
    }
}

template <bool HALVES, int rows = M>
void multiply_last(const Product& p, int64_t tile, int64_t first, int64_t count) {
    if (count == rows) multiply<HALVES, rows>(p, tile, first);
    else if constexpr (rows > 1) multiply_last<HALVES, rows - 1>(p, tile, first, count);
}

template <bool HALVES>
void multiply_all(const Product& p, int64_t count) {
    int64_t tiles = (p.outputs + R - 1) / R;
#pragma omp parallel for schedule(static) if (tiles * R * p.columns * count > SHARE)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t m = 0;
        for (; m + M <= count; m += M) multiply<HALVES, M>(p, tile, m);
        if (m < count) multiply_last<HALVES>(p, tile, m, count - m);
    }
}

int64_t type_of(int32_t dtype) {
    if (dtype == aoti_torch_dtype_bfloat16()) return BFLOAT16;
    if (dtype == aoti_torch_dtype_float16()) return FLOAT16;
    Tensor::check(dtype == aoti_torch_dtype_float32());
    return FLOAT32;
}

// numbers int8 (rows, columns), unit float32 (rows, groups), weight uint8 (tiles, bytes), outputs, bits, type -> (rows, outputs)
void product(StableIValue* stack, uint64_t, uint64_t) {
    Tensor numbers(stack[0]), unit(stack[1]), weight(stack[2]);
    auto outputs = (int64_t)stack[3], bits = (int64_t)stack[4], type = (int64_t)stack[5];
    int64_t count = numbers.size(0), columns = numbers.size(1), groups = std::max<int64_t>(1, unit.size(1));
    int64_t group = columns / groups;
    int64_t tile_bytes = R * (columns * bits / 8 + groups * (bits == 4 ? 4 : 2));
    Tensor::check((bits == 8 || bits == 4) && group % 8 == 0 && groups * group == columns &&
                  numbers.is(aoti_torch_dtype_int8(), count, columns) && unit.is(aoti_torch_dtype_float32(), count, groups) &&
                  weight.is(aoti_torch_dtype_uint8(), (outputs + R - 1) / R, tile_bytes));
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
    Product p{x, unit.numbers<float>(), sums.data(), columns, group, groups, weight.numbers<uint8_t>(), tile_bytes,
              y.numbers<void>(), outputs, type};
    bits == 4 ? multiply_all<true>(p, count) : multiply_all<false>(p, count);
    stack[0] = y.given();
}

template <typename T>
void round_group(const T* x, int64_t columns, int8_t* numbers, float* unit) {
    // Bits of sizes are in the sizes' order, and those of NaN are above all.
    uint32_t top = 0;
    for (int64_t i = 0; i < columns; i++) top = std::max(top, as_bits((float)x[i]) & 0x7fffffff);
    float largest = as_float(top);
    if (largest < 1e-30f) largest = 1e-30f;
    *unit = largest * (float)(1.0 / 127);
    if (top >= 0x7f800000) {  // infinity and NaN go from here into the result
        std::memset(numbers, 0, columns);
        return;
    }
    float steps = 1 / largest * 127;  // as torch divides a number by a tensor
    for (int64_t i = 0; i < columns; i++) numbers[i] = (int8_t)(int32_t)std::nearbyintf((float)x[i] * steps);
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
    else if (type == FLOAT16) all(x.numbers<_Float16>());
    else all(x.numbers<float>());
    stack[0] = numbers.given();
    stack[1] = unit.given();
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
            !aoti_torch_library_init_impl("llama_cpu", "CPU", __FILE__, __LINE__, &functions);
        if (!named) return;
        aoti_torch_library_impl(functions, "round_groups", &round_groups);
        aoti_torch_library_impl(functions, "product", &product);
    }
} operators;

}  // namespace
