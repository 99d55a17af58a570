// The core table: every kernel that ships or may be chosen, told by the families themselves. From
// it come the AOT list, `ridgeline.supports`, the error messages and the README's matrix.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace ridgeline {

struct Row {
  std::string op;
  std::string kernel;
  int min_sm = 75;  // the code paths it is for, as compute capabilities, both ends included
  int max_sm = 999;
  bool core = true;  // in the AOT packs
  int block = 0;
  int dynamic_smem = 0;  // bytes
  std::string why;       // what it is for, in a few words
};

// What a caller asks of an op, by name: "dtype=float16;head_dim_qk=128".
class Config {
 public:
  explicit Config(const std::string& text);
  std::string get(const std::string& name, const std::string& fallback) const;
  long get_int(const std::string& name, long fallback) const;

 private:
  std::map<std::string, std::string> values_;
};

struct Choice {
  std::vector<std::string> kernels;  // in launch order; empty when nothing serves
  std::vector<std::string> reasons;  // why nothing does
};

struct Family {
  std::vector<std::string> ops;
  std::vector<Row> (*rows)();
  Choice (*choose)(const std::string& op, const Config& config, int sm);
};

// A namespace-scope object of an ops file registers its family.
class RegisterFamily {
 public:
  explicit RegisterFamily(Family family);
};

std::vector<Row> core_table();

// Throws std::runtime_error that lists the ops when there is no such op.
Choice choose(const std::string& op, const Config& config, int sm);

}  // namespace ridgeline
