/* What the rings need of guest memory beyond memory_api.h. Not seen by Python. */

#ifndef VU_MEMORY_H
#define VU_MEMORY_H

#include <endian.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory_api.h"

/*
 * Where a contiguous, aligned range lies in this process, or NULL; also where it may not be accessed so. `alignment` is a
 * power of two.
 */
void *vu_memory_at(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int alignment,
		   unsigned int access);

/* The copies of memory_api.h, for calls that are guarded as a whole. */
int read_memory(const struct vu_memory *memory, uint64_t address, void *to, uint64_t length);
int write_memory(const struct vu_memory *memory, uint64_t address, const void *from, uint64_t length);

static inline uint16_t load16(const void *at)
{
	return le16toh(atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_acquire));
}

static inline uint32_t load32(const void *at)
{
	return le32toh(atomic_load_explicit((const _Atomic uint32_t *)at, memory_order_acquire));
}

static inline void store16(void *at, uint16_t value)
{
	atomic_store_explicit((_Atomic uint16_t *)at, htole16(value), memory_order_release);
}

static inline void store32(void *at, uint32_t value)
{
	atomic_store_explicit((_Atomic uint32_t *)at, htole32(value), memory_order_release);
}

static inline void full_fence(void)
{
	atomic_thread_fence(memory_order_seq_cst);
}

#endif
