/*
 * The SIGBUS handler; see guard_api.h.
 *
 * A fault is answered in one of two ways. Inside a call of the core the handler jumps out, and the call fails: the
 * caller learns of it at once. Elsewhere there is no way out, the access has to succeed: the whole range becomes
 * private zeros, and the access is tried again. The whole range and not the page that faulted, because each page of
 * zeros would be a mapping of its own. The kernel lets a process have 65,530 of them, and a peer that chooses which
 * pages are touched, with one chain of many descriptors, could use them up.
 *
 * The handler finds ranges without a lock: whoever it interrupts might hold it. Each slot is guarded by one word, the
 * serial number of its registration and its state. Nobody removes a range while its memory is still touched, so the
 * slot that the handler looks for does not change under it; one whose word changed in between was another's.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "guard.h"

_Thread_local sigjmp_buf *volatile vu_landing;

static void on_bus_error(int number, siginfo_t *info, void *context);

static struct sigaction before;

/* The two lowest bits of a slot's word; the others are its serial number. */
enum state { FREE, CHANGING, ALIVE, DEAD, STATE_MASK = 3, SERIAL_SHIFT = 2 };

struct slot {
	_Atomic uint64_t word;
	_Atomic uint64_t address, size, page_size;
};

static struct slot slots[VU_GUARD_SLOTS];
/* Slots from here on were never used. */
static _Atomic int used_slots;
static _Atomic uint64_t serials, faults;

/* What the handler copied from a slot; no slot where `slot` is NULL. */
struct range {
	struct slot *slot;
	uint64_t word, address, size, page_size;
};

static enum state state_of(uint64_t word)
{
	return word & STATE_MASK;
}

static bool copy_slot(struct slot *slot, struct range *range)
{
	range->slot = slot;
	range->word = atomic_load_explicit(&slot->word, memory_order_acquire);
	if (state_of(range->word) < ALIVE)
		return false;
	range->address = atomic_load_explicit(&slot->address, memory_order_relaxed);
	range->size = atomic_load_explicit(&slot->size, memory_order_relaxed);
	range->page_size = atomic_load_explicit(&slot->page_size, memory_order_relaxed);
	atomic_thread_fence(memory_order_acquire);
	/* Another thread may just have marked it dead; the serial number is what tells two registrations apart. */
	return atomic_load_explicit(&slot->word, memory_order_relaxed) >> SERIAL_SHIFT == range->word >> SERIAL_SHIFT;
}

/* The newest range around an address: one that is older was unmapped, and is about to be removed. */
static struct range find_range(uint64_t address)
{
	struct range found = { 0 }, range;
	int count = atomic_load_explicit(&used_slots, memory_order_acquire);

	for (int i = 0; i < count; i++)
		if (copy_slot(&slots[i], &range) && address - range.address < range.size && range.word > found.word)
			found = range;
	return found;
}

static void mark_dead(const struct range *range)
{
	uint64_t alive = (range->word & ~(uint64_t)STATE_MASK) | ALIVE;

	if (atomic_compare_exchange_strong(&range->slot->word, &alive, alive | DEAD))
		atomic_fetch_add(&faults, 1);
}

static bool map_zeros(uint64_t address, uint64_t size)
{
	int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

	return mmap((void *)address, size, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
}

/* Where the kernel counts what may be written (vm.overcommit_memory = 2) it may refuse the range, but not a page. */
static bool put_zeros(const struct range *range, uint64_t address)
{
	uint64_t page = address & ~(range->page_size - 1);

	return map_zeros(range->address, range->size) || map_zeros(page, range->page_size);
}

static void pass_on(int number, siginfo_t *info, void *context)
{
	if (before.sa_flags & SA_SIGINFO) {
		before.sa_sigaction(number, info, context);
	} else if (info->si_code == BUS_MCEERR_AO && before.sa_handler == SIG_DFL) {
		/* A page has gone bad, and nobody has met it yet: who does so gets a SIGBUS of its own. */
	} else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
		/* An access is tried again when we return, and meets its fate; what somebody sent must be sent again. */
		sigaction(number, &before, NULL);
		if (info->si_code <= 0)
			raise(number);
	} else {
		before.sa_handler(number);
	}
}

