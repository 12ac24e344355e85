/* fetch_command.c - `oscar fetch`: gets a model of the catalogue into the user's cache folder, or shows what there is. */
#include "cli/fetch.h"
#include "cli/models.h"
#include "cli/options.h"
#include "cli/progress.h"

#include <limits.h>
#include <string.h>
#include <unistd.h>

struct fetch_arguments {
  bool list;
};

static const struct option_spec options[] = {
    {"list", 'l', OPTION_FLAG, offsetof(struct fetch_arguments, list), NULL, .help = "the models there are, and which are here"},
};

static const struct usage usage = {
    .command = "fetch",
    .operands = "NAME",
    .min_operands = 0, /* --list has none */
    .max_operands = 1,
    .about = "Gets a model into the cache folder, where -m NAME finds it. A download that was cut off goes on where it stopped; "
             "the file is checked against a known SHA-256 before it gets its name.",
    .examples = "oscar fetch --list\n"
                "oscar fetch smollm2-135m\n",
};

static void print_list(const char *folder) {
  int count;
  const struct catalogue_model *models = catalogue_list(&count);
  printf("%-20s %-10s %-18s %s\n", "name", "size", "licence", "what it is");
  for (int i = 0; i < count; i++) {
    char path[PATH_MAX], size[32];
    bool here =
        (size_t)snprintf(path, sizeof path, "%s/%s.gguf", folder, models[i].name) < sizeof path && access(path, R_OK) == 0;
    printf("%-20s %-10s %-18s %s%s\n", models[i].name, format_bytes((double)models[i].bytes, size, sizeof size),
           models[i].licence, models[i].summary, here ? " (here)" : "");
  }
  printf("\nModels are kept in %s\n", folder);
}

static int unknown_model(const char *name) {
  const char *near = nearest_name(name, model_name, NULL);
  if (near) return failed("fetch: no model '%s' in the catalogue; did you mean %s?", name, near);
  return failed("fetch: no model '%s' in the catalogue ('oscar fetch --list' shows it)", name);
}

static int fetch(oscar_context *context, const char *name, const char *folder) {
  struct progress_line line;
  interrupt_watch();
  progress_begin(&line);
  oscar_status status = fetch_model(context, name, folder, &line.progress);
  progress_end(&line);
  if (status != OSCAR_OK) return failed_with(status, oscar_last_error(context));
  printf("%s/%s.gguf\n", folder, name);
  return EXIT_DONE;
}

int command_fetch(int argc, char **argv) {
  struct fetch_arguments a = {0};
  const struct option_group groups[] = {{"Options", options, (int)ARRAY_LENGTH(options), &a}};
  int first, code;
  if (!args_parse(&usage, groups, (int)ARRAY_LENGTH(groups), argc, argv, &first, &code)) return code;
  const char *name = first < argc ? argv[first] : NULL;
  if (!a.list && !name) return wrong_use("fetch: which model? 'oscar fetch --list' shows the names");
  if (!a.list && !catalogue_find(name)) return unknown_model(name);

  oscar_context *context;
  char folder[PATH_MAX];
  oscar_status status = oscar_context_create(NULL, &context);
  if (status != OSCAR_OK) return failed_with(status, NULL);
  status = models_folder(context, folder, sizeof folder);
  if (status != OSCAR_OK)
    code = failed_with(status, oscar_last_error(context));
  else if (a.list)
    print_list(folder);
  else
    code = fetch(context, name, folder);
  oscar_context_free(context);
  return code;
}
