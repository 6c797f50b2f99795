target_sources(dsmoe_kernels PRIVATE csrc/cpu/expert_mlp_portable.cpp)
