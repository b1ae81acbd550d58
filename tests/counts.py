"""How often the tests repeat things: every count of every test, each one named constant, in one place.

The tier, from the environment variable VIRTIO_MEM_TIER, chooses among three values:

quick   `scripts/test`: what a developer waits for, under three minutes in all
ci      `.ci/run`: a tenth of the full counts or more, under 30 minutes
soak    `scripts/soak`: the full counts

What takes long even so is marked `long`, and quick leaves it out unless a test is named.

A run prints all of them first, so that a figure in a report can be traced to what was run.
"""

from __future__ import annotations

import os

TIERS = ("quick", "ci", "soak")
TIER = os.environ.get("VIRTIO_MEM_TIER", "quick")
if TIER not in TIERS:
    raise SystemExit(f"VIRTIO_MEM_TIER={TIER}: no such tier; choose one of {', '.join(TIERS)}")


def count(*, quick: int, ci: int, soak: int) -> int:
    """This tier's value. ValueError where the tiers don't rise, or where CI does less than a tenth of the soak."""
    if not quick <= ci <= soak <= 10 * ci:
        raise ValueError(f"quick={quick}, ci={ci}, soak={soak}: need quick <= ci <= soak, and ci at least soak / 10")
    return {"quick": quick, "ci": ci, "soak": soak}[TIER]


def all_counts() -> dict[str, int]:
    """Every count, by name, in the order of this file."""
    return {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}


# The examples of a property test, and the steps of each of a state machine's examples, where a test sets no other.
# Hypothesis's own defaults are 100 and 50.
HYPOTHESIS_EXAMPLES = count(quick=8, ci=200, soak=2_000)
HYPOTHESIS_STATEFUL_STEPS = count(quick=30, ci=50, soak=50)

# After this many seconds a test is taken to hang. The slowest takes a tenth of that on an idle machine.
TEST_TIMEOUT_SECONDS = count(quick=120, ci=720, soak=7_200)

# Random requests to a device and to its model, on each backing of memory.
REQUESTS_PER_BACKING = count(quick=3_000, ci=10_000, soak=100_000)

# Groups of requests that a device decides on together, and another one by one.
REQUESTS_TOGETHER = count(quick=500, ci=10_000, soak=100_000)

# Random steps (populate, touch, discard) on the memory of a zone and on its model, on each backing.
ZONE_STEPS_PER_BACKING = count(quick=300, ci=2_000, soak=20_000)

# Memory that is plugged, written and given back to the host, in MiB, on each backing.
MEBIBYTES_THERE_AND_BACK = count(quick=128, ci=1_024, soak=1_024)

# Between a driver and a device in two processes: loads of an index that the other one stores all the time, buffers
# through a ring without a pause (more than 65,536 in CI, so that the indices come round), and through one where both
# sides sleep between notifications.
INDEX_LOADS = count(quick=100_000, ci=2_000_000, soak=20_000_000)
RING_BUFFERS_BETWEEN_PROCESSES = count(quick=10_000, ci=200_000, soak=2_000_000)
RING_BUFFERS_WITH_SLEEPS = count(quick=5_000, ci=100_000, soak=1_000_000)

# Rings full of random bytes, some of which change between the device's steps.
GARBAGE_RINGS = count(quick=500, ci=10_000, soak=100_000)

# Rings through which bursts of chains go in batches, and through equal ones the same chains one by one.
BATCHED_RINGS = count(quick=20, ci=2_000, soak=20_000)

# Back ends that take over what one left that was killed after a store of the C core, within PLUG requests.
TAKEN_OVER_AFTER_A_STORE = count(quick=8, ci=500, soak=500)

# Messages to a back end, and requests on another ring, while a driver asks without end.
MESSAGES_UNDER_LOAD = count(quick=50, ci=500, soak=5_000)

# Questions of each kind that the host has for a device, and of a front end's, while its guest asks without end.
QUESTIONS_UNDER_LOAD = count(quick=20, ci=50, soak=500)

# Races of a driver and a device on two processors that go to sleep at the same moment.
NOTIFICATION_RACES = count(quick=20_000, ci=1_000_000, soak=10_000_000)

# Times that threads fault at once in guarded memory whose file was truncated, on pages of each size.
GUARD_ROUNDS = count(quick=50, ci=1_000, soak=10_000)

# Payloads of random bytes, and of valid ones with a few bytes changed, for random messages of vhost-user.
PAYLOAD_BODIES = count(quick=250, ci=5_000, soak=50_000)

# Requests through a ring in memory whose file another process truncates all the time, for each ring format and on pages
# of each size.
REQUESTS_UNDER_TRUNCATION = count(quick=1_000, ci=10_000, soak=100_000)

