# The module reinforce_ada._cuda: REINFORCE_ADA_CUDA is AUTO (where torch has CUDA and nvcc works), ON (or it is an error) or OFF.
#
# nvcc is called by itself and not as a language of CMake's, which expects a toolkit where NVIDIA's installer puts it: the wheels
# of Python packages have another layout. The CUDA runtime is linked statically, so the module imports where there is no driver.
string(TOUPPER "${REINFORCE_ADA_CUDA}" RA_CHOICE)
if(RA_CHOICE STREQUAL "OFF")
  return()
elseif(NOT RA_CHOICE MATCHES "^(AUTO|ON)$")
  message(FATAL_ERROR "REINFORCE_ADA_CUDA=${REINFORCE_ADA_CUDA}: not a choice; use AUTO, ON or OFF.")
endif()

# Under pip's build isolation sys.path is a folder of the build's own, but sysconfig still names the environment that pip installs into.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sys, sysconfig
print(*(sysconfig.get_path(name) for name in ('purelib', 'platlib')), *filter(None, sys.path), sep=';', end='')"
  OUTPUT_VARIABLE RA_SITES)

# Sets RA_MISSING to what is wrong with the first torch there, "" where it is built for CUDA. It is read, since importing it takes seconds.
function(ra_check_torch)
  set(missing "there is no torch in the Python environment")
  foreach(site IN LISTS RA_SITES)
    if(EXISTS "${site}/torch/version.py")
      set(missing "the torch of the Python environment is built without CUDA")
      file(STRINGS "${site}/torch/version.py" built_for REGEX "^cuda *(:[^=]*)?= *['\"][0-9]")
      if(built_for)
        set(missing "")
      endif()
      break()
    endif()
  endforeach()
  set(RA_MISSING "${missing}" PARENT_SCOPE)
endfunction()

if(RA_CHOICE STREQUAL "AUTO")
  ra_check_torch()
  if(RA_MISSING)
    message(STATUS "REINFORCE_ADA_CUDA=AUTO: ${RA_MISSING}; building without the CUDA forms.")
    return()
  endif()
endif()

set(RA_WHEELS "")
foreach(site IN LISTS RA_SITES)
  file(GLOB found "${site}/nvidia/cu*/bin" "${site}/nvidia/cuda_nvcc/bin")
  list(APPEND RA_WHEELS ${found})
endforeach()

# Sets RA_NVCC and RA_CUDART; or RA_MISSING, what is wrong.
function(ra_find_cuda)
  unset(RA_NVCC CACHE)
  unset(RA_CUDART CACHE)
  if(DEFINED ENV{CUDACXX})
    set(missing "CUDACXX=$ENV{CUDACXX} is no program")
    find_program(RA_NVCC "$ENV{CUDACXX}")
  else()
    set(missing "no nvcc in CUDACXX, CUDA_HOME, PATH, /usr/local/cuda or the wheels of the Python environment")
    find_program(RA_NVCC nvcc HINTS ENV CUDA_HOME PATHS /usr/local/cuda/bin ${RA_WHEELS} PATH_SUFFIXES bin)
  endif()
  if(RA_NVCC)
    set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe.cu")
    file(WRITE "${probe}" "__global__ void probe(float* x) { *x += 1; }\n")
    list(GET REINFORCE_ADA_CUDA_ARCHITECTURES -1 newest)
    execute_process(
      COMMAND ${RA_NVCC} -v -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 -arch=sm_${newest} -c ${probe} -o ${probe}.o
      RESULT_VARIABLE failed OUTPUT_VARIABLE said ERROR_VARIABLE said)
    # nvcc says where its toolkit is; a link or a wrapper in PATH does not.
    string(REGEX MATCH "#\\$ TOP=([^\n]*)" line "${said}")
    get_filename_component(top "${CMAKE_MATCH_1}" REALPATH)
    find_library(RA_CUDART cudart_static PATHS ${top} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib
                 NO_DEFAULT_PATH)
    set(missing "no libcudart_static.a in ${top}")
    if(failed)
      string(REGEX MATCH "[^\n]*([Ee]rror|fatal|not found|No such)[^\n]*" line "${said}")
      set(missing "${RA_NVCC} does not compile for sm_${newest}: ${line}")
      unset(RA_NVCC CACHE)
    endif()
  endif()
  set(RA_MISSING "${missing}" PARENT_SCOPE)
