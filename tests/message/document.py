"""The messages of the document, row by row, written down from it by hand and not from our tables.

docs/interop/vhost-user.rst of QEMU 11.1.3, "Front-end message types" and "Back-end message types". Where the text
contradicts itself (ADD_MEM_REG's payload stands under "reply") the prose decides; where it is silent, what peers do.

Columns: number, name, payload sizes in bytes ("8+32n": a table), answer (ack, or the sizes of the answer), descriptors
with the message, descriptors with the answer, protocol features. A variant has a row of its own, with the feature that
brings it in front of its name.
"""

from __future__ import annotations

from typing import NamedTuple

FRONTEND = """
 1 GET_FEATURES            0       8       0   0   -
 2 SET_FEATURES            8       ack     0   0   -
 3 SET_OWNER               0       ack     0   0   -
 4 RESET_OWNER             0       ack     0   0   -
 5 SET_MEM_TABLE           8+32n   ack     n   0   -
 5 XEN_MMAP:SET_MEM_TABLE  8+40n   ack     n   0   -
 6 SET_LOG_BASE            8       ack     0   0   -
 6 LOG_SHMFD:SET_LOG_BASE  16      any     1   0   LOG_SHMFD
 7 SET_LOG_FD              0       ack     1   0   -
 8 SET_VRING_NUM           8       ack     0   0   -
 9 SET_VRING_ADDR          40      ack     0   0   -
10 SET_VRING_BASE          8       ack     0   0   -
11 GET_VRING_BASE          8       8       0   0   -
12 SET_VRING_KICK          8       ack     0/1 0   -
13 SET_VRING_CALL          8       ack     0/1 0   -
14 SET_VRING_ERR           8       ack     0/1 0   -
15 GET_PROTOCOL_FEATURES   0       8       0   0   -
16 SET_PROTOCOL_FEATURES   8       ack     0   0   -
17 GET_QUEUE_NUM           0       8       0   0   MQ
18 SET_VRING_ENABLE        8       ack     0   0   -
19 SEND_RARP               8       ack     0   0   RARP
20 NET_SET_MTU             8       ack     0   0   MTU
21 SET_BACKEND_REQ_FD      0       ack     1   0   BACKEND_REQ
22 IOTLB_MSG               26/32   8       0   0   -
23 SET_VRING_ENDIAN        8       ack     0   0   CROSS_ENDIAN
24 GET_CONFIG              12+     0/12+   0   0   CONFIG
25 SET_CONFIG              12+     ack     0   0   CONFIG
26 CREATE_CRYPTO_SESSION   any     any     0   0   CRYPTO_SESSION
27 CLOSE_CRYPTO_SESSION    8       ack     0   0   CRYPTO_SESSION
28 POSTCOPY_ADVISE         0       0       0   0/1 PAGEFAULT
29 POSTCOPY_LISTEN         0       ack     0   0   PAGEFAULT
30 POSTCOPY_END            0       8       0   0   PAGEFAULT
31 GET_INFLIGHT_FD         20/24   20/24   0   0/1 INFLIGHT_SHMFD
32 SET_INFLIGHT_FD         20/24   ack     1   0   INFLIGHT_SHMFD
33 GPU_SET_SOCKET          0       ack     1   0   -
34 RESET_DEVICE            0       ack     0   0   RESET_DEVICE
35 VRING_KICK              8       ack     0   0   INBAND_NOTIFICATIONS
36 GET_MAX_MEM_SLOTS       0       8       0   0   CONFIGURE_MEM_SLOTS
37 ADD_MEM_REG             40      ack     1   0   CONFIGURE_MEM_SLOTS
37 XEN_MMAP:ADD_MEM_REG    48      ack     1   0   CONFIGURE_MEM_SLOTS
38 REM_MEM_REG             40      ack     0/1 0   CONFIGURE_MEM_SLOTS
38 XEN_MMAP:REM_MEM_REG    48      ack     0/1 0   CONFIGURE_MEM_SLOTS
39 SET_STATUS              8       ack     0   0   STATUS
40 GET_STATUS              0       8       0   0   STATUS
41 GET_SHARED_OBJECT       16      any     0   0/1 SHARED_OBJECT
42 SET_DEVICE_STATE_FD     8       8       1   0/1 DEVICE_STATE
43 CHECK_DEVICE_STATE      0       8       0   0   DEVICE_STATE
44 GET_SHMEM_CONFIG        0       2056    0   0   SHMEM_MAP
"""

