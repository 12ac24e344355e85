/*
 * serve.c - `oscar serve`: a model over HTTP.
 *
 * A configuration file is a JSON object with the long names of the options. It is turned into arguments that come before those of
 * the command line, so that both are checked by the same table and the command line has the last word.
 */
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"
#include "cli/sessions.h"
#include "server/frontend.h"
#include "server/server.h"

#include <ctype.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const struct usage usage = {
    .command = "serve",
    .operands = "",
    .about =
        "Serves a model over HTTP: OpenAI's chat completions, completions and responses, Anthropic's messages, sessions, "
        "numbers\n"
        "for Prometheus and a page. Many requests run at once over one cache. docs/serving.md describes endpoints and fields.",
    .examples = "oscar serve -m smollm2-135m\n"
                "oscar serve -m qwen2.5-coder-1.5b -c 32768 --kv-memory 4G --parallel 16\n"
                "oscar serve -m model.gguf --host 0.0.0.0 --port 8000 --api-key-file keys.txt\n"
                "oscar serve --config serve.json --port 9000\n",
};

struct serve_arguments {
  struct server_options server;
  struct service_options service;
  const char *reuse, *folder, *config, *api_key, *api_key_file, *access_log;
  struct speculation_arguments speculation;
  /* what the options point to */
  int32_t visible[8];
  char sessions[PATH_MAX], model_name[256];
};

