// What a launcher asks of the CUDA runtime.
#include "emu_runtime.h"

extern "C" {

cudaError_t cudaGetLastError(void) {
  const int error = emu::launch_error;
  emu::launch_error = 0;
  return static_cast<cudaError_t>(error);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Four multiprocessors: a persistent kernel goes round its loop.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 0;
  return cudaSuccess;
}
}
