// Just enough JSON to tell Python about tables and devices.
#pragma once

#include <string>
#include <vector>

namespace ridgeline {

std::string json_string(const std::string& text);
std::string json_array(const std::vector<std::string>& items);    // of JSON texts
std::string json_strings(const std::vector<std::string>& items);  // of plain strings

}  // namespace ridgeline
