// Sums and gathers of the processes of one machine, over memory that they share.
//
// A group's file holds a line for each rank, and two buffers for each. A message goes through them in turns. In a turn each rank
// writes into its buffer, counts up its turn, waits until all have counted, and reads the others' buffers. It writes into the
// same buffer again two turns later: by then all have counted the turn between, so they have read. Nothing else keeps them apart.
//
// A sum's numbers are added in rank order, those of 16 bits in float32, and rounded once: all ranks get the same bits, whatever
// the size of the message. In a small message each rank adds all numbers; of a larger one each adds a slice, and a second turn
// brings the sums to the others.
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>

#include "messages.h"
#include "tensors.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t SMALL = 32 * 1024;  // most bytes of a message that each rank adds alone
// A rank that waits for one on another core holds its own for so long before it sleeps. It sleeps at once if the other one was
// last on its own core: that one cannot come before.
constexpr auto SPIN = std::chrono::microseconds(100);
constexpr long LOOK = 50'000'000;     // nanoseconds between two looks of a rank that sleeps at whether the other one lives

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// What a rank says to the others. A new file is full of zeros, which is right for all of it.
struct alignas(256) Line {
    std::atomic<uint32_t> turn;      // how many turns it has begun to read
    std::atomic<uint32_t> sleepers;  // how many ranks sleep until it counts
    std::atomic<uint32_t> left;      // whether it has left the group
    std::atomic<int32_t> core;       // where it ran when it counted
    std::atomic<uint64_t> message[2];  // the kind and size of its message in the last two turns
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

// Numbers of 16 bits are added as float32, and whole ones without a sign, so that they may overflow.
template <typename T> struct Sum { using type = T; };
template <> struct Sum<BFloat16> { using type = float; };
template <> struct Sum<Float16> { using type = float; };

// Written so, the compiler makes vectors of it.
template <typename From, typename To> inline void set(To& to, From from) { to = (To)from; }
inline void set(BFloat16& to, float from) { to.bits = BFloat16(from).bits; }

template <typename T>
void add(const std::vector<const T*>& from, T* to, int64_t count) {
    constexpr int64_t BLOCK = 1024;
    typename Sum<T>::type sums[BLOCK];
    for (int64_t first = 0; first < count; first += BLOCK) {
        int64_t n = std::min(BLOCK, count - first);
        const T* x = from[0] + first;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) sums[i] = (typename Sum<T>::type)x[i];
        for (size_t r = 1; r < from.size(); r++) {
            x = from[r] + first;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) sums[i] += (typename Sum<T>::type)x[i];
        }
        T* y = to + first;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) set(y[i], sums[i]);
    }
}

// This process's part in a group.
class Room {
   public:
    const int ranks, rank;

    // ids: of the ranks' processes, this one's among them. limit: seconds that it waits for a rank that lives.
    Room(const int64_t* ids, int ranks, int rank, int memory, int64_t limit)
        : Room(ranks, rank, limit) {  // from here on the destructor runs, whatever is thrown
        struct stat status;
        Tensor::check(rank >= 0 && rank < ranks && !fstat(memory, &status));
        bytes = status.st_size;
        piece = ((bytes - ranks * (int64_t)sizeof(Line)) / ranks / 2) & -64;
        Tensor::check(piece >= SMALL);
        for (int r = 0; r < ranks; r++) {
            lives.push_back(r == rank ? -1 : (int)syscall(SYS_pidfd_open, (pid_t)ids[r], 0));
            if (r != rank && lives[r] < 0) throw std::runtime_error("this system does not tell when a process ends");
        }
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
        if (at == MAP_FAILED) throw std::runtime_error("there is no room to map the memory that the processes share");
        lines = (Line*)at;
    }
    Room(const Room&) = delete;
    ~Room() {
        for (int descriptor : lives)
            if (descriptor >= 0) close(descriptor);
        if (lines) munmap(lines, bytes);
    }