# Tables of shared memory that replace each other while a ring and copies run in them.
TABLES_UNDER_LOAD = count(quick=50, ci=3_000, soak=30_000)

# Reads and writes that libblkio does on our block device, by qemu-io.
QEMU_IO_COMMANDS = count(quick=200, ci=2_000, soak=20_000)

# Times that each of a guest's two disks is killed at a moment that nobody chose, and another process takes over.
BLOCK_DEVICE_KILLS = count(quick=2, ci=2, soak=20)

# Rounds in which two processes mark every second page of the same dirty log at once.
DIRTY_LOG_ROUNDS = count(quick=10_000, ci=100_000, soak=1_000_000)

# Back ends killed by SIGKILL with requests in flight, for each format of ring.
INFLIGHT_KILLS = count(quick=12, ci=200, soak=2_000)

# Ringfuls served by the C core, instruction by instruction, for each format of ring: a back end is killed after each
# store of each of them.
STEPPED_RINGFULS = count(quick=1, ci=10, soak=100)

# Workers of a supervisor killed by SIGKILL at random moments, for each format of ring; and steps of a session's life at
# each of which one is killed, of all that there are.
SUPERVISOR_KILLS = count(quick=4, ci=200, soak=2_000)
SUPERVISOR_STEPS = count(quick=10, ci=400, soak=4_000)

# The same of supervisors, which a service manager starts again; and of `virtio-mem serve`, for each format of ring.
STORE_KILLS = count(quick=4, ci=40, soak=400)
STORE_STEPS = count(quick=8, ci=80, soak=800)
SERVE_STORE_KILLS = count(quick=4, ci=40, soak=400)

# Messages in random order to sessions that are rebuilt after each from what was kept.
JOURNALLED_MESSAGES = count(quick=120, ci=5_000, soak=50_000)

# Split queues that note chains in batches in their inflight areas, and as many that note the same ones one by one.
BATCHED_AREAS = count(quick=20, ci=500, soak=5_000)

# Inflight areas of random bytes, or with some of their bytes changed, that a queue is made with.
HOSTILE_INFLIGHT_AREAS = count(quick=500, ci=10_000, soak=100_000)

# Blocks shared with a daemon of others and taken back again while its requests go on, and times that its ring is
# stopped and started under them.
REGIONS_UNDER_LOAD = count(quick=200, ci=1_000, soak=10_000)
RING_RESTARTS = count(quick=100, ci=1_000, soak=10_000)

# Unplugs while a daemon writes to every block of the region all the time.
UNPLUGS_UNDER_TOUCH = count(quick=100, ci=2_000, soak=20_000)

# Slots of one block that a daemon has at once, half of which then go in as many runs.
SLOTS_AT_ONCE = count(quick=600, ci=4_000, soak=4_000)

# Frames that DPDK sends back to our front end, for each format of ring.
ECHOED_FRAMES = count(quick=500, ci=5_000, soak=50_000)

# Times that a guest on QEMU is reset and boots again from our block device, which takes five seconds each.
BOOTS_AFTER_RESET = count(quick=0, ci=1, soak=5)

# Frames that DPDK transmits to our back end, for each format of ring and for each of who connects to whom.
DPDK_FRAMES = count(quick=30_000, ci=1_000_000, soak=10_000_000)

# IOTLB entries that a front end sends without need, and pages that a guest unmaps and maps again under a running ring.
IOTLB_UPDATES = count(quick=1_500, ci=10_000, soak=100_000)
IOTLB_REMAPS = count(quick=200, ci=2_000, soak=20_000)

# Attacks on our own back end, chosen at random where they are not all.
ATTACKS_ON_OUR_BACK_END = count(quick=25, ci=1_000, soak=1_000)

# The same through a supervisor.
ATTACKS_ON_SUPERVISED_BACK_END = count(quick=12, ci=300, soak=1_000)

# Attacks on each daemon that we did not write, chosen at random where they are not all. A daemon that crashes is
# started again each time, and one that hangs is waited for.
ATTACKS_ON_PEERS = count(quick=12, ci=150, soak=1_000)

# Snapshots of which a file has been changed or cut at random.
SPOILT_SNAPSHOTS = count(quick=20, ci=200, soak=2_000)

# Of 20 neighbouring steps of a request that is served by `virtio-mem serve`, those at which the process is killed.
STEPS_KILLED_OF_20 = count(quick=3, ci=10, soak=20)

