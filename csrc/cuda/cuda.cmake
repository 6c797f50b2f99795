# nvcc, those of the wanted architectures that it knows, and the kernels' sources. setup.py names the
# compiler; by hand: -DCMAKE_CUDA_COMPILER=nvcc. Included before any target: it sets what targets start from.
if(NOT CMAKE_CUDA_COMPILER)
  find_program(CMAKE_CUDA_COMPILER nvcc REQUIRED)
endif()

# Machine code for the chips that people have, 100's for B300 (10.3) too; the PTX of 80, 90 and 120 serves those
# between and after.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known)
  foreach(architecture 80 86-real 89-real 90 100-real 120)
    string(REPLACE "-real" "" number ${architecture})
    if(known MATCHES "compute_${number}\n")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture})
    endif()
  endforeach()
endif()

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# nvcc from PyPI keeps its libraries in lib, where nvcc does not look, and has no libcudart.so to find.
get_filename_component(toolkit "${CMAKE_CUDA_COMPILER}" REALPATH)
get_filename_component(toolkit "${toolkit}/../.." ABSOLUTE)
if(EXISTS "${toolkit}/lib/libcudart_static.a")
  set(ENV{LIBRARY_PATH} "${toolkit}/lib:$ENV{LIBRARY_PATH}")
  set(CUDA_CUDART "${toolkit}/lib/libcudart_static.a" CACHE FILEPATH "CUDA runtime")
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
# Hopper's own main loop is a library by itself, whose only architecture is 90a; the runtime's lookup of
# driver functions that it needs is as old as CUDA 12.5.
set(DSMOE_SM90A OFF)
if(CMAKE_CUDA_ARCHITECTURES MATCHES "90|all|native" AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.5)
  set(DSMOE_SM90A ON)
endif()
set(DSMOE_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