BACKEND = """
 1 IOTLB_MSG               26/32   ack     0   0   BACKEND_REQ
 2 CONFIG_CHANGE_MSG       0       ack     0   0   BACKEND_REQ,CONFIG
 3 VRING_HOST_NOTIFIER_MSG 24      ack     0/1 0   BACKEND_REQ,HOST_NOTIFIER
 4 VRING_CALL              8       ack     0   0   BACKEND_REQ,INBAND_NOTIFICATIONS
 5 VRING_ERR               8       ack     0   0   BACKEND_REQ,INBAND_NOTIFICATIONS
 6 SHARED_OBJECT_ADD       16      ack     0   0   BACKEND_REQ,SHARED_OBJECT
 7 SHARED_OBJECT_REMOVE    16      ack     0   0   BACKEND_REQ,SHARED_OBJECT
 8 SHARED_OBJECT_LOOKUP    16      8       0   0/1 BACKEND_REQ,SHARED_OBJECT
 9 SHMEM_MAP               40      ack     1   0   BACKEND_REQ,SHMEM_MAP
10 SHMEM_UNMAP             40      ack     0   0   BACKEND_REQ,SHMEM_MAP
"""

FEATURES = """
MQ LOG_SHMFD RARP REPLY_ACK MTU BACKEND_REQ CROSS_ENDIAN CRYPTO_SESSION PAGEFAULT CONFIG BACKEND_SEND_FD HOST_NOTIFIER
INFLIGHT_SHMFD RESET_DEVICE INBAND_NOTIFICATIONS CONFIGURE_MEM_SLOTS STATUS XEN_MMAP SHARED_OBJECT DEVICE_STATE
GET_VRING_BASE_INFLIGHT GPA_ADDRESSES SHMEM_MAP
"""
"""By bit, from 0 on."""


class Row(NamedTuple):
    """One row; `feature` brings the variant, or is empty."""

    backend_channel: bool
    number: int
    feature: str
    name: str
    payload: str
    answer: str
    fds: str
    answer_fds: str
    needs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'B' if self.backend_channel else 'F'}{self.number} {self.feature}{self.name}"


def rows() -> list[Row]:
    return [
        _row(backend_channel, *line.split())
        for backend_channel, text in ((False, FRONTEND), (True, BACKEND))
        for line in text.strip().splitlines()
    ]


def _row(channel: bool, number: str, name: str, payload: str, answer: str, fds: str, reply_fds: str, needs: str) -> Row:
    feature, _, name = name.rpartition(":")
    features = () if needs == "-" else tuple(needs.split(","))
    return Row(channel, int(number), feature, name, payload, answer, fds, reply_fds, features)


def sizes(column: str) -> set[int]:
    """Which sizes, of those up to 2100 bytes, a column of sizes allows."""
    if column == "any":
        return set(range(2101))
    allowed: set[int] = set()
    for part in column.split("/"):
        first, plus, each = part.partition("+")
        if each:
            allowed |= {int(first) + int(each.rstrip("n")) * count for count in range(9)}
        else:
            allowed |= set(range(int(first), 2101)) if plus else {int(first)}
    return allowed


def counts(column: str) -> set[int]:
    """Which numbers of descriptors a column allows; n is any up to 8."""
    return set(range(9)) if column == "n" else {int(part) for part in column.split("/")}
