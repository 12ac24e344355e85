# A file as a C array. cmake -DINPUT=file -DOUTPUT=file.c -DNAME=symbol -P embed.cmake defines
#   const unsigned char symbol[] (zero-terminated) and const size_t symbol_bytes (without the zero).
file(READ ${INPUT} hex HEX)
string(LENGTH "${hex}" digits)
math(EXPR bytes "${digits} / 2")
string(REGEX REPLACE "(................................)" "\\1\n" hex "${hex}") # 16 bytes a line
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," hex "${hex}")
get_filename_component(source ${INPUT} NAME)
file(WRITE ${OUTPUT}.new
     "/* Made from ${source}; do not edit. */\n#include <stddef.h>\n\nextern const unsigned char ${NAME}[];\nextern const size_t ${NAME}_bytes;\n\n"
     "const size_t ${NAME}_bytes = ${bytes};\nconst unsigned char ${NAME}[] = {\n${hex}0x00};\n")
file(RENAME ${OUTPUT}.new ${OUTPUT})

