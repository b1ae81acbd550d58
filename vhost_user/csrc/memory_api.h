/*
 * Guest memory as the C core sees it: a table of regions that never changes once it is made. Each call walks the one
 * table that it was given, so a table may be replaced at any moment, and is freed when the last call is done with it.
 */

/* What somebody wants to do with guest memory, as bits. */
enum vu_access { VU_READ = 1, VU_WRITE = 2 };

/*
 * `size` bytes from guest address `guest`, mapped at `host` in this process. For what its bits of `enum vu_access` in
 * `denied` are, the region is not there: 0 but for memory behind an IOMMU.
 */
struct vu_region {
	uint64_t guest, size;
	uintptr_t host;
	uint64_t denied;
};

/* Sorted by guest address; no region is empty, overlaps another or wraps past 2^64. */
struct vu_memory {
	size_t count;
	struct vu_region regions[];
};

/*
 * Copies that may cross from one region into the next. -EFAULT, and nothing copied, where a part lies in no region;
 * -EFAULT too, with the copy cut short, where the host has no memory behind a region (see guard_api.h).
 */
int vu_memory_read(const struct vu_memory *memory, uint64_t address, void *to, uint64_t length);
int vu_memory_write(const struct vu_memory *memory, uint64_t address, const void *from, uint64_t length);

/* Whether every byte of the range lies in some region that lets it be accessed so. */
int vu_memory_covers(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int access);

/* Whether it does not; and then `*missing` is the first address that doesn't. */
int vu_memory_lacks(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int access,
		    uint64_t *missing);

/* Whether the range lies in one region and starts at a multiple of `alignment`, in guest and in host memory. */
int vu_memory_contiguous(const struct vu_memory *memory, uint64_t address, uint64_t length, unsigned int alignment);

/*
 * Little-endian integers in shared memory, loaded (acquire) and stored (release) whole: no other thread or process
 * can see half of one. A load returns the value; both return -EFAULT unless the address is contiguous and aligned,
 * and where the host has no memory behind it.
 */
int64_t vu_load16(const struct vu_memory *memory, uint64_t address);
int64_t vu_load32(const struct vu_memory *memory, uint64_t address);
int vu_store16(const struct vu_memory *memory, uint64_t address, uint16_t value);
int vu_store32(const struct vu_memory *memory, uint64_t address, uint32_t value);

/* A full barrier: what was stored before it is seen before anything loaded after it was loaded. */
void vu_fence(void);
