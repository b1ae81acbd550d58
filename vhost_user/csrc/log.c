/* The dirty log; see log_api.h. */

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "guard.h"
#include "log_api.h"

/* Out of line, so that no variable of its lives in the function that a fault returns to. */
__attribute__((noinline)) static int mark(_Atomic uint8_t *log, uint64_t first, uint64_t count)
{
	while (count) {
		unsigned int bit = first % 8, bits = 8 - bit;

		if (bits > count)
			bits = count;
		/*
		 * A bit that is set already is set again: the other side may be about to clear it, and to read the page
		 * before our write to it arrives there. A look that spares the OR would need a full barrier in its stead.
		 */
		atomic_fetch_or_explicit(&log[first / 8], ((1u << bits) - 1) << bit, memory_order_release);
		first += bits;
		count -= bits;
	}
	return 0;
}

int vu_log_mark(uintptr_t log, uint64_t first, uint64_t count)
{
	return GUARDED(int, mark((_Atomic uint8_t *)log, first, count), -EFAULT);
}
