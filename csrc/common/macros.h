// What must differ between a host and a device compiler.
#pragma once

#ifdef __CUDACC__
#define DSMOE_HOST_DEVICE __host__ __device__
#else
#define DSMOE_HOST_DEVICE
#endif