static const char *reuse_name(int i) {
  static const char *const names[] = {
      [OSCAR_PREFIX_OFF] = "off", [OSCAR_PREFIX_EXACT] = "exact", [OSCAR_PREFIX_REFILL] = "refill"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

static const char *template_choice(int i) {
  static const char *const names[] = {"auto", "chatml", "llama3", "gemma", "mistral"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

static const char *access_log_name(int i) {
  static const char *const names[] = {[ACCESS_LOG_OFF] = "off", [ACCESS_LOG_TEXT] = "text", [ACCESS_LOG_JSON] = "json"};
  return (size_t)i < ARRAY_LENGTH(names) ? names[i] : NULL;
}

#define SERVE(field)   offsetof(struct serve_arguments, field)
#define SERVER(field)  offsetof(struct serve_arguments, server.field)
#define SERVICE(field) offsetof(struct serve_arguments, service.field)

static const struct option_spec address_options[] = {
    {"config", 0, OPTION_TEXT, SERVE(config), "FILE",
     .help = "a JSON object with options by their long names; the command line overrules it", .default_text = "none"},
    {"host", 0, OPTION_TEXT, SERVER(host), "ADDRESS", .help = "the address to listen at; 0.0.0.0: all"},
    {"port", 0, OPTION_INT, SERVER(port), "N", .help = "the port; 0: one that is free", 0, 65535},
    {"unix-socket", 0, OPTION_TEXT, SERVER(unix_socket), "PATH", .help = "listens at a Unix socket instead",
     .default_text = "none"},
    {"api-key", 0, OPTION_TEXT, SERVE(api_key), "KEYS",
     .help = "keys that may ask, by commas; other users of this machine can see "
             "them, which they cannot with --api-key-file",
     .default_text = "everybody may ask"},
    {"api-key-file", 0, OPTION_TEXT, SERVE(api_key_file), "FILE",
     .help = "keys that may ask, one a line, with a name before it for the access log if there are two words",
     .default_text = "none"},
    {"cors", 0, OPTION_TEXT, SERVER(cors), "ORIGINS",
     .help = "origins whose pages may ask, by commas, such as https://example.org; '*': all",
     .default_text = "only the server's own page"},
    {"alias", 0, OPTION_TEXT, SERVER(aliases), "NAMES",
     .help = "other names that requests may call the model, by commas; '*': any", .default_text = "none"},
    {"chat-template", 0, OPTION_TEXT, SERVER(chat_template), "NAME", .help = "auto, chatml, llama3, gemma or mistral",
     .choice = template_choice},
};

static const struct option_spec service_options[] = {
    {"parallel", 0, OPTION_INT, SERVICE(max_running), "N", .help = "requests that run at once", 1, 4096},
    {"queue", 0, OPTION_INT, SERVICE(max_waiting), "N", .help = "requests that may wait; more are refused (429)", 0, 1 << 20},
    {"prefix-reuse", 0, OPTION_TEXT, SERVE(reuse), "HOW",
     .help =
         "what has been processed is not processed again: exact (where the result is that of a cold run), refill (wherever it is "
         "known; up to 319 tokens are computed again over codes), off",
     .choice = reuse_name},
    {"host-memory", 0, OPTION_SIZE, SERVICE(host_bytes), "SIZE",
     .help = "memory for sessions and requests that had to leave the cache"},
    {"disk-memory", 0, OPTION_SIZE, SERVICE(disk_bytes), "SIZE", .help = "room for sessions in files",
     .default_text = "no limit"},
    {"dir", 0, OPTION_TEXT, SERVE(folder), "DIR", .help = "the folder of sessions; 'none': they end with the server",
     .default_text = "sessions in the user's data folder, as of 'oscar session'"},
};

static const struct option_spec log_options[] = {
    {"access-log", 0, OPTION_TEXT, SERVE(access_log), "FORM", .help = "a line for each request: off, text or json",
     .choice = access_log_name},
    {"access-log-file", 0, OPTION_TEXT, SERVER(access_log_file), "FILE",
     .help = "where lines are added; SIGHUP opens the file again, after it was renamed", .default_text = "standard error"},
};

static const struct option_spec limit_options[] = {
    {"body-limit", 0, OPTION_SIZE, SERVER(body_bytes), "SIZE", .help = "of a request"},
    {"header-limit", 0, OPTION_SIZE, SERVER(header_bytes), "SIZE", .help = "of a request's head"},
    {"stream-limit", 0, OPTION_SIZE, SERVER(stream_bytes), "SIZE",
     .help = "of an answer that a client does not read; then it is cancelled"},
    {"connections", 0, OPTION_INT, SERVER(connections), "N", .help = "at once", 1, 100000},
    {"address-connections", 0, OPTION_INT, SERVER(address_connections), "N", .help = "of one address at once; 0: no limit", 0,
     100000},
    {"idle-timeout", 0, OPTION_INT, SERVER(idle_s), "S", .help = "seconds after which a silent connection is closed", 1, 86400},
    {"request-timeout", 0, OPTION_INT, SERVER(request_s), "S", .help = "seconds for a whole answer; 0: no limit", 0, 86400},
    {"stop-timeout", 0, OPTION_INT, SERVER(stop_s), "S", .help = "seconds that answers get to end when the server stops", 0,
     3600},
    {"workers", 0, OPTION_INT, SERVER(workers), "N", .help = "threads that read requests and tokenize", 1, 64},
    {"stored-responses", 0, OPTION_INT, SERVER(stored_responses), "N", .help = "answers of /v1/responses that are kept", 0,
     1 << 20},
};

/* ---- the configuration file ---- */

/* The arguments of the command line with those of the file before them. */
struct arguments {
  char **list; /* [count], ended by NULL */
  char **made; /* [n_made], of them those to be freed */
  int count, n_made;
};

static const char *config_path(int argc, char **argv) {
  const char *path = NULL;
  for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++) {
    if (strncmp(argv[i], "--config=", 9) == 0) path = argv[i] + 9;
    if (strcmp(argv[i], "--config") == 0 && i + 1 < argc) path = argv[++i];
  }
  return path;
}

/* "--name=value"; NULL: the value is of no use, or memory is out. */
static char *argument_of(const char *name, const json_t *value) {
  char *text = NULL;
  int n = -1;
  if (json_is_string(value)) n = asprintf(&text, "--%s=%s", name, json_string_value(value));
  if (json_is_integer(value)) n = asprintf(&text, "--%s=%lld", name, (long long)json_integer_value(value));
  if (json_is_real(value)) n = asprintf(&text, "--%s=%.17g", name, json_real_value(value));
  if (json_is_true(value)) n = asprintf(&text, "--%s", name);
  return n < 0 ? NULL : text;
}

static int read_config(const char *path, struct arguments *arguments) {
  json_error_t error;
  json_t *config = json_load_file(path, JSON_REJECT_DUPLICATES, &error), *value;
  if (!config && error.line < 1) return failed("%s", error.text); /* it names the file */
  if (!config) return failed("%s: line %d: %s", path, error.line, error.text);
  const char *name;
  int code = json_is_object(config) ? EXIT_DONE : wrong_use("%s: a configuration is a JSON object", path);
  arguments->made = calloc(json_object_size(config) + 1, sizeof *arguments->made);
  if (!arguments->made) code = failed("out of memory");
  json_object_foreach(config, name, value) {
    if (code != EXIT_DONE) break;
    if (json_is_false(value) || json_is_null(value)) continue;
    if (strcmp(name, "config") == 0 || !*name || !isalpha((unsigned char)*name))
      code = wrong_use("%s: '%s' is no option of a configuration", path, name);
    else if ((arguments->made[arguments->n_made] = argument_of(name, value)))
      arguments->n_made++;
    else
      code = wrong_use("%s: '%s' wants a text, a number, true or false", path, name);
  }
  json_decref(config);
  return code;
}

static void arguments_free(struct arguments *a) {
  for (int i = 0; i < a->n_made; i++) free(a->made[i]);
  free((void *)a->made);
  free((void *)a->list);
}

static int join_arguments(int argc, char **argv, struct arguments *a) {
  const char *path = config_path(argc, argv);
  int code = path ? read_config(path, a) : EXIT_DONE;
  if (code != EXIT_DONE) return code;
  a->list = calloc((size_t)(argc + a->n_made) + 1, sizeof *a->list);
  if (!a->list) return failed("out of memory");
  a->list[a->count++] = argv[0];
  for (int i = 0; i < a->n_made; i++) a->list[a->count++] = a->made[i];
  for (int i = 1; i < argc; i++) a->list[a->count++] = argv[i];
  return EXIT_DONE;
}

/* ---- API keys ---- */

struct keys {
  char *text;                 /* cut into keys */
  const char **list, **names; /* [count]; a name may be NULL */
  int count;
};

/* The name of a key is what comes before it, apart by spaces. */
static int name_key(struct keys *keys, char *word) {
  char *key = word + strcspn(word, " \t");
  keys->names[keys->count] = NULL;
  keys->list[keys->count++] = word;
  if (!*key) return EXIT_DONE;
  *key++ = '\0';
  key += strspn(key, " \t");
  if (!session_name_is_valid(word) || strpbrk(key, " \t"))
    return wrong_use("serve: line %d of the API keys is neither KEY nor NAME KEY, with a name of " SESSION_NAME_RULE,
                     keys->count);
  keys->names[keys->count - 1] = word;
  keys->list[keys->count - 1] = key;
  return EXIT_DONE;
}

/* The words of a text, by line ends (a file) or commas; spaces around them and empty ones do not count. */
static int cut_keys(struct keys *keys, char *text, const char *between) {
  for (char *rest = NULL, *word = strtok_r(text, between, &rest); word; word = strtok_r(NULL, between, &rest)) {
    word += strspn(word, " \t\r");
    for (size_t n = strlen(word); n > 0 && strchr(" \t\r", word[n - 1]); n--) word[n - 1] = '\0';
    if (!*word) continue;
    const char **larger = realloc((void *)keys->list, ((size_t)keys->count + 1) * sizeof *larger);
    if (!larger) return failed("out of memory");
    keys->list = larger;
    if (!(larger = realloc((void *)keys->names, ((size_t)keys->count + 1) * sizeof *larger))) return failed("out of memory");
    keys->names = larger;
    const int code = name_key(keys, word);
    if (code != EXIT_DONE) return code;
  }
  return EXIT_DONE;
}

static int read_keys(const struct serve_arguments *arguments, struct keys *keys) {
  size_t bytes;
  if (arguments->api_key && arguments->api_key_file)
    return wrong_use("serve: give keys with --api-key or --api-key-file, not both");
  if (!arguments->api_key && !arguments->api_key_file) return EXIT_DONE;
  if (arguments->api_key_file && !read_text(arguments->api_key_file, &keys->text, &bytes)) return EXIT_FAILED;
  if (arguments->api_key) keys->text = strdup(arguments->api_key);
  if (!keys->text) return failed("out of memory");
  int code = cut_keys(keys, keys->text, arguments->api_key ? "," : "\n");
  if (code == EXIT_DONE && keys->count == 0) code = wrong_use("serve: there is no API key in what was given");
  return code;
}

/* ---- running ---- */

struct serving {
  struct serve_arguments *arguments;
  struct engine *engine;
  struct service *service;
  struct server *server;
};

/* The model's file without its folders and ending. */
static void name_model(const char *path, char *name, size_t room) {
  snprintf(name, room, "%s", last_part(path));
  const size_t n = strlen(name);
  if (n > 5 && strcmp(name + n - 5, ".gguf") == 0) name[n - 5] = '\0';
}

/* Those of `oscar session`, unless told otherwise. */
static oscar_status choose_folder(struct serving *s) {
  const char *given = s->arguments->folder;
  if (given && strcmp(given, "none") == 0) return OSCAR_OK;
  s->arguments->service.folder = s->arguments->sessions;
  return sessions_folder(s->engine->context, given, s->arguments->sessions, sizeof s->arguments->sessions);
}

/* Control tokens that answers are searched for. */
static oscar_status choose_visible(struct serving *s) {
  struct frontend frontend;
  char error[512];
  oscar_status status =
      frontend_open(s->engine->options.model_path, s->arguments->server.chat_template, &frontend, error, sizeof error);
  if (status != OSCAR_OK) return set_error(s->engine->context, status, "%s", error);
  if (!frontend.has_chat) note("conversations are refused: %s", frontend.no_chat);
  if (frontend.has_chat) {
    s->arguments->service.n_visible = chat_template_visible(&frontend.chat, frontend.tokenizer, s->arguments->visible,
                                                            (int)ARRAY_LENGTH(s->arguments->visible));
    s->arguments->service.visible = s->arguments->visible;
  }
  frontend_close(&frontend);
  return OSCAR_OK;
}

static void print_choices(const struct serving *s) {
  const struct server_options *o = &s->arguments->server;
  char backend[512], budget[32];
  oscar_cache_usage cache;
  oscar_cache_usage_get(s->engine->cache, &cache);
  s->engine->backend->ops->describe(s->engine->backend, backend, sizeof backend);
  fprintf(stderr, "%s: %s, context %lld, cache %s, %d at once, %d may wait\n", s->arguments->model_name, s->engine->options.kv,
          (long long)s->engine->options.context, format_bytes((double)cache.budget_bytes, budget, sizeof budget),
          s->arguments->service.max_running, s->arguments->service.max_waiting);
  fprintf(stderr, "computed by %s\n", backend);
  fprintf(stderr, "sessions: %s; prefix reuse: %s; API keys: %d\n",
          s->arguments->service.folder ? s->arguments->service.folder : "not kept", s->arguments->reuse, o->n_api_keys);
  if (!o->unix_socket && !o->n_api_keys && strncmp(o->host, "127.", 4) != 0 && strcmp(o->host, "localhost") != 0 &&
      strcmp(o->host, "::1") != 0)
    note("everybody who reaches %s may ask; --api-key-file restricts that", o->host);
  fprintf(stderr, "listening at %s\n", server_address(s->server));
}

/* Until a signal asks for the end; a second one ends the program at once (interrupt.c). */
static void wait_for_the_end(struct server *server) {
  const struct timespec pause = {.tv_nsec = 100000000};
  while (!interrupt_requested()) {
    if (hangup_taken()) server_reopen_log(server);
    nanosleep(&pause, NULL);
  }
}

static oscar_status serve(struct serving *s, char *error, size_t room) {
  struct serve_arguments *a = s->arguments;
  name_model(s->engine->options.model_path, s->arguments->model_name, sizeof s->arguments->model_name);
  a->server.model_path = s->engine->options.model_path;
  a->server.model_name = s->arguments->model_name;
  a->server.kv = s->engine->options.kv;
  a->server.context = s->engine->options.context;
  oscar_status status = choose_folder(s);
  if (status == OSCAR_OK) status = choose_visible(s);
  if (status == OSCAR_OK) status = service_create(s->engine, &a->service, &s->service);
  if (status != OSCAR_OK) {
    snprintf(error, room, "%s", oscar_last_error(s->engine->context));
    return status;
  }
  status = server_create(&a->server, s->service, &s->server, error, room);
  if (status == OSCAR_OK) {
    print_choices(s);
    wait_for_the_end(s->server);
    fprintf(stderr, "stopping: sessions are saved and answers end\n");
  }
  server_free(s->server);
  service_free(s->service);
  return status;
}

static int open_and_serve(struct serve_arguments *arguments, const struct engine_options *given) {
  struct engine_options options = *given;
  interrupt_watch();
  signal(SIGPIPE, SIG_IGN);
  if (arguments->server.access_log_file) hangup_watch();
  struct progress_line line;
  progress_begin(&line);
  options.progress = &line.progress;
  struct engine engine;
  struct serving serving = {.arguments = arguments, .engine = &engine};
  char error[1024];
  oscar_status status = engine_open(&options, &engine, error, sizeof error);
  progress_end(&line);
  if (status == OSCAR_OK) {
    status = serve(&serving, error, sizeof error);
    engine_close(&engine);
  }
  return status == OSCAR_OK ? EXIT_DONE : failed_with(status, error);
}

/* What speculation_group was given, as options of the service: its requests are what guesses, not the engine's own sessions. */
static int choose_speculation(struct serve_arguments *a, struct engine_options *options, char *path, size_t room) {
  const int code = speculation_resolve("serve", &a->speculation, options, path, room);
  a->service.speculation = options->draft_path ? SPECULATION_DRAFT : options->guesses > 0 ? SPECULATION_LOOKUP : SPECULATION_OFF;
  a->service.candidates = options->guesses;
  a->service.draft_model = options->draft_path;
  options->guesses = 0;
  options->draft_path = NULL;
  return code;
}

static int parse_and_serve(int argc, char **argv) {
  struct engine_options options;
  struct serve_arguments serve_options = {.reuse = "refill", .access_log = "off"};
  engine_options_default(&options);
  server_options_default(&serve_options.server);
  service_options_default(&serve_options.service);
  const struct option_group groups[] = {
      model_group(&options),
      {"Address and access", address_options, (int)ARRAY_LENGTH(address_options), &serve_options},
      {"Requests", service_options, (int)ARRAY_LENGTH(service_options), &serve_options},
      speculation_group(&serve_options.speculation),
      cache_group(&options),
      sampling_group(&serve_options.server.sampling),
      {"Log", log_options, (int)ARRAY_LENGTH(log_options), &serve_options},
      {"Limits", limit_options, (int)ARRAY_LENGTH(limit_options), &serve_options}};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  if (serve_options.config && !config_path(argc, argv)) return wrong_use("serve: write --config in full");
  char path[PATH_MAX], draft_path[PATH_MAX];
  if ((code = engine_options_resolve("serve", &options, path, sizeof path)) != EXIT_DONE) return code;
  if ((code = choose_speculation(&serve_options, &options, draft_path, sizeof draft_path)) != EXIT_DONE) return code;
  for (int i = 0; reuse_name(i); i++)
    if (strcmp(reuse_name(i), serve_options.reuse) == 0) serve_options.service.reuse = (oscar_prefix_reuse)i;
  options.knows_prefixes = serve_options.service.reuse != OSCAR_PREFIX_OFF;
  for (int i = 0; access_log_name(i); i++)
    if (strcmp(access_log_name(i), serve_options.access_log) == 0) serve_options.server.access_log = (enum access_log_form)i;
  if (serve_options.server.access_log_file && serve_options.server.access_log == ACCESS_LOG_OFF)
    return wrong_use("serve: --access-log-file wants --access-log text or json");
  struct keys keys = {0};
  code = read_keys(&serve_options, &keys);
  serve_options.server.api_keys = keys.list;
  serve_options.server.api_key_names = keys.names;
  serve_options.server.n_api_keys = keys.count;
  if (code == EXIT_DONE) code = open_and_serve(&serve_options, &options);
  free((void *)keys.list);
  free((void *)keys.names);
  free(keys.text);
  return code;
}

int command_serve(int argc, char **argv) {
  struct arguments arguments = {0};
  int code = join_arguments(argc, argv, &arguments);
  if (code == EXIT_DONE) code = parse_and_serve(arguments.count, arguments.list);
  arguments_free(&arguments);
  return code;
}
