# cmake --install: headers, both libraries, the program, pkg-config and CMake package files.
include(CMakePackageConfigHelpers)
set(OSCAR_PC_REQUIRES "jansson libzip lapacke blas libzstd libxxhash") # of oscar_library_dependencies
list(TRANSFORM OpenMP_C_LIB_NAMES PREPEND -l OUTPUT_VARIABLE openmp_libraries)
list(JOIN openmp_libraries " " openmp_libraries)
set(OSCAR_PC_LIBS "${openmp_libraries} -lm")
if(OSCAR_HAVE_CUDA)
  string(APPEND OSCAR_PC_LIBS " -L${CUDAToolkit_LIBRARY_DIR} -lcudart_static -ldl -lrt -lpthread")
endif()
file(RELATIVE_PATH OSCAR_PC_PREFIX ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/oscar.pc.in oscar.pc @ONLY)

string(REPLACE " " ";" OSCAR_PC_REQUIRES "${OSCAR_PC_REQUIRES}")
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/oscar)
configure_package_config_file(cmake/oscarConfig.cmake.in oscarConfig.cmake INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(oscarConfigVersion.cmake COMPATIBILITY SameMinorVersion)

set_target_properties(oscar_shared PROPERTIES EXPORT_NAME oscar)
install(TARGETS oscar_shared EXPORT oscar)
install(TARGETS oscar_static oscar_library_dependencies EXPORT oscar_with_static)
install(EXPORT oscar FILE oscarTargets.cmake NAMESPACE oscar:: DESTINATION ${package_folder})
install(EXPORT oscar_with_static FILE oscarStaticTargets.cmake NAMESPACE oscar:: DESTINATION ${package_folder})
install(TARGETS oscar)
install(DIRECTORY include/oscar TYPE INCLUDE)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/oscar.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/oscarConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/oscarConfigVersion.cmake
        DESTINATION ${package_folder})
install(FILES LICENSE NOTICE TYPE DOC)
