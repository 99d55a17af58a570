// Where the library's own files lie: kernel sources, packs and the disk cache.
#pragma once

#include <optional>
#include <string>

namespace ridgeline {

const std::string& kernels_dir();  // RIDGELINE_KERNELS_DIR, else beside the library
const std::string& pack_dir();     // RIDGELINE_PACK_DIR, else packs/ beside the library
const std::string& cache_dir();    // RIDGELINE_CACHE_DIR, else the user's cache folder, else ""

std::optional<std::string> read_file(const std::string& path);

}  // namespace ridgeline
