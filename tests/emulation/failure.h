// What ends a launch, thrown from threads and from copies.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <string>

namespace emulation {

struct Failure {
    std::string sentence;
};
/// As printf does.
inline std::string text(const char* format, ...) {
    char buffer[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

}  // namespace emulation
