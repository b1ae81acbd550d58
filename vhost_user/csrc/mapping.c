/* Memory at aligned addresses, and unmapped in good order; see mapping_api.h. */

#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include "guard_api.h"
#include "mapping_api.h"

/* Where the last one was mapped. */
static _Atomic uintptr_t last;

static int reserve_with(struct vu_mapping *mapping, uint64_t slack, uint64_t alignment)
{
	uint64_t size = mapping->size + slack;
	void *start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (start == MAP_FAILED)
		return -errno;
	mapping->reserved = (uintptr_t)start;
	mapping->reserved_size = size;
	mapping->address = (mapping->reserved + alignment - 1) & ~(uintptr_t)(alignment - 1);
	return 0;
}

/* Linux aligns what is large by itself, from 6.7 on. Otherwise the slack stays reserved, and is never populated. */
static int reserve(struct vu_mapping *mapping, uint64_t alignment)
{
	int result = reserve_with(mapping, 0, alignment);

	if (result || mapping->address == mapping->reserved)
		return result;
	munmap((void *)mapping->reserved, mapping->reserved_size);
	mapping->reserved_size = 0;
	return reserve_with(mapping, alignment, alignment);
}

/*
 * The memory without a reservation, where the last one was: what goes and comes finds its place again. Or elsewhere, if the
 * kernel happens to choose well. False where it did not, or refused.
 */
static bool map_at_once(struct vu_mapping *mapping, uint64_t alignment, int flags, int fd, int64_t offset)
{
	void *hint = (void *)atomic_load_explicit(&last, memory_order_relaxed);
	void *at = mmap(hint, mapping->size, PROT_READ | PROT_WRITE, flags, fd, offset);

	if (at == MAP_FAILED)
		return false;
	mapping->address = mapping->reserved = (uintptr_t)at;
	mapping->reserved_size = mapping->size;
	if (mapping->address & (alignment - 1)) {
		vu_unmap(mapping);
		return false;
	}
	return true;
}

static int map_reserved(struct vu_mapping *mapping, uint64_t alignment, int flags, int fd, int64_t offset)
{
	int result = reserve(mapping, alignment);
	void *at = (void *)mapping->address;

	if (result)
		return result;
	mapping->step = VU_MAP;
	return mmap(at, mapping->size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, offset) == MAP_FAILED ? -errno : 0;
}

static int guard(struct vu_mapping *mapping, uint64_t page_size)
{
	int result = vu_guard_install();

	if (!result)
		result = vu_guard_add(mapping->address, mapping->size, page_size);
	if (result < 0)
		return result;
	mapping->guard_slot = result;
	return 0;
}

int vu_map(struct vu_mapping *mapping, uint64_t size, uint64_t alignment, int flags, int fd, int64_t offset,
	   uint64_t guarded)
{
	int result = 0;

	*mapping = (struct vu_mapping){ .size = size, .guard_slot = -1, .step = VU_RESERVE };
	if (!map_at_once(mapping, alignment, flags, fd, offset))
		result = map_reserved(mapping, alignment, flags, fd, offset);
	atomic_store_explicit(&last, mapping->address, memory_order_relaxed);
	if (!result && guarded) {
		mapping->step = VU_GUARD;
		result = guard(mapping, guarded);
	}
	if (result)
		vu_unmap(mapping);
	return result;
}

void vu_unmap(struct vu_mapping *mapping)
{
	if (!mapping->reserved_size)
		return;
	munmap((void *)mapping->reserved, mapping->reserved_size);
	mapping->reserved_size = 0;
	if (mapping->guard_slot >= 0)
		vu_guard_remove(mapping->guard_slot);
	mapping->guard_slot = -1;
}

void vu_let_go(struct vu_mapping *mapping, const char *memory)
{
	(void)memory;
	vu_unmap(mapping);
}

int vu_mapping_dead(const struct vu_mapping *mapping)
{
	int slot = mapping->guard_slot;

	return mapping->reserved_size && slot >= 0 && vu_guard_dead(slot);
}
