/*
 * Many small requests at a time: chains whose readable part begins with a request of a fixed size, and whose writable
 * part has room for an answer of a fixed size. Two calls serve a ring's worth of them: one takes, one gives back.
 */

/* What a member of a batch is, and so whether there is a request in it. */
enum vu_member {
	VU_MEMBER_ASKS,
	VU_MEMBER_MALFORMED,   /* counted by the queue already */
	VU_MEMBER_TOO_SHORT,   /* fewer readable bytes than a request has */
	VU_MEMBER_NO_ROOM,     /* fewer writable bytes than an answer has */
	VU_MEMBER_MEMORY_GONE, /* its request can't be read, or its answer not be written */
};

/* A chain's id, and where the used ring will have it: in a packed ring the slot, with its wrap counter in bit 15. */
struct vu_key {
	uint32_t id, position;
};

/*
 * The areas are the caller's: of `most` members each a kind, a key, a request, an answer, where its chain lies, and the
 * entry of an inflight area that stands for it; and `room` bytes for the chains.
 */
struct vu_batch {
	uint32_t most, request_size, answer_size;
	size_t room;
	uint8_t *kinds;
	struct vu_key *keys;
	uint8_t *requests, *answers;
	uint32_t *places, *entries;
	uint8_t *chains;
	/* Members that were taken; the first `given` of them went back. */
	uint32_t count, given;
	/* For a call that a fault ended in the middle: its chains end here, and whether it was copying. */
	size_t place;
	uint32_t visited, slots;
	uint8_t copying;
};

/*
 * Takes available chains, `most` at most and as many as there is room for; how many, 0 where there are none, or what
 * vu_queue_take returns where not even one could be taken. All of a batch is given back before the next is taken.
 * `inflight` is NULL, or the queue's.
 */
int vu_batch_take(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch, uint32_t most,
		  struct vu_inflight *inflight);

/*
 * Gives back members in order until `given` is `end`, each with its answer, or empty where it asked nothing or its
 * memory is gone, which its kind then says. Returns how many went back empty, or what vu_queue_push returns.
 */
int vu_batch_give(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch, uint32_t end,
		  struct vu_inflight *inflight);

/* Looks for an available chain again and again for `nanoseconds`; 1 as soon as there is one, else 0 or a failure. */
int vu_queue_await(struct vu_queue *queue, const struct vu_memory *memory, uint64_t nanoseconds);

/*
 * Who answers requests at once: the first of `count` (at least one), into `answers`; how many. It stops before one that
 * takes more than `device`. Those that it answered before have gone back to their driver by then.
 */
typedef uint32_t vu_answer(void *device, const struct vu_key *keys, const void *requests, uint32_t count, void *answers);

struct vu_answerer {
	vu_answer *answer;
	void *device;
	/* An eventfd to call the driver by, or -1. */
	int call;
	/* For how many nanoseconds more chains are looked for, when all is answered; and after how many a call ends. */
	uint64_t patience, longest;
	/* Whether a call is over once `answer` has answered something, of which the caller wants to hear. */
	uint8_t once;
	/*
	 * Of the last call: how many it answered, whether some of those have not gone back, since it failed, and whether it
	 * ended because nothing more came.
	 */
	uint32_t answered;
	uint8_t lost, idle;
};

/*
 * Takes, answers at once, gives back and calls the driver, as long as there is something to answer so: up to `most`
 * requests, and not much longer than it may take. Returns as vu_batch_take what is left in the batch for the caller to
 * answer, the first `given` of it having gone back; or 0.
 */
int vu_batch_serve(struct vu_queue *queue, const struct vu_memory *memory, struct vu_batch *batch, uint32_t most,
		   struct vu_inflight *inflight, struct vu_answerer *answerer);
