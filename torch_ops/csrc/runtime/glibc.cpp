// Parts of newer C++ and C libraries that the compiled code refers to and a manylinux_2_28 system
// has not: they are defined here, not exported, so that the reference ends inside this library.

#include <new>
#include <sstream>

// Why: constructors and str() of string streams became symbols of libstdc++ after its version 8.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// Why: glibc 2.32 added this flag; false means that shared_ptr always counts atomically.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

// Why: libstdc++ gained this function with version 11; new[] of a vector's growth calls it.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() {
  throw std::bad_array_new_length();
}
}  // namespace std
