/* Requests that are answered while the ring is in hand, since nothing else is to be done for them; see at_once.c. */

enum { VM_MOST_CHAINS = 64 };

enum vm_phase { VM_PHASE_NONE, VM_PHASE_OPEN, VM_PHASE_GRANTED };

/*
 * The record of the requests in hand: serve/intent.py has the theory. Each word is stored whole. `effect` is 1 for PLUG, 2
 * for UNPLUG, 3 for UNPLUG ALL; `keys` are the chains' ids and positions, and `requests` what was read from them. What
 * unplugged_bytes is once that is granted, or the system reset, is no matter of a PLUG's.
 */
struct vm_record {
	uint64_t phase, effect, first, nb_blocks, count, reset, unplugged, unplugged_by_reset;
	uint64_t keys[VM_MOST_CHAINS];
	uint8_t requests[VM_MOST_CHAINS][VM_REQUEST_SIZE];
};

/* A device some of whose requests are answered by nobody else. */
struct vm_device {
	struct vm_state state;
	/*
	 * Where a PLUG is put on record, and nothing else is to be done for it; NULL where none is to be granted. The region
	 * begins at `offset` of the file `fd`, which has to reach to the end of what is plugged.
	 */
	struct vm_record *record;
	int fd;
	uint64_t offset;
	/* What was answered, how often each verdict; where somebody `looks`, only the verdicts of the last call. */
	uint64_t counts[VM_VERDICT_KEYS];
	uint8_t looks;
	/* Whether anything is to be answered: not where a request that is on record may come again. */
	uint8_t answers;
	uint32_t answered;
	char verdicts[VM_MOST_CHAINS];
	/* Blocks that were plugged; the state has them. */
	uint64_t plugged;
};

/*
 * Answers the first of `count` requests for `device`, a struct vm_device, as far as nothing else is to be done for them;
 * how many. What it answered before has gone back. It has the type of vhost_user's `vu_answer`.
 */
uint32_t vm_answer(void *device, const void *keys, const void *requests, uint32_t count, void *answers);
