/* libcuda in ordinary memory, for tests of what calls the driver: it keeps count of everything that lives and refuses
   calls without a current context. Graphs record nothing; launching one is counted. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CONTEXT if (depth < 1) return 201
typedef unsigned long long u64;
static int live, depth, retained, capturing, launches, fail_alloc;

int stub_live(void) { return live; }
int stub_depth(void) { return depth; }
int stub_retained(void) { return retained; }
int stub_capturing(void) { return capturing; }
int stub_launches(void) { return launches; }
void stub_fail_alloc(int on) { fail_alloc = on; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index == 0 ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Stub", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 18; return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 8ull << 30; return 0; }
int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR_STUB";
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &depth; retained++; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { retained--; return 0; }
int cuCtxPushCurrent_v2(void *context) { if (context != &depth) return 201; depth++; return 0; }
int cuCtxPopCurrent_v2(void **context) { CONTEXT; *context = &depth; depth--; return 0; }

static int make(void **handle, size_t size) { CONTEXT; *handle = malloc(size); live++; return 0; }
static int drop(void *handle) { CONTEXT; free(handle); live--; return 0; }
int cuMemAlloc_v2(void **address, size_t size) { return fail_alloc ? 2 : make(address, size); }
int cuMemFree_v2(void *address) { return drop(address); }
int cuMemAllocHost_v2(void **address, size_t size) { return make(address, size); }
int cuMemFreeHost(void *address) { return drop(address); }
int cuStreamCreate(void **stream, unsigned flags) { return flags == 1 ? make(stream, 8) : 1; }
int cuStreamDestroy_v2(void *stream) { return drop(stream); }
int cuStreamSynchronize(void *stream) { CONTEXT; return stream ? 0 : 400; }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t size, void *stream) { CONTEXT; memcpy(to, from, size); return 0; }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t size, void *stream) { CONTEXT; memcpy(to, from, size); return 0; }
int cuEventCreate(void **event, unsigned flags) { return make(event, sizeof(struct timespec)); }
int cuEventDestroy_v2(void *event) { return drop(event); }
int cuEventRecord(void *event, void *stream) { CONTEXT; clock_gettime(CLOCK_MONOTONIC, event); return 0; }
int cuEventSynchronize(void *event) { CONTEXT; return 0; }
int cuEventElapsedTime(float *ms, void *start, void *end) {
  struct timespec *a = start, *b = end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
  return 0;
}
int cuStreamBeginCapture_v2(void *stream, int mode) { CONTEXT; capturing++; return mode == 1 ? 0 : 1; }
int cuStreamEndCapture(void *stream, void **graph) { capturing--; return make(graph, 8); }
int cuGraphDestroy(void *graph) { return drop(graph); }
int cuGraphInstantiateWithFlags(void **executable, void *graph, u64 flags) { return make(executable, 8); }
int cuGraphLaunch(void *executable, void *stream) { CONTEXT; launches++; return executable && stream ? 0 : 400; }
int cuGraphExecDestroy(void *executable) { return drop(executable); }
