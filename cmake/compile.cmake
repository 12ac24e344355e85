# Warnings, sanitizers and instruction sets. Everything of ours is configured by oscar_configure(target).
set(OSCAR_WARNINGS -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes)

# Over a hundred programs are linked with a sanitizer's runtime, which takes LLVM's linker a third of the time.
if(OSCAR_SANITIZE)
  include(CheckLinkerFlag)
  check_linker_flag(C -fuse-ld=lld OSCAR_LLD)
endif()

function(oscar_configure target)
  target_compile_features(${target} PUBLIC c_std_17)
  # -ffp-contract=off: the same source gives the same numbers on every compiler; kernels use FMA explicitly.
  target_compile_options(
    ${target} PRIVATE "$<$<COMPILE_LANGUAGE:C>:${OSCAR_WARNINGS};-ffp-contract=off;-fno-math-errno>"
                      "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers,-fno-exceptions,-fno-threadsafe-statics;--threads=0>"
                      # what profilers show beside machine code takes three times the room of that
                      "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<NOT:$<CONFIG:Release>>>:-lineinfo>")
  target_compile_definitions(${target} PRIVATE $<$<COMPILE_LANGUAGE:C>:_GNU_SOURCE> $<$<CONFIG:Debug>:OSCAR_DEBUG>)
  target_include_directories(${target} PUBLIC ${PROJECT_SOURCE_DIR}/include PRIVATE ${PROJECT_SOURCE_DIR}/src)
  if(OSCAR_SANITIZE)
    # What a sanitizer adds to every access makes a large unrolled kernel minutes of compilation: loops stay loops there, which clang
    # would report of every one.
    target_compile_options(
      ${target} PUBLIC -fsanitize=${OSCAR_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all
                       "$<$<C_COMPILER_ID:Clang>:SHELL:-mllvm -pragma-unroll-threshold=1 -Wno-pass-failed>")
    target_link_options(${target} PUBLIC -fsanitize=${OSCAR_SANITIZE} $<$<BOOL:${OSCAR_LLD}>:-fuse-ld=lld>)
  endif()
endfunction()

# What fuzzing learns from: of a target whose sources are all there, the rooms that read what comes from outside or that a fuzz target
# drives. Elsewhere it would learn nothing, and every comparison of a kernel under a sanitizer would be traced, which takes four times
# as long as the kernel.
function(oscar_fuzz_coverage target)
  if(NOT OSCAR_FUZZ)
    return()
  endif()
  get_target_property(sources ${target} SOURCES)
  list(FILTER sources INCLUDE REGEX "/src/(base|rotation|cache|model|server)/|/src/quant/(codec|rope)")
  set_property(SOURCE ${sources} TARGET_DIRECTORY ${target} APPEND PROPERTY COMPILE_OPTIONS -fsanitize=fuzzer-no-link)
endfunction()

# Files written for one instruction-set level. Usage: oscar_isa_sources(target avx512 a.c b.c); nothing is added for CPUs of another
# kind. They are all loads, so checks of pointers that the address sanitizer makes as well would be half of what they are compiled to.
set(OSCAR_ISA_UNCHECKED "null,object-size,pointer-overflow")
set(OSCAR_ISA_avx2 -mavx2 -mfma -mf16c)
set(OSCAR_ISA_avx_vnni ${OSCAR_ISA_avx2} -mavxvnni)
set(OSCAR_ISA_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512)
set(OSCAR_ISA_avx512_bf16 ${OSCAR_ISA_avx512} -mavx512bf16 -mavx512vbmi)
set(OSCAR_ISA_amx ${OSCAR_ISA_avx512_bf16} -mamx-tile -mamx-bf16)
set(OSCAR_ISA_neon_dot -march=armv8.2-a+dotprod)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(OSCAR_ISAS avx2 avx_vnni avx512 avx512_bf16 amx)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(OSCAR_ISAS neon_dot)
endif()
function(oscar_isa_sources target isa)
  if(NOT isa IN_LIST OSCAR_ISAS)
    return()
  endif()
  target_sources(${target} PRIVATE ${ARGN})
  set(options ${OSCAR_ISA_${isa}})
  if(OSCAR_SANITIZE MATCHES undefined)
    list(APPEND options -fno-sanitize=${OSCAR_ISA_UNCHECKED})
  endif()
  set_source_files_properties(${ARGN} TARGET_DIRECTORY ${target} PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()
