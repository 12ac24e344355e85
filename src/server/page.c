/* page.c - the page: files that are part of the program. */
#include "server/page.h"
#include "server/state.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

/* Nothing from elsewhere, nothing inline, in nobody's frame. */
static const char policy[] = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                             "form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

void page_file(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  const struct {
    const char *path, *type;
    const unsigned char *data;
    size_t bytes;
  } files[] = {{"/", "text/html; charset=utf-8", page_index_html, page_index_html_bytes},
               {"/style.css", "text/css; charset=utf-8", page_style_css, page_style_css_bytes},
               {"/app.js", "text/javascript; charset=utf-8", page_app_js, page_app_js_bytes}};
  size_t i = 0;
  while (i + 1 < ARRAY_LENGTH(files) && strcmp(files[i].path, ex->route->path) != 0) i++;
  struct reply *r = &ex->reply;
  snprintf(r->etag, sizeof r->etag, "\"%016llx\"", (unsigned long long)XXH3_64bits(files[i].data, files[i].bytes));
  r->type = files[i].type;
  r->policy = policy;
  r->constant = (const char *)files[i].data;
  r->constant_bytes = files[i].bytes;
  r->status = 200;
  const char *known = MHD_lookup_connection_value(ex->connection, MHD_HEADER_KIND, "If-None-Match");
  if (!known || !strstr(known, r->etag)) return;
  r->status = 304;
  r->constant = "";
  r->constant_bytes = 0;
}
