"""The front end: what a VMM does with a vhost-user daemon.

    with Frontend.connect("/run/blk.sock", features=1 << 32) as frontend:  # VIRTIO_F_VERSION_1
        frontend.regions.share([SharedRegion(GuestAddress(0), ByteCount(size), memfd)])
        vring = frontend.vring(0)
        vring.start(SplitLayout.place(128, GuestAddress(0)))
        ...

Making one negotiates; sharing memory, starting and stopping rings are the caller's to do in the order that suits. What
was set up is remembered, and set up again on another connection by `reconnect()`, for daemons that die.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Self

from vhost_user.connection import Connection, connect
from vhost_user.errors import Disconnected, HostError, PeerError, Refused, UsageError
from vhost_user.frontend.channel import ChannelHandler, FrontendChannel
from vhost_user.frontend.inflight import KeptInflight
from vhost_user.frontend.iotlb import Iommu
from vhost_user.frontend.log import DirtyLogging
from vhost_user.frontend.regions import SharedRegions
from vhost_user.frontend.requests import Requests
from vhost_user.frontend.state import MAX_STATE, TIME_LIMIT, load_state, save_state
from vhost_user.frontend.vring import FrontendVring
from vhost_user.message import (
    CONFIG_LIVE_MIGRATION,
    CONFIG_WRITABLE,
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    U64,
    VIRTIO_F_IOMMU_PLATFORM,
    BackendRequest,
    Config,
    FrontendRequest,
    ProtocolFeature,
    without_support,
)
from vhost_user.units import GuestAddress, is_whole

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.PAGEFAULT
)
"""What is acked where it is offered: what this front end makes use of. A back end may rely on any bit that is acked."""


class Frontend:
    """One daemon, and all that was agreed with it. Any thread may call it; one request is made at a time.

    `features` are the virtio features to ack where they are offered, and `required` those without which there is no
    point in going on: PeerError then. `timeout` in seconds is for each request. `handlers` grant what the back end asks
    on its channel. Raises what `Requests.ask` does; the connection is taken over, and closed then.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        features: int,
        required: int = 0,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        timeout: float = 5.0,
        handlers: Mapping[BackendRequest, ChannelHandler] | None = None,
    ) -> None:
        self.requests = Requests(connection, timeout)
        self.regions = SharedRegions(self.requests)
        self.vrings: dict[int, FrontendVring] = {}
        self.channel: FrontendChannel | None = None
        self.offered = self.features = 0
        self.queue_count: int | None = None
        self._wanted, self._required = features, required
        self._protocol_wanted = protocol_features
        self.iommu = Iommu(self.requests, self.regions)
        self._handlers = {BackendRequest.IOTLB_MSG: self.iommu.serve} | dict(handlers or {})
        self._inflight = KeptInflight(self.requests)
        self._logging = DirtyLogging(self.requests, self.regions)
        try:
            self._negotiate()
        except BaseException:
            self.close()
            raise
        # Kept apart, since an attempt to reconnect that fails half way leaves others behind.
        self._in_use = self.features, self.requests.acked

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        features: int,
        required: int = 0,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        timeout: float = 5.0,
        handlers: Mapping[BackendRequest, ChannelHandler] | None = None,
    ) -> Self:
        """Connect to the daemon that listens at `path`. HostError where none does."""
        return cls(
            connect(path, timeout=timeout),
            features=features,
            required=required,
            protocol_features=protocol_features,
            timeout=timeout,
            handlers=handlers,
        )

    def _negotiate(self) -> None:
        ask, tell = self.requests.ask, self.requests.tell
        self.offered = ask(FrontendRequest.GET_FEATURES, U64).value
        if lacking := self._required & ~self.offered:
            raise PeerError("features", f"{self.offered:#x}", f"needs bits {lacking:#x} too", "use another daemon")
        self.features = self.offered & self._wanted & ~F_LOG_ALL
        if self.offered & F_PROTOCOL_FEATURES:
            self.features |= F_PROTOCOL_FEATURES
            offered = ProtocolFeature(ask(FrontendRequest.GET_PROTOCOL_FEATURES, U64).value)
            acked = offered & self._protocol_wanted
            acked &= ~without_support(acked)
            tell(FrontendRequest.SET_PROTOCOL_FEATURES, U64(int(acked)))
            self.requests.acked = acked
        if self.features & VIRTIO_F_IOMMU_PLATFORM and not self.has(ProtocolFeature.BACKEND_REQ):
            raise PeerError("IOMMU_PLATFORM", "offered", "needs BACKEND_REQ, for translations", "do without it")
        if self.has(ProtocolFeature.MQ):
            self.queue_count = ask(FrontendRequest.GET_QUEUE_NUM, U64).value
        if self.has(ProtocolFeature.BACKEND_REQ):
            self._open_channel()
        self.iommu.begin(active=bool(self.features & VIRTIO_F_IOMMU_PLATFORM))
        self.regions.learn_slots()
        tell(FrontendRequest.SET_OWNER)
        tell(FrontendRequest.SET_FEATURES, U64(self.features))

    def has(self, feature: ProtocolFeature) -> bool:
        """Whether a protocol feature was negotiated."""
        return feature in self.requests.acked

    def _require(self, feature: ProtocolFeature) -> None:
        if not self.has(feature):
            raise Refused(f"{feature.name}", "not negotiated", "the back end has to offer it", "use another daemon")

    @property
    def connected(self) -> bool:
        """Whether nothing has ended the connection, as far as is known."""
        return self.requests.connected

    def vring(self, index: int) -> FrontendVring:
        """Ring `index`, 0 to 255, made when it is asked for. PeerError for one that the back end says it hasn't."""
        if not is_whole(index, 0xFF):
            raise UsageError("ring", repr(index), "has to be an int from 0 to 255", "give the index of a ring")
        with self.requests.ending.call():
            if index not in self.vrings:
                if self.queue_count is not None and index >= self.queue_count:
                    raise PeerError("ring", index, f"has to be one of the back end's {self.queue_count}")
                vring = FrontendVring(index, self.requests, self.regions, features=lambda: self.features)
                vring.iommu = self.iommu if self.features & VIRTIO_F_IOMMU_PLATFORM else None
                if self.vrings.setdefault(index, vring) is not vring:  # another thread asked for it as well
                    vring.close()
            return self.vrings[index]

    # The back end's channel.

    def _open_channel(self) -> None:
        channel = FrontendChannel(self.requests.acked, self._handlers)
        self.channel = channel
        self.requests.watched[channel.fileno()] = self.serve_channel
        self.requests.tell(FrontendRequest.SET_BACKEND_REQ_FD, fds=[channel.theirs.fileno()])
        channel.theirs.close()

    def serve_channel(self) -> None:
        """Take what the back end asks on its channel; to be called when `channel` can be read."""
        with self.requests.lock:
            channel = self.channel  # close() does not wait for the lock
            if channel is None:
                return
            try:
                channel.serve()
            except PeerError as error:
                self._close_channel()
                if not isinstance(error, Disconnected):
                    raise

    def _close_channel(self) -> None:
        channel, self.channel = self.channel, None
        if channel is not None:
            self.requests.watched.pop(channel.fileno(), None)
            channel.close()

    # The device.

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the device's configuration space. Refused where they are not all in it."""
        self._require(ProtocolFeature.CONFIG)
        question = Config(offset, CONFIG_WRITABLE, bytes(size))
        data = self.requests.ask(FrontendRequest.GET_CONFIG, Config, question).data
        if len(data) != size:
            raise PeerError("GET_CONFIG", f"{len(data)} bytes", f"has to answer the {size} bytes that were asked for")
        return data

    def set_config(self, offset: int, data: bytes, *, migration: bool = False) -> None:
        """Write to the configuration space: what the driver may write, or with `migration` anything."""
        self._require(ProtocolFeature.CONFIG)
        flags = CONFIG_LIVE_MIGRATION if migration else CONFIG_WRITABLE
        self.requests.tell(FrontendRequest.SET_CONFIG, Config(offset, flags, data))

    @property
    def status(self) -> int:
        """The virtio device status. Setting it to 0 resets the device."""
        self._require(ProtocolFeature.STATUS)
        return self.requests.ask(FrontendRequest.GET_STATUS, U64).value

    @status.setter
    def status(self, status: int) -> None:
        self._require(ProtocolFeature.STATUS)
        self.requests.tell(FrontendRequest.SET_STATUS, U64(status))

    def reset_device(self) -> None:
        """RESET_DEVICE: the device is as before the driver came, and every ring stopped and disabled."""
        self._require(ProtocolFeature.RESET_DEVICE)
        self.requests.tell(FrontendRequest.RESET_DEVICE)
        for vring in tuple(self.vrings.values()):
            vring.started = vring.enabled = False

    def save_state(self, *, limit: int = MAX_STATE, timeout: float = TIME_LIMIT) -> bytes:
        """What the device knows that is not in guest memory, for another back end. All rings are stopped.

        Raises UsageError while one is started, and what `state.save_state` does.
        """
        self._require_suspended()
        return save_state(self.requests, limit=limit, timeout=timeout)

    def load_state(self, state: bytes, *, timeout: float = TIME_LIMIT) -> None:
        """Have the back end take up where another one saved `state`; then start the rings where that one stopped them.

        Raises UsageError while a ring is started, and what `state.load_state` does.
        """
        self._require_suspended()
        load_state(self.requests, state, timeout=timeout)

    def _require_suspended(self) -> None:
        self._require(ProtocolFeature.DEVICE_STATE)
        if started := [vring.index for vring in tuple(self.vrings.values()) if vring.started]:
            raise UsageError("rings", started, "have to be stopped while state is transferred", "stop them first")

    # What outlives the back end, and what follows it.

    def track_inflight(self, num_queues: int, queue_size: int) -> None:
        """Have the back end note which requests it has, in memory that outlives it. Before rings are started."""
        self._require(ProtocolFeature.INFLIGHT_SHMFD)
        with self.requests.ending.call():
            self._inflight.track(num_queues, queue_size)

    def start_logging(self, highest_address: GuestAddress) -> None:
        """Have the back end log each page that it writes to, up to guest address `highest_address` inclusive.

        While it logs already: have it go on in a log that reaches up to there, what was logged being kept; memory that
        is shared meanwhile does so too. Raises Refused, with what was before as it was, where the back end can't.
        """
        self._require(ProtocolFeature.LOG_SHMFD)
        if not self.offered & F_LOG_ALL:
            raise Refused("LOG_ALL", "not offered", "the back end has to offer it")
        self._logging.start(highest_address, self.features)

    def take_dirty_pages(self) -> set[int]:
        """The numbers of the pages of LOG_PAGE bytes that were logged since the last call. UsageError without a log."""
        with self.requests.ending.call():
            return self._logging.take()

    def stop_logging(self) -> set[int]:
        """Have the back end log no more; the pages that it had logged and that nobody took."""
        with self.requests.ending.call():
            return self._logging.stop()

    # Another connection.

    def reconnect(self, connection: Connection) -> None:
        """Set up a daemon that came back exactly as the one before it: features, memory, inflight, log, rings.

        Each ring that was started goes on where the old daemon had left it in guest memory, so what that one had not
        used is available again. That is exact where the old one used chains in order, or with `track_inflight`, from
        which the new one knows which were being worked on. PeerError where it does not offer all that was in use,
        Disconnected where `close()` was called, meanwhile or before. The connection is taken over, and closed then.
        """
        with self.requests.lock:
            try:
                with self.requests.ending.call():
                    self._close_channel()
                    self.requests.renew(connection)
                    self.requests.ending.check()  # who closed it before that closed the connection before this one
                    self._set_up_again()
            except BaseException:
                self.requests.close()
                connection.close()
                raise

    def _set_up_again(self) -> None:
        self._negotiate()
        features, acked = self._in_use
        if (features, acked) != (self.features, self.requests.acked):
            limit = f"have to be those that are in use, {features:#x} and {acked.name}"
            raise PeerError("features", f"{self.features:#x} and {self.requests.acked.name}", limit)
        self._inflight.send()
        self.regions.share_again()
        self._logging.send_again()
        for vring in tuple(self.vrings.values()):
            vring.resume()

    def close(self) -> None:
        """Close the connection, and what is ours, for good. The memory that was shared is the caller's.

        A call that another thread is in ends with Disconnected; whether it did is not waited for.
        """
        self.requests.ending.come()
        self.requests.close()  # before descriptors whose numbers a request may have: they are sent to nobody
        self.requests.ending.let_go(self._let_go)

    def _let_go(self) -> None:
        self._close_channel()
        for vring in tuple(self.vrings.values()):
            vring.close()
        self.vrings.clear()
        self._inflight.close()
        self._logging.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def accept(listener: socket.socket, *, timeout: float) -> Connection:
    """The connection of a daemon that comes to us, within `timeout` seconds. HostError where none comes."""
    listener.settimeout(timeout)
    try:
        sock, _ = listener.accept()
    except OSError as error:
        limit = f"a daemon has to connect within {timeout:g} s"
        raise HostError("socket", str(listener.getsockname()), limit) from error
    return Connection(sock, "daemon")
