#include "runtime/catalog.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace ridgeline {
namespace {

std::vector<Family>& families() {
  static std::vector<Family> all;
  return all;
}

}  // namespace

Config::Config(const std::string& text) {
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ';');) {
    if (item.empty()) continue;
    const size_t equals = item.find('=');
    if (equals == std::string::npos) {
      throw std::runtime_error("configuration '" + item + "': expected name=value");
    }
    values_[item.substr(0, equals)] = item.substr(equals + 1);
  }
}

std::string Config::get(const std::string& name, const std::string& fallback) const {
  const auto it = values_.find(name);
  return it == values_.end() ? fallback : it->second;
}

long Config::get_int(const std::string& name, long fallback) const {
  const auto it = values_.find(name);
  if (it == values_.end()) return fallback;
  try {
    return std::stol(it->second);
  } catch (const std::exception&) {
    throw std::runtime_error("configuration '" + name + "': expected an integer, got '" +
                             it->second + "'");
  }
}

RegisterFamily::RegisterFamily(Family family) {
  families().push_back(std::move(family));
}

std::vector<Row> core_table() {
  std::vector<Row> table;
  for (const Family& family : families()) {
    for (Row& row : family.rows()) table.push_back(std::move(row));
  }
  std::sort(table.begin(), table.end(), [](const Row& a, const Row& b) {
    return std::tie(a.op, a.kernel, a.min_sm) < std::tie(b.op, b.kernel, b.min_sm);
  });
  return table;
}

Choice choose(const std::string& op, const Config& config, int sm) {
  std::string known;
  for (const Family& family : families()) {
    if (std::find(family.ops.begin(), family.ops.end(), op) != family.ops.end()) {
      return family.choose(op, config, sm);
    }
    for (const std::string& name : family.ops) known += (known.empty() ? "" : ", ") + name;
  }
  throw std::runtime_error("there is no op '" + op + "'; the ops are: " + known);
}

}  // namespace ridgeline
