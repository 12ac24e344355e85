# cmake --install: headers, both libraries, the program, pkg-config and CMake package files.
