# pipex_cuda_targets(TARGETS WHY_NOT): what the CUDA kernels are built for, as CMAKE_CUDA_ARCHITECTURES has it; or, if
# they are not built, why.
#
#   PIPEX_CUDA=OFF   nothing
#   CUDAARCHS, or CMAKE_CUDA_ARCHITECTURES: what is listed there, as in any CMake project
#   PIPEX_CUDA=ON    all GPUs that pipex is made for
#   PIPEX_CUDA=AUTO  the GPUs of this machine, as nvidia-smi knows them: kernels for others take minutes and never run;
#                    with PTX, for newer ones
#
# Sets CMAKE_CUDA_COMPILER, but does not enable the language yet. What was asked for is built, or the build ends here;
# AUTO does without where it cannot be. WHY_NOT becomes a definition for the compiler: no semicolons in it.

set(PIPEX_ALL_CUDA_TARGETS 80-real 90a-real 100) # 100: code for Blackwell, and PTX for what comes after

function(pipex_cuda_targets targets_out why_not_out)
  if(NOT PIPEX_CUDA MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "PIPEX_CUDA is ${PIPEX_CUDA}; needed: AUTO, ON or OFF")
  endif()
  set(targets "")
  set(why_not "")
  set(asked TRUE)
  if(PIPEX_CUDA STREQUAL "OFF")
    set(why_not "PIPEX_CUDA=OFF")
  elseif(CMAKE_CUDA_ARCHITECTURES)
    set(targets ${CMAKE_CUDA_ARCHITECTURES})
  elseif(NOT "$ENV{CUDAARCHS}" STREQUAL "")
    set(targets $ENV{CUDAARCHS})
  elseif(PIPEX_CUDA STREQUAL "ON")
    set(targets ${PIPEX_ALL_CUDA_TARGETS})
  else()
    set(asked FALSE)
    pipex_gpus_here(targets)
    if(NOT targets)
      string(CONCAT why_not "nvidia-smi found no GPU on the machine that built pipex (PIPEX_CUDA=ON builds for all that "
                            "pipex is made for, CUDAARCHS=90 for one)")
    endif()
  endif()
  if(NOT why_not)
    pipex_cuda_compiler_for("${targets}" why_not)
    if(why_not AND asked)
      message(FATAL_ERROR "CUDA kernels for ${targets} cannot be built: ${why_not}")
    endif()
  endif()
  if(why_not)
    set(targets "")
  endif()
  set(${targets_out} "${targets}" PARENT_SCOPE)
  set(${why_not_out} "${why_not}" PARENT_SCOPE)
endfunction()

function(pipex_gpus_here targets_out)
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE said
    RESULT_VARIABLE code
    ERROR_QUIET TIMEOUT 60)
  set(targets "")
  if(code STREQUAL "0")
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" targets "${said}")
    list(REMOVE_DUPLICATES targets)
    list(TRANSFORM targets REPLACE "\\." "")
  endif()
  set(${targets_out} "${targets}" PARENT_SCOPE)
endfunction()

# Finds the compiler, and what speaks against it: CMake itself would end the build at a target that it does not know.
function(pipex_cuda_compiler_for targets why_not_out)
  set(why_not "")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(why_not "no CUDA compiler was found (nvcc must be in PATH, or named by CUDACXX)")
  else()
    execute_process(
      COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code
      OUTPUT_VARIABLE known
      RESULT_VARIABLE code
      ERROR_QUIET)
    foreach(target IN LISTS targets)
      string(REGEX MATCH "^[0-9]+" number "${target}")  # none in "native" and "all", which CMake resolves
      if(code STREQUAL "0" AND number AND NOT known MATCHES "sm_${number}[^0-9]")
        string(CONCAT why_not "${CMAKE_CUDA_COMPILER} does not know sm_${number} (it needs a newer CUDA toolkit, or other "
                              "targets, such as CUDAARCHS=80)")
        break()
      endif()
    endforeach()
  endif()
  set(${why_not_out} "${why_not}" PARENT_SCOPE)
endfunction()