endfunction()

ra_find_cuda()
if(NOT RA_NVCC OR NOT RA_CUDART)
  if(RA_CHOICE STREQUAL "ON")
    message(FATAL_ERROR
      "REINFORCE_ADA_CUDA=ON: ${RA_MISSING}; nvcc 12.8 or newer is needed; set CUDACXX to one, or "
      "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' "
      "'nvidia-cuda-cccl==13.0.*', or use AUTO or OFF.")
  endif()
  message(STATUS "REINFORCE_ADA_CUDA=AUTO: ${RA_MISSING}; building without the CUDA forms.")
  return()
endif()

set(RA_GENCODE "")
set(RA_ARCHITECTURES "")
foreach(arch IN LISTS REINFORCE_ADA_CUDA_ARCHITECTURES)
  list(APPEND RA_GENCODE "-gencode=arch=compute_${arch},code=sm_${arch}")
  string(APPEND RA_ARCHITECTURES "sm_${arch} ")
  set(RA_LAST ${arch})
endforeach()
list(APPEND RA_GENCODE "-gencode=arch=compute_${RA_LAST},code=compute_${RA_LAST}")
string(APPEND RA_ARCHITECTURES "compute_${RA_LAST}")
message(STATUS "REINFORCE_ADA_CUDA=${RA_CHOICE}: ${RA_NVCC} for ${RA_ARCHITECTURES}")

# Contraction off: a fused multiply-add happens where the source says fmaf and nowhere else. -ftz: exp2f is then one instruction; what
# it loses is below 2^-126.
set(RA_NVCC_FLAGS -std=c++17 -O3 -fmad=false -ftz=true -ccbin ${CMAKE_CXX_COMPILER} -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra
                  "-I${CMAKE_CURRENT_SOURCE_DIR}/csrc" "-DRA_CUDA_ARCHITECTURES=\"${RA_ARCHITECTURES}\"" ${RA_GENCODE})
file(GLOB RA_CUDA_SOURCES CONFIGURE_DEPENDS csrc/common/*.cu csrc/ops/*/*_cuda.cu)
file(GLOB RA_CUDA_HEADERS CONFIGURE_DEPENDS csrc/common/*.cuh csrc/common/*.h csrc/ops/*/*.h csrc/ops/*/*.cuh)
set(RA_CUDA_OBJECTS "")
foreach(source IN LISTS RA_CUDA_SOURCES)
  get_filename_component(name "${source}" NAME_WE)
  set(object "${CMAKE_CURRENT_BINARY_DIR}/${name}.cu.o")
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${RA_NVCC} ${RA_NVCC_FLAGS} -c ${source} -o ${object}
    DEPENDS ${source} ${RA_CUDA_HEADERS}
    COMMENT "nvcc ${name}.cu"
    VERBATIM)
  list(APPEND RA_CUDA_OBJECTS ${object})
endforeach()

pybind11_add_module(_cuda MODULE csrc/bindings_cuda.cpp ${RA_CUDA_OBJECTS})
target_include_directories(_cuda PRIVATE csrc)
target_compile_options(_cuda PRIVATE -Wall -Wextra)
find_package(Threads REQUIRED)
# The CUDA runtime's own symbols stay inside: torch has another copy in the process.
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
target_link_libraries(_cuda PRIVATE ${RA_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
install(TARGETS _cuda LIBRARY DESTINATION reinforce_ada)
