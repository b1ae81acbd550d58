"""A Linux guest whose memory is ours and whose processors are QEMU's.

layout.py places zones where QEMU's machine has RAM, qemu.py writes the command line, find.py finds a QEMU, guest.py a
kernel and an initrd (made by initrd.py), qmp.py talks to QEMU's monitor, machine.py puts it all together, and worker.py
is the part that serves. Nothing is imported here.
"""
