/*
 * What a virtio-mem device answers: the standard's section "Memory Device", "Device Operation". One pure function: the
 * state and the requests go in, answers and what the host is to do come out. device.py keeps the state, and has the
 * theory.
 */

/* The types of a request, which has VM_REQUEST_SIZE bytes; VM_UNKNOWN stands for all that have no name. */
enum vm_request_type { VM_PLUG, VM_UNPLUG, VM_UNPLUG_ALL, VM_STATE, VM_UNKNOWN };
enum { VM_REQUEST_SIZE = 24 };

/* Why a request gets the answer that it gets. Errors are in the order of the checks. */
enum vm_verdict {
	/* ACK, of a PLUG, UNPLUG or UNPLUG ALL, once the host has acted */
	VM_GRANTED,
	/* BUSY */
	VM_PAUSED,
	/* ACK, with the state of the blocks */
	VM_STATE_PLUGGED,
	VM_STATE_UNPLUGGED,
	VM_STATE_MIXED,
	/* ERROR */
	VM_UNKNOWN_TYPE,
	VM_UNALIGNED,
	VM_NO_BLOCKS,
	VM_OUTSIDE,
	VM_PLUGGED_ALREADY,
	VM_UNPLUGGED_ALREADY,
	/* NACK */
	VM_BEYOND_TARGET,
	VM_VERDICTS,
};

/* How many values a verdict with the request's type above it can have, as vm_decide gives it. */
enum { VM_VERDICT_KEYS = 5 * 16 };

/* What the answers depend on: sizes in bytes; block n is plugged if bit n % 8 of byte n / 8 of `blocks` is set. */
struct vm_state {
	uint64_t addr, block_size, region_size;
	uint64_t usable_region_size, plugged_size, requested_size;
	uint8_t *blocks;
	uint8_t paused;
};

/* What the host is to do so that requests of this type are granted: to `nb_blocks` neighbouring blocks from `first` on. */
struct vm_effect {
	uint16_t type;
	uint64_t first, nb_blocks;
};

/*
 * Decides on the first of `count` requests, each a struct virtio_mem_req as it was read, and returns how many: at least
 * one, where there is one. Either all of them have their answer, `effect->nb_blocks` is 0, and nothing changes; or they
 * are to be answered ACK once the host has done what `effect` says. If it can't, a single one is answered BUSY, and
 * several are decided on again, one by one. They are several, where the blocks of each are neighbours of those before it,
 * and each would be granted after them.
 *
 * `verdicts` has room for as many enum vm_verdict, in the low 4 bits of each, below the request's type, 4 for one that is
 * unknown; `answers` for as many struct virtio_mem_resp, of 10 bytes.
 */
uint32_t vm_decide(const struct vm_state *state, const void *requests, uint32_t count, char *verdicts, void *answers,
		   struct vm_effect *effect);

/*
 * The first `room` maximal runs of blocks that are plugged, or are not, among those from `at` up to `end`: where each
 * begins and how many blocks it has. How many there are; with fewer than `room` these are all.
 */
uint32_t vm_runs(const uint8_t *blocks, uint64_t at, uint64_t end, uint8_t plugged, uint64_t *firsts, uint64_t *sizes,
		 uint32_t room);
