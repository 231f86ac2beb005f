// A call of a kernel: a function with one struct by value, whose size is known at run time only.
#pragma once
#include <array>
#include <cstring>
#include <functional>
#include <utility>

namespace emulation {

template <size_t kWords, size_t kAlignment>
struct alignas(kAlignment) Params {
    uint64_t word[kWords];
};
/// A call with a struct of kWords words by value: above 16 bytes the System V ABI passes every struct alike, in memory.
template <size_t kWords, size_t kAlignment>
std::function<void()> bind(void* kernel, const void* params) {
    static_assert(kWords > 2, "smaller structs travel in registers");
    using Copy = Params<kWords, kAlignment>;
    Copy copy;
    std::memcpy(&copy, params, sizeof copy);
    return [=] { reinterpret_cast<void (*)(Copy)>(kernel)(copy); };
}
using Bind = std::function<void()> (*)(void*, const void*);
template <size_t kAlignment, size_t... kIndices>
Bind bind_of(size_t words, std::index_sequence<kIndices...>) {
    constexpr size_t kStep = kAlignment / 8;
    constexpr std::array<Bind, sizeof...(kIndices)> kAll = {
        bind<kStep * kIndices + (kStep == 1 ? 3 : kStep), kAlignment>...};
    const size_t index = (words - (kStep == 1 ? 3 : kStep)) / kStep;
    return index < kAll.size() ? kAll[index] : nullptr;
}

}  // namespace emulation
