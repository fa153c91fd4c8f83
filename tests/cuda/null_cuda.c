// A CUDA runtime, cuBLAS and driver without a GPU: device memory is host memory, kernels do nothing, waits are counted. What PyTorch calls
// and is not here returns success (setup.sh). NULL_CUDA_DEVICES: how many devices (1); NULL_CUDA_CAPABILITY: of which kind (90).
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "cuda_runtime_api.h"

static long waits, launches;  // of the host for the device; of kernels and matrix products
long null_cuda_waits(void) { return waits; }
long null_cuda_launches(void) { return launches; }
static cudaError_t wait_(void) { __sync_fetch_and_add(&waits, 1); return 0; }
static cudaError_t launch(void) { __sync_fetch_and_add(&launches, 1); return 0; }

static int from_environment(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
static int capability(void) { return from_environment("NULL_CUDA_CAPABILITY", 90); }
static void *handle(void) { return calloc(1, 64); }

// Memory

static struct { char *start; size_t size; enum cudaMemoryType type; } ranges[1 << 16];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(void *start, size_t size, enum cudaMemoryType type) {
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < used && ranges[i].start) i++;
  if (i == 1 << 16) abort();
  if (i == used) used++;
  ranges[i].start = start, ranges[i].size = size, ranges[i].type = type;
  pthread_mutex_unlock(&lock);
}

static cudaError_t drop(void *start) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used; i++) if (ranges[i].start == start) ranges[i].start = 0;
  pthread_mutex_unlock(&lock);
  return 0;
}

static enum cudaMemoryType type_of(const char *p) {
  enum cudaMemoryType type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < used; i++)
    if (ranges[i].start && p >= ranges[i].start && p < ranges[i].start + ranges[i].size) { type = ranges[i].type; break; }
  pthread_mutex_unlock(&lock);
  return type;
}

static cudaError_t allocate(void **p, size_t size, enum cudaMemoryType type) {
  if (posix_memalign(p, 512, size)) return cudaErrorMemoryAllocation;
  memset(*p, 0, size);
  note(*p, size, type);
  return 0;
}

static cudaError_t release(void *p) { if (p) drop(p), free(p); return 0; }

cudaError_t cudaMalloc(void **p, size_t n) { return allocate(p, n, cudaMemoryTypeDevice); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return allocate(p, n, cudaMemoryTypeHost); }
cudaError_t cudaFreeHost(void *p) { return release(p); }
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) { note(p, n, cudaMemoryTypeHost); return 0; }
cudaError_t cudaHostUnregister(void *p) { return drop(p); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = type_of(p), a->devicePointer = a->hostPointer = (void *)p;
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) { *total = 80ull << 30, *unused = 78ull << 30; return 0; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind k) { memmove(to, from, n); return wait_(); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, cudaStream_t s) { memmove(to, from, n); return 0; }
cudaError_t cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return 0; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) { memset(p, value, n); return 0; }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { static char room[1 << 20]; *p = room; return 0; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *h, void *p) { return cudaErrorNotSupported; }

// The device

static __thread int device;

static int attribute(int which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return capability() / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability() % 10;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    default: return 0;
  }
}

cudaError_t cudaGetDeviceCount(int *n) { *n = from_environment("NULL_CUDA_DEVICES", 1); return 0; }
cudaError_t cudaGetDevice(int *d) { *d = device; return 0; }
cudaError_t cudaSetDevice(int d) { device = d; return 0; }
cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return 0; }
cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return 0; }
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr which, int d) { *v = attribute(which); return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "CUDA stand-in without a GPU");
  p->major = capability() / 10, p->minor = capability() % 10;
  p->totalGlobalMem = 80ull << 30, p->l2CacheSize = 50 << 20;
  p->multiProcessorCount = 132, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->textureAlignment = 512, p->unifiedAddressing = 1;
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0, *high = -5; return 0; }
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) { strncpy(s, "0000:00:00.0", n); return 0; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
const char *cudaGetErrorString(cudaError_t e) { return "error of the CUDA stand-in"; }
const char *cudaGetErrorName(cudaError_t e) { return "cudaStandInError"; }

// Streams, events, kernels

cudaError_t cudaStreamSynchronize(cudaStream_t s) { return wait_(); }
cudaError_t cudaDeviceSynchronize(void) { return wait_(); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return wait_(); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return 0; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = handle(); return 0; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { *s = handle(); return 0; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) { *c = 0; return 0; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *c, unsigned long long *id, cudaGraph_t *g,
                                     const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
  *c = 0;
  if (id) *id = 0;
  if (n) *n = 0;
  return 0;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { *p = 0; return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = handle(); return 0; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return 0; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return 0; }
int __cudaLaunchKernel(void *f, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) { return launch(); }
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) { return launch(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->binaryVersion = a->ptxVersion = capability();
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared, unsigned flags) { *n = 2; return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, enum cudaDriverEntryPointQueryResult *r) {
  *f = 0;
  if (r) *r = cudaDriverEntryPointSymbolNotFound;
  return 0;
}

// cuBLAS

int cublasCreate_v2(void **h) { *h = handle(); return 0; }
int cublasGetMathMode(void *h, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *h, int *mode) { *mode = 0; return 0; }
int cublasGemmEx(void) { return launch(); }
int cublasGemmStridedBatchedEx(void) { return launch(); }
int cublasSgemm_v2(void) { return launch(); }
int cublasLtMatmul(void) { return launch(); }
int cublasLtMatmulDescCreate(void **d, int compute, int scale) { *d = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **d, int type, unsigned long rows, unsigned long columns, long ld) { *d = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **d) { *d = handle(); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *o, void *a, void *b, void *c, void *d, void *p, int n, void *r, int *found) { *found = 1; return 0; }
unsigned long cublasLtGetVersion(void) { return 130100; }

// The driver: asked for the context by autograd, for everything by Triton

static int context, function;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *v) { *v = CUDART_VERSION; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "error of the CUDA stand-in"; return 0; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetCount(int *n) { return cudaGetDeviceCount(n); }
int cuDeviceGetAttribute(int *v, int which, int d) { *v = attribute(which); return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxGetLimit(unsigned long *v, int limit) { *v = 0; return 0; }
int cuCtxSetLimit(int limit, unsigned long v) { return 0; }
int cuPointerGetAttribute(void *v, int which, unsigned long long p) { *(long *)v = 0; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = &function; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &function; return 0; }
int cuFuncGetAttribute(int *v, int which, void *f) { *v = which ? 0 : 1024; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 2; return 0; }
int cuOccupancyMaxActiveClusters(int *n) { *n = 1; return 0; }
int cuLaunchKernel(void) { return launch(); }
int cuLaunchKernelEx(void) { return launch(); }
int cuModuleUnload(void *m) { return 0; }
int cuFuncSetAttribute(void *f, int which, int v) { return 0; }
int cuFuncSetCacheConfig(void *f, int config) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