    // The others need not wait for this rank any more.
    void leave() {
        if (process != getpid()) return;  // a forked process, whose parent stays
        lines[rank].left.store(1);
        wake();
    }

    template <typename T>
    void sum(const T* x, T* y, int64_t count) {
        auto entered = enter();
        std::vector<const T*> from(ranks);
        auto add_from = [&](const T* mine, int64_t at, T* to, int64_t n) {
            for (int r = 0; r < ranks; r++) from[r] = r == rank ? mine : (const T*)read(r) + at;
            add(from, to, n);
        };
        uint64_t message = kind<T>() + (uint64_t)count * 16;
        if (count * (int64_t)sizeof(T) <= SMALL) {
            std::memcpy(write(), x, count * sizeof(T));
            meet(message);
            add_from(x, 0, y, count);
            return;
        }
        int64_t most = piece / (int64_t)sizeof(T);
        for (int64_t n; count > 0; x += n, y += n, count -= n) {
            n = std::min(most, count);
            auto cut = [&](int r) { return n * r / ranks; };  // where a rank's slice begins
            T* to = (T*)write();
            std::memcpy(to, x, cut(rank) * sizeof(T));
            std::memcpy(to + cut(rank + 1), x + cut(rank + 1), (n - cut(rank + 1)) * sizeof(T));
            meet(message);
            int64_t mine = cut(rank + 1) - cut(rank);
            add_from(x + cut(rank), cut(rank), y + cut(rank), mine);
            std::memcpy(write(), y + cut(rank), mine * sizeof(T));
            meet(message);
            for (int r = 0; r < ranks; r++)
                if (r != rank) std::memcpy(y + cut(r), read(r), (cut(r + 1) - cut(r)) * sizeof(T));
        }
    }

    // x: rows of `width` bytes. y: each row of all ranks, side by side.
    void gather(const char* x, char* y, int64_t rows, int64_t width) {
        auto entered = enter();
        int64_t total = rows * width;
        uint64_t message = 15 + (uint64_t)total * 16;
        for (int64_t first = 0; first < total; first += piece) {
            int64_t n = std::min(piece, total - first);
            std::memcpy(write(), x + first, n);
            meet(message);
            for (int r = 0; r < ranks; r++) {
                const char* from = r == rank ? x + first : read(r);
                for (int64_t at = first, most; at < first + n; from += most, at += most) {
                    most = std::min(width - at % width, first + n - at);
                    std::memcpy(y + (at / width * ranks + r) * width + at % width, from, most);
                }
            }
        }
    }

   private:
    Room(int ranks, int rank, int64_t limit) : ranks(ranks), rank(rank), process(getpid()), limit(limit) {}

    pid_t process;
    std::chrono::seconds limit;
    int64_t bytes, piece;
    Line* lines = nullptr;
    std::vector<int> lives;  // file descriptors that say when a process has ended
    std::mutex one;
    bool failed = false;

    template <typename T>
    static uint64_t kind() {
        return (std::is_integral_v<T> ? 8 : 0) + (std::is_same_v<T, BFloat16> ? 1 : sizeof(T) == 2 ? 2 : sizeof(T) == 4 ? 3 : 4);
    }

    uint32_t turn() const { return lines[rank].turn.load(std::memory_order_relaxed); }
    char* buffer(int r, uint32_t turn) const { return (char*)(lines + ranks) + (2 * r + (turn & 1)) * piece; }
    char* write() const { return buffer(rank, turn() + 1); }
    const char* read(int r) const { return buffer(r, turn()); }

    std::unique_lock<std::mutex> enter() {
        if (process != getpid()) throw std::runtime_error("a forked process has no part in its parent's group");
        std::unique_lock<std::mutex> entered(one);
        if (failed || lines[rank].left.load()) throw std::runtime_error("connection closed by peer: this group has ended");
        return entered;
    }

    [[noreturn]] void fail(const std::string& why) {
        failed = true;
        leave();
        throw std::runtime_error(why);
    }

    void wake() { syscall(SYS_futex, &lines[rank].turn, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0); }

