// A PJRT plugin that calls itself "cuda", for tests: that of XLA:CPU in another one's library, or one that does nothing.
//
// MARKSTEP_TEST_PLUGIN names the other library, MARKSTEP_TEST_MINOR the version 0.<minor> that this one says it has.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD = 5, CREATE = HEAD + 10, PLATFORM_NAME = HEAD + 12, EXECUTE = HEAD + 55, WORDS = 256 };

static uintptr_t api[WORDS] = {HEAD * 8 + 100 * 8};  // its size, extensions, the version in three words, functions
static void *(*create)(void *), *(*execute)(void *);

// arguments: size, extensions, options, their number, ...; XLA:CPU does not know those of a GPU, and has several devices
static void *create_one_device(uintptr_t *arguments) {
  // size, extensions, name, its length, the type int64, the value, its length
  static uintptr_t option[7] = {sizeof option, 0, (uintptr_t) "cpu_device_count", 16, 1, 1, 1};
  arguments[2] = (uintptr_t)option;
  arguments[3] = 1;
  return create(arguments);
}

// arguments: size, extensions, client; results: name, its length
static void *platform_name(uintptr_t *arguments) {
  arguments[3] = (uintptr_t)"cuda";
  arguments[4] = 4;
  return NULL;
}

// arguments: size, extensions, executable, options, ...; a newer plugin wants longer options than torch_xla has
static void *execute_padded(uintptr_t *arguments) {
  uintptr_t *given = (uintptr_t *)arguments[3], padded[32] = {0};
  memcpy(padded, given, given[0]);
  padded[0] = sizeof padded;
  arguments[3] = (uintptr_t)padded;
  void *error = execute(arguments);
  arguments[3] = (uintptr_t)given;
  return error;
}

const void *GetPjrtApi(void) {
  const char *other = getenv("MARKSTEP_TEST_PLUGIN"), *minor = getenv("MARKSTEP_TEST_MINOR");
  if (other && !execute) {
    void *library = dlopen(other, RTLD_LAZY | RTLD_LOCAL);
    if (!library) {
      fprintf(stderr, "%s\n", dlerror());
      exit(1);
    }
    const uintptr_t *real = ((const uintptr_t *(*)(void))dlsym(library, "GetPjrtApi"))();
    memcpy(api, real, real[0] < sizeof api ? real[0] : sizeof api);
    create = (void *(*)(void *))api[CREATE];
    execute = (void *(*)(void *))api[EXECUTE];
    api[CREATE] = (uintptr_t)create_one_device;
    api[EXECUTE] = (uintptr_t)execute_padded;
    api[PLATFORM_NAME] = 0;
  }
  // Once: a caller may have replaced it since.
  if (!api[PLATFORM_NAME]) api[PLATFORM_NAME] = (uintptr_t)platform_name;
  api[4] = (uintptr_t)(minor ? atoi(minor) : 75) << 32;  // int32 major, int32 minor
  return api;
}
