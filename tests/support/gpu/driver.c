// NVIDIA's driver as far as parallel/runtime/gpu.py calls it, for tests: one GPU of 80 GiB.
//
// In the environment, each if it is there: MARKSTEP_TEST_GPUS, their number; MARKSTEP_TEST_FREE, GiB of free memory;
// MARKSTEP_TEST_CUDA, the version as the driver counts it (12080); MARKSTEP_TEST_INIT, what cuInit returns.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }

int cuInit(unsigned flags) { return number("MARKSTEP_TEST_INIT", 0); }
int cuDeviceGetCount(int *count) { return *count = number("MARKSTEP_TEST_GPUS", 1), 0; }
int cuDriverGetVersion(int *version) { return *version = number("MARKSTEP_TEST_CUDA", 12080), 0; }
int cuDeviceGet(int *device, int place) { return *device = place, 0; }
int cuDeviceGetName(char *name, int length, int device) { return strncpy(name, "NVIDIA Test", length), 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return number("MARKSTEP_TEST_FREE", 80) ? 0 : 2; }
int cuCtxPushCurrent_v2(void *context) { return 0; }
int cuCtxPopCurrent_v2(void **context) { return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
  *total = 80ul << 30;
  *free = (size_t)number("MARKSTEP_TEST_FREE", 80) << 30;
  return 0;
}
