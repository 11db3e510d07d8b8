// Shared by the two libraries: the device that they simulate, its memory, and the counters.

#ifndef NULL_GPU_H
#define NULL_GPU_H

#include <stddef.h>

#define DEVICE_NAME "NVIDIA H100 80GB HBM3"
#define TOTAL_MEMORY 85000000000ull   // bytes of the device
#define RESERVED_MEMORY 500000000ull  // bytes of a CUDA context, which no program can allocate

// Compute capability 9.0 and its limits: CUDA C++ Programming Guide, technical specifications.
#define CAPABILITY_MAJOR 9
#define CAPABILITY_MINOR 0
#define MULTIPROCESSORS 132
#define WARP 32
#define THREADS_PER_BLOCK 1024
#define THREADS_PER_MULTIPROCESSOR 2048
#define BLOCKS_PER_MULTIPROCESSOR 32
#define BLOCK_Z 64
#define GRID_X 2147483647
#define GRID_YZ 65535
#define REGISTERS 65536
#define SHARED_PER_BLOCK 49152
#define SHARED_PER_BLOCK_OPTIN 232448
#define SHARED_PER_MULTIPROCESSOR 233472
#define CONSTANT_MEMORY 65536
#define L2_CACHE (50 << 20)
#define CLOCK_KHZ 1980000
#define MEMORY_CLOCK_KHZ 2619000
#define MEMORY_BUS_BITS 5120

// Value of a device attribute. The runtime and the driver number attributes alike.
int null_gpu_attribute(int attribute);

// A new handle, for a stream, an event, a module: never a valid address.
void *null_gpu_handle(void);

// Add one to a counter. `name` must be a literal.
void null_gpu_count(const char *name);

// Take bytes of the device's memory, or give them back (negative). Returns 0 if they don't fit.
int null_gpu_take(long long bytes);

// Address space that costs no memory until something is written there. Kinds: 'D'evice, 'P'inned.
void *null_gpu_map(size_t bytes, char kind);

#endif
