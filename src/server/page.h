/* server/page.h - the files of the page, part of the program; made by the build from src/server/page/. Private. */
#ifndef OSCAR_SERVER_PAGE_H
#define OSCAR_SERVER_PAGE_H

#include <stddef.h>

extern const unsigned char page_index_html[], page_style_css[], page_icon_svg[], page_app_js[], page_api_js[], page_cache_js[],
    page_chat_js[], page_dom_js[], page_markdown_js[], page_options_js[], page_sessions_js[];
extern const size_t page_index_html_bytes, page_style_css_bytes, page_icon_svg_bytes, page_app_js_bytes, page_api_js_bytes,
    page_cache_js_bytes, page_chat_js_bytes, page_dom_js_bytes, page_markdown_js_bytes, page_options_js_bytes,
    page_sessions_js_bytes;

#endif
