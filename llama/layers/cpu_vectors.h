// Numbers and vectors for `cpu_products.h` and `cpu_step.h`: AVX-512 with VNNI, AVX2, or plain C++, as the compiler is told
// to use them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "tensors.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t AHEAD = 4096;  // bytes ahead of a reader that memory is asked for: by itself it is read at half the speed

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
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline float total(Floats v) { return _mm512_reduce_add_ps(v); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
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
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline float total(Floats v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
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
        return as_float((uint32_t)half << 16);
    });
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return std::fmaf(a.at[i], b.at[i], c.at[i]); });
}
inline Floats times(const Floats& a, const Floats& b) { return each<Floats>([&](int i) { return a.at[i] * b.at[i]; }); }
inline Floats load_floats(const float* p) { return each<Floats>([=](int i) { return p[i]; }); }
inline float total(const Floats& v) {
    float sum = 0;
    for (float number : v.at) sum += number;
    return sum;
}
inline void store(float* p, const Floats& v) { std::memcpy(p, &v, sizeof v); }
inline void prefetch(const uint8_t*) {}
#endif

// 64 bytes, written past the caches; `streamed`: those of this thread are there for the others.
#if defined(__AVX512F__)
inline void stream(const void* from, void* to) { _mm512_stream_si512((__m512i*)to, _mm512_load_si512(from)); }
inline void streamed() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(const void* from, void* to) {
    for (int i = 0; i < 2; i++) _mm256_stream_si256((__m256i*)to + i, _mm256_load_si256((const __m256i*)from + i));
}
inline void streamed() { _mm_sfence(); }
#else
inline void stream(const void* from, void* to) { std::memcpy(to, from, 64); }
inline void streamed() {}
#endif

// sum + the products of pairs of bfloat16, one pair in each place.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline Floats add_pairs(Floats sum, Ints a, Ints b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline Floats upper_half(Ints v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000))); }
inline Floats lower_half(Ints v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
#elif defined(__AVX2__) && defined(__FMA__)
inline Floats upper_half(Ints v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff0000))); }
inline Floats lower_half(Ints v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
#else
inline Floats upper_half(const Ints& v) { return each<Floats>([&](int i) { return as_float((uint32_t)v.at[i] & 0xffff0000); }); }
inline Floats lower_half(const Ints& v) { return each<Floats>([&](int i) { return as_float((uint32_t)v.at[i] << 16); }); }
#endif
#if !(defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__))
inline Floats add_pairs(const Floats& sum, const Ints& a, const Ints& b) {
    return fma(upper_half(a), upper_half(b), fma(lower_half(a), lower_half(b), sum));
}
#endif

inline Floats load_floats(const BFloat16* p) { return from_bfloat16((const uint8_t*)p); }

// sum + the products of 2 V numbers, two to each place.
template <typename T>
inline Floats add_products(const Floats& sum, const T* a, const T* b) {
    return fma(load_floats(a + V), load_floats(b + V), fma(load_floats(a), load_floats(b), sum));
}
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline Floats add_products(const Floats& sum, const BFloat16* a, const BFloat16* b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

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

}  // namespace
