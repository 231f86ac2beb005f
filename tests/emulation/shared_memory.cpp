// Shared memory of a module of emulated kernels: `__shared__` variables are static, and a module has no others in .bss.

extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));

/// Fills it with 0xff, so that nothing survives from the CTA before: a NaN, or an index out of bounds.
extern "C" __attribute__((no_sanitize("address"))) void poison() {
    for (volatile char* p = __bss_start; p < _end; ++p) *p = char(0xff);
}
