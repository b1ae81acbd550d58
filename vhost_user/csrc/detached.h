/* Threads that nobody waits for, for what may take as long as a peer likes. */

#include <stdbool.h>

/* Starts one that runs `work` with `argument`, all signals blocked; false where there are many already, or none can be. */
bool start_detached(void *(*work)(void *), void *argument);
