# The same sources once per instruction set, each in a namespace of its own; expert_mlp.cpp chooses one at run time.
target_sources(dsmoe_kernels PRIVATE csrc/cpu/expert_mlp.cpp csrc/cpu/team.cpp)

function(add_isa name)
  add_library(dsmoe_${name} OBJECT csrc/cpu/expert_mlp_fwd.cpp csrc/cpu/expert_mlp_bwd.cpp
                                   csrc/cpu/expert_mlp_pack.cpp csrc/cpu/quantized_pack.cpp
                                   csrc/cpu/router.cpp)
  target_include_directories(dsmoe_${name} PRIVATE csrc)
  target_compile_definitions(dsmoe_${name} PRIVATE DSMOE_ISA_NAMESPACE=${name})
  # GCC 12 takes the undefined operands inside its own intrinsics for uninitialised variables. Nothing here throws, and
  # what exceptions would need for destructors are symbols that all share.
  target_compile_options(dsmoe_${name} PRIVATE -Wno-maybe-uninitialized -Wno-psabi -fno-exceptions ${ARGN})
  target_sources(dsmoe_kernels INTERFACE $<TARGET_OBJECTS:dsmoe_${name}>)
  set(DSMOE_ISAS ${DSMOE_ISAS} ${name} PARENT_SCOPE)
endfunction()

add_isa(portable)
if(DSMOE_TESTS)  # the tiles of amx_bf16 on plain code: for machines without them, and for sanitizers
  target_compile_definitions(dsmoe_kernels PRIVATE DSMOE_TESTS)
  add_isa(amx_emulated)
  target_compile_definitions(dsmoe_amx_emulated PRIVATE DSMOE_EMULATE_AMX)
  target_compile_options(dsmoe_amx_emulated PRIVATE -O1)  # registers of 64 bytes in pieces: slow to compile
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_compile_definitions(dsmoe_kernels PRIVATE DSMOE_X86)
  add_isa(avx2 -mavx2 -mfma -mf16c)
  set(avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  add_isa(avx512 ${avx512})
  add_isa(avx512_bf16 ${avx512} -mavx512bf16 -mavx512vnni)
  add_isa(amx_bf16 ${avx512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16)
endif()
