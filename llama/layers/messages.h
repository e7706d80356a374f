// How an operator speaks with the other processes that share its model: functions of shared_memory.cpp, which is a library of its
// own and gives their address as a number. They throw what the operators there throw.
#pragma once
#include <cstdint>

namespace {

struct Messages {
    void (*sum)(int64_t room, float* x, int64_t count);  // the sum of all processes' x, in x
    // x (rows, width) of each process -> y (rows, width * processes)
    void (*gather)(int64_t room, const float* x, float* y, int64_t rows, int64_t width);
};

}  // namespace