    void meet(uint64_t message) {
        uint32_t now = turn() + 1;
        lines[rank].message[now & 1].store(message, std::memory_order_relaxed);
        lines[rank].core.store(sched_getcpu(), std::memory_order_relaxed);
        lines[rank].turn.store(now);
        if (lines[rank].sleepers.load()) wake();
        for (int r = 0; r < ranks; r++) {
            if (r == rank) continue;
            if (!has_come(r, now)) wait_for(r, now);
            if (lines[r].message[now & 1].load(std::memory_order_relaxed) != message)
                fail("ranks " + std::to_string(rank) + " and " + std::to_string(r) + " of a group met with different messages");
        }
    }

    bool has_come(int r, uint32_t now) const { return (int32_t)(lines[r].turn.load(std::memory_order_acquire) - now) >= 0; }

    int one_that_ended() const {
        for (int r = 0; r < ranks; r++) {
            pollfd ends{lives[r], POLLIN, 0};
            if (r != rank && (lines[r].left.load() || poll(&ends, 1, 0) > 0)) return r;
        }
        return -1;
    }

    void wait_for(int r, uint32_t now) {
        auto began = Clock::now(), time = began;
        while (time - began < SPIN && lines[r].core.load(std::memory_order_relaxed) != sched_getcpu()) {
            for (int i = 0; i < 16; i++) {
                if (has_come(r, now)) return;
                pause();
            }
            time = Clock::now();
        }
        Line& line = lines[r];
        for (; time - began < limit; time = Clock::now()) {
            int ended = one_that_ended();
            if (has_come(r, now)) return;  // it may have come before it ended
            // No message is whole without all ranks. This one may wait elsewhere for the one that ended.
            if (ended >= 0) fail("connection closed by peer: rank " + std::to_string(ended) + " of the group has ended");
            line.sleepers.fetch_add(1);
            uint32_t seen = line.turn.load();
            timespec patience{0, LOOK};
            if (!has_come(r, now)) syscall(SYS_futex, &line.turn, FUTEX_WAIT, seen, &patience, nullptr, 0);
            line.sleepers.fetch_sub(1);
            if (has_come(r, now)) return;
        }
        fail("timed out after " + std::to_string(limit.count()) + " s of waiting for rank " + std::to_string(r) + " of the group");
    }
};

// Every room of this process, by its number. Those that were left stay, as the memory of the other ranks may.
std::vector<std::shared_ptr<Room>> rooms;
std::mutex guard;

std::shared_ptr<Room> room_of(int64_t number) {
    std::lock_guard<std::mutex> guarded(guard);
    Tensor::check((size_t)number < rooms.size());
    if (!rooms[number]) throw std::runtime_error("connection closed by peer: this group has ended");
    return rooms[number];
}

std::shared_ptr<Room> room_of(const Tensor& number) {
    Tensor::check(number.dtype() == aoti_torch_dtype_int64());
    return room_of(*number.numbers<int64_t>());
}

// processes int64 (ranks,), rank, memory, limit -> room int64 ()
void join(StableIValue* stack, uint64_t, uint64_t) {
    Tensor processes(stack[0]), number({}, aoti_torch_dtype_int64());
    Tensor::check(processes.in_order() && processes.dtype() == aoti_torch_dtype_int64());
    auto room = std::make_shared<Room>(
        processes.numbers<int64_t>(), (int)processes.size(0), (int)stack[1], (int)stack[2], (int64_t)stack[3]);
    std::lock_guard<std::mutex> guarded(guard);
    *number.numbers<int64_t>() = (int64_t)rooms.size();
    rooms.push_back(room);
    stack[0] = number.given();
}

// room ->
void leave(StableIValue* stack, uint64_t, uint64_t) {
    Tensor number(stack[0]);
    auto room = room_of(number);
    room->leave();
    std::lock_guard<std::mutex> guarded(guard);
    rooms[*number.numbers<int64_t>()].reset();
}