# The same while it writes a trace; and workers that are killed meanwhile at moments that nobody chose.
TRACED_STEPS_KILLED_OF_20 = count(quick=1, ci=5, soak=20)
TRACED_KILLS = count(quick=3, ci=100, soak=1_000)

# Sequences of pieces of HTTP and of random bytes that the API's socket gets, and requests that are made from its
# OpenAPI document for each path.
HOSTILE_HTTP = count(quick=100, ci=2_000, soak=20_000)
OPENAPI_REQUESTS = count(quick=10, ci=100, soak=1_000)

# Workers of `virtio-mem serve` that are killed under a guest that plugs and unplugs, for each format of ring.
SERVE_KILLS = count(quick=4, ci=200, soak=2_000)

# The same under three guests of as many zones, each in a thread of the worker's.
ZONES_KILLS = count(quick=4, ci=100, soak=1_000)

# Workers of `virtio-mem serve` that are killed while a Linux guest is resized.
LINUX_KILLS = count(quick=2, ci=5, soak=50)

# QEMUs that come to `virtio-mem serve` after the first one died, each with a guest that boots.
VMMS_AFTER_THE_FIRST = count(quick=0, ci=1, soak=5)

# States of devices of which a few bytes are others, that a process is to go on with.
DAMAGED_STATES = count(quick=150, ci=3_000, soak=30_000)

# Random requests through a vhost-user ring to a device and to its model, for each format of ring.
SERVED_REQUESTS = count(quick=150, ci=3_000, soak=30_000)

# Attacks on `virtio-mem serve`, chosen at random where they are not all.
ATTACKS_ON_SERVE = count(quick=15, ci=300, soak=1_000)

# Times that the process behind the API is killed around a resize that a client asks for.
API_KILLS = count(quick=3, ci=20, soak=200)

# Resizes, up and down in turn, of a Linux guest that writes to a disk and reads back all the time.
RESIZES_UNDER_IO = count(quick=2, ci=10, soak=100)

# Times that the demo with a Linux guest is filmed from its beginning to its end.
FILMS = count(quick=1, ci=1, soak=3)

# Devices that are wrong in one way, of all that there are, that the conformance kit has to find.
FAULTS_JUDGED = count(quick=15, ci=500, soak=500)

# Of the four kinds of small pages, those on which the conformance kit judges our device; and of twelve other kinds of
# target, those that our device stands for.
JUDGED_BACKINGS = count(quick=2, ci=4, soak=4)
JUDGED_KINDS = count(quick=4, ci=12, soak=12)

# Lengths of a daemon's ring, shorter than the kit would like, on which it judges all the same.
SHORT_RINGS = count(quick=1, ci=3, soak=3)

# Forms of ring that the conformance kit sends round, more than 65,536 requests through each.
RINGS_SENT_ROUND = count(quick=1, ci=2, soak=2)

# Clauses that `virtio-mem serve` is judged by over its socket, of all that a vhost-user target has a verdict of.
CLAUSES_OF_SERVE = count(quick=6, ci=500, soak=500)

# Sequences of moves of host and guest that each of our devices stands before the conformance kit.
MACHINE_SEQUENCES = count(quick=6, ci=150, soak=1_500)

# Kinds of QEMU's device that the conformance kit judges by all that its profile quick has. The second one is QEMU 7.2,
# for a minute, most of which it waits. Of the sessions in spec-notes/peers.md, those that this one goes through.
QEMUS_JUDGED = count(quick=1, ci=3, soak=6)
SESSIONS_OF_OLD_QEMU = count(quick=3, ci=50, soak=50)

# Wrong devices that the kit's state machine is to find, and to shrink what it does to them.
MACHINE_FAULTS = count(quick=1, ci=8, soak=8)

# Ways to end a soak by a signal, with workers and without; and soaks that go on until something is found.
SOAK_ENDINGS = count(quick=1, ci=6, soak=6)
PYTEST_SOAK_ENDINGS = count(quick=1, ci=4, soak=4)
SOAKS_THAT_FIND = count(quick=1, ci=1, soak=5)

# Numbers of workers with which a soak that is ended leaves nothing lying about.
SOAK_CROWDS = count(quick=1, ci=2, soak=2)

# Signals that end a program or a run, of three or four: each is tried.
ENDING_SIGNALS = count(quick=1, ci=4, soak=4)

# Forms of ring, of both, that the longest of the tests that are for each are run with.
RINGS_TRIED_AT_LENGTH = count(quick=1, ci=2, soak=2)

# Sequences of moves of host and guest that QEMU's device stands before the conformance kit, but for what is known.
QEMU_SEQUENCES = count(quick=2, ci=100, soak=1_000)
