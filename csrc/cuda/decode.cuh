// The forward for a handful of tokens, where time is the reading of weights.
#pragma once

#include "kernels.h"

namespace dsmoe::cuda {

int64_t decode_workspace_bytes(const ExpertMlpParams& params);
Status decode(const ExpertMlpParams& params, void* workspace, Stream stream);

}  // namespace dsmoe::cuda
