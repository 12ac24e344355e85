/* page.c - the page: files that are part of the program. */
#include "server/page.h"
#include "server/state.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

/* Nothing from elsewhere, nothing inline, in nobody's frame. */
static const char policy[] = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
                             "form-action 'none'; base-uri 'none'; frame-ancestors 'none'";

#define SCRIPT(name)                                                                                                             \
  { #name ".js", "text/javascript; charset=utf-8", page_##name##_js, &page_##name##_js_bytes }

/* By what follows /page/; "" is the page itself. */
static const struct file {
  const char *name, *type;
  const unsigned char *data;
  const size_t *bytes;
} files[] = {{"", "text/html; charset=utf-8", page_index_html, &page_index_html_bytes},
             {"style.css", "text/css; charset=utf-8", page_style_css, &page_style_css_bytes},
             {"icon.svg", "image/svg+xml", page_icon_svg, &page_icon_svg_bytes},
             SCRIPT(app),
             SCRIPT(api),
             SCRIPT(cache),
             SCRIPT(chat),
             SCRIPT(dom),
             SCRIPT(markdown),
             SCRIPT(options),
             SCRIPT(sessions)};

static const struct file *find(const char *name) {
  for (size_t i = 0; i < ARRAY_LENGTH(files); i++)
    if (strcmp(files[i].name, name) == 0) return &files[i];
  return NULL;
}

void page_file(struct exchange *ex, struct frontend *frontend) {
  (void)frontend;
  const struct file *file = find(ex->name);
  if (!file) {
    struct refusal refusal = {0};
    refuse(&refusal, 404, "not_found", NULL, "the page has no file %.80s", ex->name);
    reply_refusal(ex, &refusal);
    return;
  }
  struct reply *r = &ex->reply;
  snprintf(r->etag, sizeof r->etag, "\"%016llx\"", (unsigned long long)XXH3_64bits(file->data, *file->bytes));
  r->type = file->type;
  r->policy = policy;
  r->constant = (const char *)file->data;
  r->constant_bytes = *file->bytes;
  r->status = 200;
  const char *known = MHD_lookup_connection_value(ex->connection, MHD_HEADER_KIND, "If-None-Match");
  if (!known || !strstr(known, r->etag)) return;
  r->status = 304;
  r->constant = "";
  r->constant_bytes = 0;
}
