// Finds a compiled kernel without Python: lookup_main <libridgeline.so> <kernel> <arch>.
// Prints where the kernel lies ("pack", "cache" or nothing); exits with 1 and the library's message
// when the look-up fails. With a fourth argument, a file, it checks that file as an entry.

#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

namespace {

template <class Function>
Function* symbol(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

int fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  return 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return fail("usage: lookup_main <libridgeline.so> <kernel> <arch> [<entry>]");
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail(dlerror());
  const auto last_error = symbol<const char*()>(library, "ridgeline_last_error");
  const auto find = symbol<int(const char*, const char*, char*, size_t)>(library, "ridgeline_find");
  const auto check = symbol<int(const void*, size_t)>(library, "ridgeline_check_entry");
  if (!last_error || !find || !check) return fail(dlerror());

  char source[16];
  if (find(arguments[2], arguments[3], source, sizeof(source)) != 0) return fail(last_error());
  std::printf("%s\n", source);

  if (count == 5) {
    std::ifstream file(arguments[4], std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    if (check(bytes.data(), bytes.size()) != 0) return fail(last_error());
  }
  return 0;
}
