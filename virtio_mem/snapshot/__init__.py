"""Snapshots: a machine's memory and devices in a directory, and another machine made from it.

    manager.pause()
    save(manager, Path("snap"))                    # the directory is made, and must not exist
    ...
    with restore(Path("snap")) as manager:         # paused, as it was saved: manager.resume() lets it go on

What is in the directory:

    snapshot.json       what the machine was: options, sizes, targets, what each part's content is, with digests
    ZONE.boot           the zone's boot memory
    ZONE.hotplug        its hotplug region, of which only plugged blocks are ever read or written
    ZONE.blocks         which blocks are plugged: a bit a block, the lowest first

Content is sparse: what is zero takes no room, whether the host had memory for it or not, and unplugged blocks are not
looked at. What is in a regular file that is shared, as a zone's boot memory may be, has its content there: the file is
named, and not copied (own_file.py); to go back to the snapshot, keep it as it was.

snapshot.json is written last, so that a directory without it is no snapshot. Whoever restores trusts nothing in it: a
snapshot that was truncated, or made by somebody hostile, is refused, and nothing is left open. The names of its own
files are never taken from it, links are not followed, and no size is believed before the options were found to ask for
just that. The options count as the user's own, with the files that zones have their memory in (`file=`): whoever
restores a stranger's snapshot lets its guest have those.
"""

from virtio_mem.snapshot.restore import restore
from virtio_mem.snapshot.save import save

__all__ = ["restore", "save"]