void sum_into(const Tensor& x, const Tensor& y, const Tensor& number) {
    Tensor::check(x.in_order());
    int64_t count = 1;
    for (int64_t size : x.sizes()) count *= size;
    auto room = room_of(number);
    auto all = [&](auto* from) { room->sum(from, y.numbers<std::remove_reference_t<decltype(*from)>>(), count); };
    int32_t dtype = x.dtype();
    if (dtype == aoti_torch_dtype_bfloat16()) all(x.numbers<BFloat16>());
    else if (dtype == aoti_torch_dtype_float16()) all(x.numbers<Float16>());
    else if (dtype == aoti_torch_dtype_float32()) all(x.numbers<float>());
    else if (dtype == aoti_torch_dtype_float64()) all(x.numbers<double>());
    else if (dtype == aoti_torch_dtype_int64()) all(x.numbers<uint64_t>());
    else Tensor::check(false);
}

// x, room -> the sum of all ranks' x
void sum(StableIValue* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), number(stack[1]), y(x.sizes(), x.dtype());
    sum_into(x, y, number);
    stack[0] = y.given();
}

// The same, in x.
void sum_in_place(StableIValue* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), number(stack[1]);
    sum_into(x, x, number);
}

// x (..., n), room, ranks -> (..., n * ranks)
void gather(StableIValue* stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), number(stack[1]);
    auto sizes = x.sizes();
    Tensor::check(x.in_order() && !sizes.empty());
    int64_t width = sizes.back() * (int64_t)aoti_torch_dtype_element_size(x.dtype()), rows = 1;
    for (size_t d = 0; d + 1 < sizes.size(); d++) rows *= sizes[d];
    auto room = room_of(number);
    Tensor::check(room->ranks == (int64_t)stack[2]);
    sizes.back() *= room->ranks;
    Tensor y(sizes, x.dtype());
    room->gather(x.numbers<char>(), y.numbers<char>(), rows, width);
    stack[0] = y.given();
}

const Messages over_rooms{
    [](int64_t room, float* x, int64_t count) { room_of(room)->sum(x, x, count); },
    [](int64_t room, const float* x, float* y, int64_t rows, int64_t width) {
        room_of(room)->gather((const char*)x, (char*)y, rows, width * (int64_t)sizeof(float));
    }};

// room -> the address of what an operator of another library calls
void messages(StableIValue* stack, uint64_t, uint64_t) {
    Tensor number(stack[0]), address({}, aoti_torch_dtype_int64());
    room_of(number);
    *address.numbers<int64_t>() = (int64_t)&over_rooms;
    stack[0] = address.given();
}

// As in cpu_kernels.cpp: nothing is thrown here, and the handles stay.
struct Operators {
    TorchLibraryHandle names = nullptr, functions = nullptr;
    Operators() {
        bool named = !aoti_torch_library_init_def("llama_shared", __FILE__, __LINE__, &names) &&
                     !aoti_torch_library_def(names, "join(Tensor processes, int rank, int memory, int limit) -> Tensor") &&
                     !aoti_torch_library_def(names, "leave(Tensor room) -> ()") &&
                     !aoti_torch_library_def(names, "sum(Tensor x, Tensor room) -> Tensor") &&
                     !aoti_torch_library_def(names, "sum_(Tensor(a!) x, Tensor room) -> ()") &&
                     !aoti_torch_library_def(names, "gather(Tensor x, Tensor room, int ranks) -> Tensor") &&
                     !aoti_torch_library_def(names, "messages(Tensor room) -> Tensor") &&
                     !aoti_torch_library_init_impl("llama_shared", "CPU", __FILE__, __LINE__, &functions);
        if (!named) return;
        aoti_torch_library_impl(functions, "join", &join);
        aoti_torch_library_impl(functions, "leave", &leave);
        aoti_torch_library_impl(functions, "sum", &sum);
        aoti_torch_library_impl(functions, "sum_", &sum_in_place);
        aoti_torch_library_impl(functions, "gather", &gather);
        aoti_torch_library_impl(functions, "messages", &messages);
    }
} operators;

}  // namespace
