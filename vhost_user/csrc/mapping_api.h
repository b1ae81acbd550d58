/*
 * Host memory in one piece: `size` bytes at `address`, in addresses that are its own, with its slot in the guard's
 * registry, or -1. Zeros before it is mapped, and once it is unmapped.
 */
struct vu_mapping {
	uintptr_t address;
	uint64_t size;
	uintptr_t reserved;
	uint64_t reserved_size;
	int guard_slot;
	int step;
};

/* What a mapping is made of, in this order; `step` is the last that was begun. */
enum vu_map_step {
	VU_RESERVE = 1, /* addresses, such that one of them is aligned */
	VU_MAP,		/* the memory over them */
	VU_GUARD,	/* an entry in the guard's registry, if it is to have one */
};

/*
 * Maps `size` bytes, to be read and written, of `fd` from `offset` on, with `flags` of mmap(2), at a multiple of
 * `alignment`: a power of two, a page or more. Guarded as memory in pages of `guarded` bytes; not at all for 0. Returns 0,
 * or a negated errno; then nothing is mapped.
 */
int vu_map(struct vu_mapping *mapping, uint64_t size, uint64_t alignment, int flags, int fd, int64_t offset,
	   uint64_t guarded);

/* Unmaps what is mapped, which nothing may touch any more. It is in the guard's registry as long as it has addresses. */
void vu_unmap(struct vu_mapping *mapping);

/* The same, once nobody refers to `memory` any more, which is at its first address. */
void vu_let_go(struct vu_mapping *mapping, const char *memory);

/* Whether it is guarded, and an access met missing memory. */
int vu_mapping_dead(const struct vu_mapping *mapping);
