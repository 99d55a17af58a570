// A word to the host from the launch that adds up parts: that a work list leaves nothing for it to
// do, so that later calls leave it out. It is written to the host's memory, and nobody waits for
// it.
#pragma once

#include <cstdint>

namespace ridgeline {

// Where a report comes; null: there is no memory. A place is used again after 512 reports, whose
// numbers tell them apart.
int64_t* report_place(uint32_t number);

}  // namespace ridgeline
