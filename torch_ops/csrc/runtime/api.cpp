// The C functions that Python (through ctypes) and C++ programs call. None lets an exception out:
// they return 0 for success, and ridgeline_last_error() has the message otherwise.

#include <array>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/catalog.h"
#include "runtime/device.h"
#include "runtime/entry.h"
#include "runtime/json.h"
#include "runtime/kernel.h"
#include "runtime/key.h"
#include "runtime/paths.h"
#include "runtime/resolver.h"
#include "runtime/store.h"

#define RIDGELINE_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace ridgeline;

thread_local std::string last_error;
thread_local std::string last_text;  // what the functions that return a text point to

int guarded(const std::function<void()>& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

void copy_out(const std::string& text, char* out, size_t size) {
  if (text.size() >= size) {
    throw std::runtime_error("the caller's buffer holds " + std::to_string(size) + " bytes, " +
                             std::to_string(text.size() + 1) + " are needed");
  }
  std::memcpy(out, text.c_str(), text.size() + 1);
}

std::string row_json(const Row& row) {
  return "{\"op\": " + json_string(row.op) + ", \"kernel\": " + json_string(row.kernel) +
         ", \"min_sm\": " + std::to_string(row.min_sm) +
         ", \"max_sm\": " + std::to_string(row.max_sm) +
         ", \"core\": " + (row.core ? "true" : "false") +
         ", \"block\": " + std::to_string(row.block) +
         ", \"dynamic_smem\": " + std::to_string(row.dynamic_smem) +
         ", \"why\": " + json_string(row.why) + "}";
}

std::string pack_serving(const Device& gpu, std::string* error) {
  try {
    return pack_for(gpu.arch);
  } catch (const std::exception& damage) {
    *error = damage.what();
    return "";
  }
}

std::string device_json(const Device& gpu) {
  std::string error;
  const std::string pack = pack_serving(gpu, &error);
  return "{\"index\": " + std::to_string(gpu.index) + ", \"name\": " + json_string(gpu.name) +
         ", \"real_sm\": " + std::to_string(gpu.real_sm) + ", \"sm\": " + std::to_string(gpu.sm) +
         ", \"arch\": " + json_string(gpu.arch) + ", \"num_sms\": " + std::to_string(gpu.num_sms) +
         ", \"max_dynamic_smem\": " + std::to_string(gpu.max_dynamic_smem) +
         ", \"pack\": " + json_string(pack) + ", \"error\": " + json_string(error) + "}";
}

std::string driver_json() {
  int version = 0, count = 0;
  std::vector<std::string> devices;
  std::string error;
  try {
    driver_check(driver().driver_get_version(&version), "reading the driver's version");
    driver_check(driver().device_get_count(&count), "counting GPUs");
    for (int index = 0; index < count; ++index) devices.push_back(device_json(device(index)));
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  return "{\"driver_version\": " + std::to_string(version) + ", \"error\": " + json_string(error) +
         ", \"devices\": " + json_array(devices) + "}";
}

}  // namespace

RIDGELINE_API const char* ridgeline_last_error() {
  return last_error.c_str();
}
RIDGELINE_API const char* ridgeline_compile_options() {
  return kCompileOptions;
}
RIDGELINE_API const char* ridgeline_kernels_dir() {
  return kernels_dir().c_str();
}
RIDGELINE_API const char* ridgeline_pack_dir() {
  return pack_dir().c_str();
}
RIDGELINE_API const char* ridgeline_cache_dir() {
  return cache_dir().c_str();
}

RIDGELINE_API const char* ridgeline_core_table() {
  std::vector<std::string> rows;
  for (const Row& row : core_table()) rows.push_back(row_json(row));
  last_text = json_array(rows);
  return last_text.c_str();
}

RIDGELINE_API const char* ridgeline_driver_report() {
  last_text = driver_json();
  return last_text.c_str();
}

RIDGELINE_API int ridgeline_entry_key(const char* name, const char* arch, char* key) {
  return guarded([&] { copy_out(entry_key(name, arch), key, 65); });
}

RIDGELINE_API int ridgeline_check_entry(const void* data, size_t size) {
  return guarded([&] { parse_entry({static_cast<const char*>(data), size}); });
}

RIDGELINE_API int ridgeline_find(const char* name, const char* arch, char* source, size_t size) {
  return guarded([&] { copy_out(find_source(name, arch), source, size); });
}

RIDGELINE_API int ridgeline_load(const char* name, int device_index) {
  return guarded([&] { kernel(name).on(device(device_index)); });
}

RIDGELINE_API int ridgeline_explain(const char* op, int sm, const char* config, char* out,
                                    size_t size) {
  return guarded([&] {
    const Choice choice = choose(op, Config(config), sm);
    copy_out(std::string("{\"ok\": ") + (choice.kernels.empty() ? "false" : "true") +
                 ", \"kernels\": " + json_strings(choice.kernels) +
                 ", \"reasons\": " + json_strings(choice.reasons) + "}",
             out, size);
  });
}

RIDGELINE_API void ridgeline_set_compiler(CompileFunction compile, TagFunction tag) {
  set_compiler(compile, tag);
}

RIDGELINE_API void ridgeline_supply_entry(const void* data, size_t size) {
  supply_entry({static_cast<const char*>(data), size});
}

RIDGELINE_API void ridgeline_supply_error(const char* message) {
  supply_error(message);
}
