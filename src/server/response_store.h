/* server/response_store.h - answers of /v1/responses that can be asked for again and continued; the oldest go when there are too
 * many. Any thread. Private. */
#ifndef OSCAR_SERVER_RESPONSE_STORE_H
#define OSCAR_SERVER_RESPONSE_STORE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

struct response_store;
struct response_store *response_store_create(int most, size_t most_bytes); /* NULL: out of memory */
void response_store_free(struct response_store *store);
/* `response` and the items that a next request continues; both borrowed. What does not fit is not kept. */
void response_store_put(struct response_store *store, const char *id, const json_t *response, const json_t *items);
/* Either may be NULL; new references. false: there is none. */
bool response_store_get(struct response_store *store, const char *id, json_t **response, json_t **items);
bool response_store_remove(struct response_store *store, const char *id);

#endif
