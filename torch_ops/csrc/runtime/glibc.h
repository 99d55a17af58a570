// Included before every source file: binds a few functions to the versions of their symbols that a
// manylinux_2_28 system has, so that a library built on a newer one loads there too.
//
// Only the version's number changed in between (dlopen and its kin moved from libdl into libc; pow
// stopped setting errno), so the older name reaches the same code.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
__asm__(".symver dladdr, dladdr@GLIBC_2.2.5");
__asm__(".symver dlerror, dlerror@GLIBC_2.2.5");
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver pow, pow@GLIBC_2.2.5");
#endif
