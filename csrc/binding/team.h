// torch's own thread pool as the kernels' Team.
#pragma once

#include "kernels.h"

namespace dsmoe::binding {

cpu::Team torch_team();

}  // namespace dsmoe::binding
