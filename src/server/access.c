/* access.c - API keys and origins. Keys are compared as digests, all of them, in constant time. */
#include "server/state.h"

#include <arpa/inet.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

bool access_open(struct server *server) {
  const int n = server->options.n_api_keys;
  server->keys = calloc((size_t)n + 1, sizeof *server->keys);
  server->key_names = calloc((size_t)n + 1, sizeof *server->key_names);
  if (!server->keys || !server->key_names) return false;
  for (int i = 0; i < n; i++) {
    const char *name = server->options.api_key_names ? server->options.api_key_names[i] : NULL;
    SHA256((const unsigned char *)server->options.api_keys[i], strlen(server->options.api_keys[i]), server->keys[i]);
    if (name)
      snprintf(server->key_names[i], sizeof server->key_names[i], "%s", name);
    else
      snprintf(server->key_names[i], sizeof server->key_names[i], "key-%d", i + 1);
  }
  return true;
}

void access_close(struct server *server) {
  free(server->keys);
  free(server->key_names);
}

static const char *header(const struct exchange *ex, const char *name) {
  return MHD_lookup_connection_value(ex->connection, MHD_HEADER_KIND, name);
}

bool access_key(struct exchange *ex, struct refusal *refusal) {
  const struct server *server = ex->server;
  if (server->options.n_api_keys == 0) return true;
  const char *given = header(ex, "Authorization");
  if (given) given = strncasecmp(given, "Bearer ", 7) == 0 ? given + 7 + strspn(given + 7, " ") : NULL;
  if (!given) given = header(ex, "x-api-key");
  if (!given)
    return refuse(refusal, 401, "invalid_api_key", NULL, "an API key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'");
  unsigned char digest[32];
  SHA256((const unsigned char *)given, strlen(given), digest);
  for (int i = 0; i < server->options.n_api_keys; i++)
    if (CRYPTO_memcmp(digest, server->keys[i], sizeof digest) == 0) ex->key = i;
  return ex->key >= 0 || refuse(refusal, 401, "invalid_api_key", NULL, "this API key is not known here");
}

bool in_list(const char *list, const char *word) {
  const size_t length = strlen(word);
  for (const char *at = list; at && *at;) {
    const size_t n = strcspn(at, ",");
    if ((n == 1 && *at == '*') || (n == length && strncmp(at, word, n) == 0)) return true;
    at += n + (at[n] == ',');
  }
  return false;
}

/* The name in "name:port" or "[name]:port". */
static void host_name(const char *host, char *name, size_t room) {
  const bool bracket = *host == '[';
  snprintf(name, room, "%.*s", (int)strcspn(host + bracket, bracket ? "]" : ":"), host + bracket);
}

/* "127.0.0.1.example.org" begins like one. */
static bool is_loopback(const char *name) {
  struct in_addr address;
  return strcasecmp(name, "localhost") == 0 || strcmp(name, "::1") == 0 ||
         (inet_aton(name, &address) && ntohl(address.s_addr) >> 24 == 127);
}

/* A server that answers everybody on this machine must not answer the pages of a site that has given itself this machine's
 * address: such requests still carry the site's name. */
static bool host_is_expected(const struct exchange *ex, struct refusal *refusal) {
  const struct server_options *o = &ex->server->options;
  char name[256], origin[300];
  if (o->n_api_keys || o->unix_socket || !is_loopback(o->host)) return true;
  const char *host = header(ex, "Host");
  if (!host) return true; /* HTTP/1.0; no browser */
  host_name(host, name, sizeof name);
  if (is_loopback(name)) return true;
  snprintf(origin, sizeof origin, "https://%.255s", host);
  if (in_list(o->cors, origin)) return true;
  snprintf(origin, sizeof origin, "http://%.255s", host);
  return in_list(o->cors, origin) ||
         refuse(refusal, 403, "host_not_allowed", NULL,
                "this server without keys answers to localhost, not to %.100s (--cors names other hosts)", name);
}

/* A page that we served ourselves: its origin is where the request goes. */
static bool is_ours(const struct exchange *ex, const char *origin) {
  const char *host = header(ex, "Host"), *behind = strstr(origin, "://");
  return host && behind && strcasecmp(behind + 3, host) == 0;
}

bool access_origin(struct exchange *ex, struct refusal *refusal) {
  const char *origin = header(ex, "Origin");
  if (!host_is_expected(ex, refusal)) return false;
  if (!origin || is_ours(ex, origin)) return true;
  if (!in_list(ex->server->options.cors, origin))
    return refuse(refusal, 403, "origin_not_allowed", NULL, "pages of %.200s may not ask this server (--cors allows origins)",
                  origin);
  ex->origin_text = strdup(origin);
  ex->origin = ex->origin_text;
  return true;
}
