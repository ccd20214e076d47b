/* libcuda.so.1 without a GPU: it says that it drives one A100, refuses the launches that a driver refuses, and hands
 * the others to Python. Triton's own driver.c is linked against it. */
#include <elf.h>
#include <stdlib.h>
#include <string.h>
#include "cuda.h"

#define EXPORT __attribute__((visibility("default")))

typedef struct {
  unsigned registers; /* of a thread */
  int dynamic_shared; /* opted in to, in bytes */
} Function;

typedef int (*LaunchCallback)(unsigned, unsigned, unsigned, unsigned, unsigned, unsigned long long, void **);
typedef int (*PointerCallback)(unsigned long long);

static LaunchCallback on_launch;
static PointerCallback is_device_pointer;
static int multiprocessors, shared_opt_in, shared_of_multiprocessor;
static const unsigned REGISTERS = 65536, SHARED_WITHOUT_OPT_IN = 49152;

EXPORT void emulator_setup(LaunchCallback launch, PointerCallback pointer, int processors, int opt_in, int all) {
  on_launch = launch;
  is_device_pointer = pointer;
  multiprocessors = processors;
  shared_opt_in = opt_in;
  shared_of_multiprocessor = all;
}

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
  case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
  case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES: *text = "too many resources requested for launch"; break;
  case CUDA_ERROR_ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
  case CUDA_ERROR_LAUNCH_FAILED: *text = "unspecified launch failure"; break;
  default: *text = "not supported by the emulator";
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = 12080; return CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return number == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 8; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_opt_in; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_of_multiprocessor; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = REGISTERS; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1410000; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 1215000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

/* A cubin is an ELF file; sh_info of a kernel's .text section has the number of registers in its top byte. */
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const char *bytes = image;
  if (memcmp(bytes, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  const Elf64_Ehdr *header = image;
  const Elf64_Shdr *sections = (const void *)(bytes + header->e_shoff);
  const char *names = bytes + sections[header->e_shstrndx].sh_offset;
  Function *function = calloc(1, sizeof *function);
  for (int i = 0; i < header->e_shnum; i++)
    if (!strncmp(names + sections[i].sh_name, ".text.", 6)) function->registers = sections[i].sh_info >> 24;
  *module = (CUmodule)function;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

static unsigned allocated_registers(const Function *function) { return (function->registers + 7) / 8 * 8; }

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  const Function *function = (const Function *)handle;
  unsigned registers = allocated_registers(function), warps = registers ? REGISTERS / (registers * 32) / 4 * 4 : 32;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 32 * (warps > 32 ? 32 : warps); break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) return CUDA_SUCCESS;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  if (value > shared_opt_in) return CUDA_ERROR_INVALID_VALUE;
  ((Function *)handle)->dynamic_shared = value;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !is_device_pointer(pointer)) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  const Function *function = (const Function *)handle;
  unsigned shared_limit = function->dynamic_shared ? function->dynamic_shared : SHARED_WITHOUT_OPT_IN;
  if (extra || config->numAttrs || config->blockDimY != 1 || config->blockDimZ != 1 || config->blockDimX > 1024)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->gridDimX > 2147483647u || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > shared_limit) return CUDA_ERROR_INVALID_VALUE;
  if (allocated_registers(function) * config->blockDimX > REGISTERS) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  return on_launch(config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->sharedMemBytes,
                   (unsigned long long)handle, parameters);
}