/* Of this thread's own doing, and not in the middle of anything: its variables may be used, which can take memory. */
static bool is_synchronous(const siginfo_t *info)
{
	if (info->si_code == SI_TKILL)
		return info->si_pid == getpid();
	return info->si_code == BUS_ADRERR || info->si_code == BUS_MCEERR_AR;
}

/*
 * A handler above ours may pass a fault on by raising it anew; the address is lost then. Python's faulthandler steps
 * aside before it does so. Then the access is tried again when both have returned, and its fault comes to us first.
 * Waited for once: what was raised by somebody else, for a reason of his own, does not come again.
 */
static bool comes_again(int number, const siginfo_t *info)
{
	static _Thread_local bool waited;
	struct sigaction above;

	if (info->si_code != SI_TKILL) {
		waited = false;
		return false;
	}
	if (waited || sigaction(number, NULL, &above) || above.sa_sigaction != on_bus_error)
		return false;
	waited = vu_landing || atomic_load_explicit(&used_slots, memory_order_relaxed);
	return waited;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	struct range range = { 0 };

	if (is_synchronous(info)) {
		if (comes_again(number, info))
			return;
		if (info->si_code != SI_TKILL)
			range = find_range((uintptr_t)info->si_addr);
		if (range.slot)
			mark_dead(&range);
		if (vu_landing)
			siglongjmp(*vu_landing, 1);
		if (range.slot && put_zeros(&range, (uintptr_t)info->si_addr)) {
			errno = saved;
			return;
		}
	}
	errno = saved;
	pass_on(number, info, context);
}

static int install_result;

static void install(void)
{
	/* SA_NODEFER: the jump out of the handler restores no signal mask. */
	struct sigaction ours = { .sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };

	sigemptyset(&ours.sa_mask);
	install_result = sigaction(SIGBUS, &ours, &before) ? -errno : 0;
}

int vu_guard_install(void)
{
	/* Once: a handler that came later has ours to pass on to, and to put ours in front again would make a circle. */
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install);
	return install_result;
}

/* A slot for a new range, in the state CHANGING, or NULL. */
static struct slot *claim(void)
{
	for (struct slot *slot = slots; slot < slots + VU_GUARD_SLOTS; slot++) {
		uint64_t expected = FREE;

		if (atomic_load_explicit(&slot->word, memory_order_relaxed) == FREE &&
		    atomic_compare_exchange_strong(&slot->word, &expected, CHANGING))
			return slot;
	}
	return NULL;
}

int vu_guard_add(uintptr_t address, uint64_t size, uint64_t page_size)
{
	struct slot *slot = claim();
	uint64_t serial;
	int index, used;

	if (!slot)
		return -ENOSPC;
	index = slot - slots;
	/* Who still sees the word of the slot's last range must not see this one's address. */
	atomic_thread_fence(memory_order_release);
	atomic_store_explicit(&slot->address, address, memory_order_relaxed);
	atomic_store_explicit(&slot->size, size, memory_order_relaxed);
	atomic_store_explicit(&slot->page_size, page_size, memory_order_relaxed);
	serial = atomic_fetch_add(&serials, 1) + 1;
	atomic_store_explicit(&slot->word, serial << SERIAL_SHIFT | ALIVE, memory_order_release);
	used = atomic_load(&used_slots);
	while (used <= index && !atomic_compare_exchange_weak(&used_slots, &used, index + 1))
		;
	return index;
}

void vu_guard_remove(int slot)
{
	atomic_store_explicit(&slots[slot].word, FREE, memory_order_release);
}

int vu_guard_dead(int slot)
{
	return state_of(atomic_load_explicit(&slots[slot].word, memory_order_acquire)) == DEAD;
}

uint64_t vu_guard_faults(void)
{
	return atomic_load(&faults);
}

int64_t vu_page_size(int fd)
{
	struct statfs info;

	if (fstatfs(fd, &info))
		return -errno;
	return info.f_type == HUGETLBFS_MAGIC ? info.f_bsize : sysconf(_SC_PAGESIZE);
}
