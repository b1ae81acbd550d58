/* Guest addresses to host memory, and copies between the two; see memory_api.h. */

#include <errno.h>
#include <string.h>

#include "guard.h"
#include "memory.h"

/* The host address of `address`, with `*length` cut down to what follows it in the same region; NULL if in none. */
static char *piece(const struct vu_memory *memory, uint64_t address, uint64_t *length)
{
	size_t low = 0, high = memory->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;
		const struct vu_region *region = &memory->regions[middle];
		uint64_t offset = address - region->guest;

		if (address < region->guest) {
			high = middle;
		} else if (offset < region->size) {
			if (*length > region->size - offset)
				*length = region->size - offset;
			return (char *)region->host + offset;
		} else {
			low = middle + 1;
		}
	}
	return NULL;
}

void *vu_memory_at(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int alignment)
{
	uint64_t found = length;
	char *host = piece(memory, address, &found);

	if (!host || found < length || address % alignment || (uintptr_t)host % alignment)
		return NULL;
	return host;
}

int vu_memory_covers(const struct vu_memory *memory, uint64_t address, uint64_t length)
{
	if (length && address + (length - 1) < address)
		return false;
	while (length) {
		uint64_t here = length;

		if (!piece(memory, address, &here))
			return false;
		address += here;
		length -= here;
	}
	return true;
}

int read_memory(const struct vu_memory *memory, uint64_t address, void *to, uint64_t length)
{
	char *next = to;

	if (!vu_memory_covers(memory, address, length))
		return -EFAULT;
	while (length) {
		uint64_t here = length;
		const char *host = piece(memory, address, &here);

		memcpy(next, host, here);
		next += here;
		address += here;
		length -= here;
	}
	return 0;
}

int write_memory(const struct vu_memory *memory, uint64_t address, const void *from, uint64_t length)
{
	const char *next = from;

	if (!vu_memory_covers(memory, address, length))
		return -EFAULT;
	while (length) {
		uint64_t here = length;
		char *host = piece(memory, address, &here);

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
	return vu_memory_at(memory, address, length, alignment) != NULL;
}

int64_t vu_load16(const struct vu_memory *memory, uint64_t address)
{
	void *at = vu_memory_at(memory, address, 2, 2);

	return at ? GUARDED(int64_t, load16(at), -EFAULT) : -EFAULT;
}

int64_t vu_load32(const struct vu_memory *memory, uint64_t address)
{
	void *at = vu_memory_at(memory, address, 4, 4);

	return at ? GUARDED(int64_t, load32(at), -EFAULT) : -EFAULT;
}

int vu_store16(const struct vu_memory *memory, uint64_t address, uint16_t value)
{
	void *at = vu_memory_at(memory, address, 2, 2);

	return at ? GUARDED(int, (store16(at, value), 0), -EFAULT) : -EFAULT;
}

int vu_store32(const struct vu_memory *memory, uint64_t address, uint32_t value)
{
	void *at = vu_memory_at(memory, address, 4, 4);

	return at ? GUARDED(int, (store32(at, value), 0), -EFAULT) : -EFAULT;
}

void vu_fence(void)
{
	full_fence();
}
