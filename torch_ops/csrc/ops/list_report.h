// What the scheduler tells the host of a work list, for calls to come: that no tile is cut and no
// row left to clear, so that attention is one launch. It writes to the host's memory, and nobody
// waits for it: calls that come before are two launches, with the same results.
#pragma once

#include <cstdint>

namespace ridgeline {

// C layout: Python reads it.
struct ListReport {
  int64_t* place;  // `value` appears here
  int64_t value;   // no other report's
  int64_t flags;   // what the ops' `flags` may have then, beside their own
};

// The report of a list that is about to be made. Its place is null where the scheduler is to tell
// nothing, or there is no memory for that.
ListReport new_report(const void* list, int tag, bool tells);

}  // namespace ridgeline
