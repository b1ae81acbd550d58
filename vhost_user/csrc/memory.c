/* Guest addresses to host memory, and copies between the two; see memory_api.h. */

#include <errno.h>
#include <string.h>

#include "guard.h"
#include "memory.h"

/*
 * The host address of `address`, with `*length` cut down to what follows it in the same region; NULL if it is in none,
 * or in one that may not be accessed so.
 */
static char *piece(const struct vu_memory *memory, uint64_t address, uint64_t *length, unsigned int access)
{
	size_t low = 0, high = memory->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;
		const struct vu_region *region = &memory->regions[middle];
		uint64_t offset = address - region->guest;

		if (address < region->guest) {
			high = middle;
		} else if (offset < region->size) {
			if (region->denied & access)
				return NULL;
			if (*length > region->size - offset)
				*length = region->size - offset;
			return (char *)region->host + offset;
		} else {
			low = middle + 1;
		}
	}
	return NULL;
}

void *vu_memory_at(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int alignment,
		   unsigned int access)
{
	uint64_t found = length;
	char *host = piece(memory, address, &found, access);

	if (!host || found < length || (address | (uintptr_t)host) & (alignment - 1))
		return NULL;
	return host;
}

int vu_memory_lacks(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int access,
		    uint64_t *missing)
{
	uint64_t whole = length;

	*missing = address;
	if (piece(memory, address, &whole, access) && whole == length)
		return false;
	if (length && address + (length - 1) < address)
		return true;
	while (length) {
		uint64_t here = length;

		if (!piece(memory, *missing, &here, access))
			return true;
		*missing += here;
		length -= here;
	}
	return false;
}

int vu_memory_covers(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int access)
{
	uint64_t missing;

	return !vu_memory_lacks(memory, address, length, access, &missing);
}

int read_memory(const struct vu_memory *memory, uint64_t address, void *to, uint64_t length)
{
	uint64_t whole = length;
	char *next = to, *all = piece(memory, address, &whole, VU_READ);

	if (all && whole == length) {
		memcpy(to, all, length);
		return 0;
	}
	if (!vu_memory_covers(memory, address, length, VU_READ))
		return -EFAULT;
	while (length) {
		uint64_t here = length;
		const char *host = piece(memory, address, &here, VU_READ);

		memcpy(next, host, here);
		next += here;
		address += here;
		length -= here;
	}
	return 0;
}

int write_memory(const struct vu_memory *memory, uint64_t address, const void *from, uint64_t length)
{
	uint64_t whole = length;
	char *all = piece(memory, address, &whole, VU_WRITE);
	const char *next = from;

	if (all && whole == length) {
		memcpy(all, from, length);
		return 0;
	}
	if (!vu_memory_covers(memory, address, length, VU_WRITE))
		return -EFAULT;
	while (length) {
		uint64_t here = length;
		char *host = piece(memory, address, &here, VU_WRITE);

		memcpy(host, next, here);
		next += here;
		address += here;
		length -= here;
	}
	return 0;
}

int vu_memory_read(const struct vu_memory *memory, uint64_t address, void *to, uint64_t length)
{
	return GUARDED(int, read_memory(memory, address, to, length), -EFAULT);
}

int vu_memory_write(const struct vu_memory *memory, uint64_t address, const void *from, uint64_t length)
{
	return GUARDED(int, write_memory(memory, address, from, length), -EFAULT);
}

int vu_memory_contiguous(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int alignment)
{
	return vu_memory_at(memory, address, length, alignment, 0) != NULL;
}

int64_t vu_load16(const struct vu_memory *memory, uint64_t address)
{
	void *at = vu_memory_at(memory, address, 2, 2, VU_READ);

	return at ? GUARDED(int64_t, load16(at), -EFAULT) : -EFAULT;
}

int64_t vu_load32(const struct vu_memory *memory, uint64_t address)
{
	void *at = vu_memory_at(memory, address, 4, 4, VU_READ);

	return at ? GUARDED(int64_t, load32(at), -EFAULT) : -EFAULT;
}

int vu_store16(const struct vu_memory *memory, uint64_t address, uint16_t value)
{
	void *at = vu_memory_at(memory, address, 2, 2, VU_WRITE);

	return at ? GUARDED(int, (store16(at, value), 0), -EFAULT) : -EFAULT;
}

int vu_store32(const struct vu_memory *memory, uint64_t address, uint32_t value)
{
	void *at = vu_memory_at(memory, address, 4, 4, VU_WRITE);

	return at ? GUARDED(int, (store32(at, value), 0), -EFAULT) : -EFAULT;
}

void vu_fence(void)
{
	full_fence();
}
