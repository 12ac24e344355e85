# Libraries that do what OSCAR does not exist for. All are Debian packages; see scripts/setup for their names.
find_package(PkgConfig REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS C)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(LIBZIP REQUIRED IMPORTED_TARGET libzip)
pkg_check_modules(LAPACKE REQUIRED IMPORTED_TARGET lapacke)
pkg_check_modules(BLAS REQUIRED IMPORTED_TARGET blas)
pkg_check_modules(LIBZSTD REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(LIBXXHASH REQUIRED IMPORTED_TARGET libxxhash)

add_library(oscar_library_dependencies INTERFACE)
target_link_libraries(oscar_library_dependencies INTERFACE OpenMP::OpenMP_C PkgConfig::JANSSON PkgConfig::LIBZIP PkgConfig::LAPACKE
                                                           PkgConfig::BLAS PkgConfig::LIBZSTD PkgConfig::LIBXXHASH m)
if(OSCAR_HAVE_CUDA)
  target_link_libraries(oscar_library_dependencies INTERFACE CUDA::cudart_static)
endif()

# Debian's CMake package of oneDNN asks for OpenCL headers that a CPU build does not use, so the library is found directly.
find_path(DNNL_INCLUDE_DIR oneapi/dnnl/dnnl.h REQUIRED)
find_library(DNNL_LIBRARY dnnl REQUIRED)
add_library(oscar_dnnl INTERFACE)
target_include_directories(oscar_dnnl SYSTEM INTERFACE ${DNNL_INCLUDE_DIR})
target_link_libraries(oscar_dnnl INTERFACE ${DNNL_LIBRARY})
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(CRYPTO REQUIRED IMPORTED_TARGET libcrypto)
pkg_check_modules(LIBEDIT REQUIRED IMPORTED_TARGET libedit)
pkg_check_modules(MICROHTTPD REQUIRED IMPORTED_TARGET libmicrohttpd)

add_library(oscar_engine_dependencies INTERFACE)
target_link_libraries(oscar_engine_dependencies INTERFACE oscar_dnnl PkgConfig::PCRE2 PkgConfig::UTF8PROC PkgConfig::CRYPTO)

# Not linked: the program calls it to draw the pictures of `oscar eval --report`.
find_program(GNUPLOT_PROGRAM gnuplot)
if(NOT GNUPLOT_PROGRAM)
  message(STATUS "gnuplot is not installed (Debian: gnuplot-nox): everything is built, but `oscar eval --report` needs it to run")
endif()
mark_as_advanced(GNUPLOT_PROGRAM)
