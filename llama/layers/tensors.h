// What the files of operators here have in common: torch's tensors, and numbers of 16 bits.
//
// Of torch it uses only the C functions that stay the same from release to release: their header is read in a tenth of the time
// that the others take.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace {

inline float as_float(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

inline uint32_t as_bits(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    return bits;
}

struct BFloat16 {
    uint16_t bits;
    BFloat16() = default;
    explicit operator float() const { return as_float((uint32_t)bits << 16); }
    explicit BFloat16(float number) {
        uint32_t n = as_bits(number);
        bits = number != number ? 0x7fc0 : (uint16_t)((n + 0x7fff + (n >> 16 & 1)) >> 16);
    }
};

#ifdef __FLT16_MAX__
using Float16 = _Float16;
#else  // GCC before 12, for one
struct Float16 {
    uint16_t bits;
    Float16() = default;
    explicit operator float() const {
        uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
        if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
        // The exponent is moved by a product, which is right for subnormal numbers too.
        float size = as_float(rest << 13) * as_float((254 - 15) << 23);
        return as_float(sign | as_bits(size));
    }
    explicit Float16(float number) {
        uint32_t sign = as_bits(number) & 0x80000000, size = as_bits(number) ^ sign;
        if (size > 0x7f800000) {
            bits = 0x7e00;
        } else if (size >= 0x477ff000) {  // would be rounded up to 65536
            bits = 0x7c00;
        } else if (size < 0x38800000) {  // below the normal numbers: steps of 2^-24, which are those of a float from 0.5 on
            bits = (uint16_t)(as_bits(as_float(size) + 0.5f) - 0x3f000000);
        } else {
            bits = (uint16_t)((size - ((127 - 15) << 23) + 0xfff + (size >> 13 & 1)) >> 13);
        }
        bits |= (uint16_t)(sign >> 16);
    }
};
#endif

// A tensor, which ends here.
class Tensor {
   public:
    explicit Tensor(StableIValue value) : handle((AtenTensorHandle)value) {}
    Tensor(const std::vector<int64_t>& sizes, int32_t dtype) {
        auto dimensions = (int64_t)sizes.size();
        std::vector<int64_t> strides(dimensions, 1);
        for (int64_t d = dimensions - 2; d >= 0; d--) strides[d] = strides[d + 1] * std::max<int64_t>(1, sizes[d + 1]);
        check(!aoti_torch_empty_strided(dimensions, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() {
        if (handle) aoti_torch_delete_tensor_object(handle);
    }
    StableIValue given() {  // it ends elsewhere
        auto value = (StableIValue)handle;
        handle = nullptr;
        return value;
    }
    template <typename T>
    T* numbers() const {
        void* p;
        check(!aoti_torch_get_data_ptr(handle, &p));
        return (T*)p;
    }
    int64_t size(int64_t dimension) const {
        int64_t size;
        check(!aoti_torch_get_size(handle, dimension, &size));
        return size;
    }
    int64_t stride(int64_t dimension) const {
        int64_t stride;
        check(!aoti_torch_get_stride(handle, dimension, &stride));
        return stride;
    }
    std::vector<int64_t> sizes() const {
        int64_t dimensions;
        check(!aoti_torch_get_dim(handle, &dimensions));
        std::vector<int64_t> all(dimensions);
        for (int64_t d = 0; d < dimensions; d++) all[d] = size(d);
        return all;
    }
    int32_t dtype() const {
        int32_t dtype;
        check(!aoti_torch_get_dtype(handle, &dtype));
        return dtype;
    }
    // Whether its numbers lie in memory one after the other, in order.
    bool in_order() const {
        bool found;
        check(!aoti_torch_is_contiguous(handle, &found));
        return found;
    }
    // Whether it is a matrix of this kind, row by row in memory.
    bool is(int32_t wanted, int64_t rows, int64_t columns) const {
        return in_order() && dtype() == wanted && sizes() == std::vector<int64_t>{rows, columns};
    }
    static void check(bool holds) {
        if (!holds) throw std::runtime_error("tensors of other kinds, or that do not fit together");
    }

   private:
    AtenTensorHandle handle = nullptr;
};

}  // namespace
