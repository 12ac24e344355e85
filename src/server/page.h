/* server/page.h - the files of the page, part of the program; made by the build from src/server/page/. Private. */
#ifndef OSCAR_SERVER_PAGE_H
#define OSCAR_SERVER_PAGE_H

#include <stddef.h>

extern const unsigned char page_index_html[], page_style_css[], page_app_js[];
extern const size_t page_index_html_bytes, page_style_css_bytes, page_app_js_bytes;

#endif
