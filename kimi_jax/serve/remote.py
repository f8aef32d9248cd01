"""Images and videos that a server fetches from http and https URLs, as strangers name them.

A server stands where its clients do not: beside private services and the metadata address of its machine. So a name is
resolved first, every address that it resolves to is checked, and the connection is made to the checked address itself,
anew for each redirection. Whatever goes wrong, the client is told the same, so that it cannot map the network by it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from kimi_jax.data import BadRecord

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

SECONDS = 20.0  # for one URL in all: the wait for a place, names, redirections, the last byte
MAX_BYTES = 64 << 20
MAX_REDIRECTIONS = 3
MAX_AT_ONCE = 8
MAX_URL = 8192  # characters
MAX_HEADER_BYTES = 32 << 10
# beside what the standard library knows as not global: metadata services of Azure, 6to4 relays, Teredo and 6to4
_NEVER = tuple(map(ipaddress.ip_network, (
    "168.63.129.16/32", "192.88.99.0/24", "192.0.0.0/24", "100.64.0.0/10", "0.0.0.0/8", "240.0.0.0/4", "2001::/23",
    "2002::/16", "64:ff9b:1::/48", "fec0::/10", "3fff::/20", "5f00::/16",
)))  # fmt: skip
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def is_public(address: IPAddress) -> bool:
    """Whether an address belongs to the public internet, an IPv4 address inside an IPv6 one included."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_IPV6 or address.scope_id is not None:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER)


@dataclass(eq=False)
class Fetcher:
    """Fetches URLs for one event loop.

    allowed: networks that may be reached although they are not public. seconds, max_bytes: of one URL in all.
    """

    allowed: Sequence[IPNetwork] = ()
    seconds: float = SECONDS
    max_bytes: int = MAX_BYTES
    _pool: concurrent.futures.ThreadPoolExecutor = field(init=False)
    _places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        # names are resolved by blocking calls, which must not take the threads of other requests
        self._pool = concurrent.futures.ThreadPoolExecutor(MAX_AT_ONCE, "resolve")
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def fetch(self, url: str, reserve: Callable[[int], None]) -> bytes:
        """The bytes at a URL. reserve: takes memory for them as they arrive; what it raises is passed on.

        Raises BadRecord(refused), the same for every reason; the log has the reason.
        """
        try:
            async with asyncio.timeout(self.seconds):
                async with self._places:
                    return await self._follow(url, reserve)
        except (OSError, ValueError, EOFError, TimeoutError, h11.ProtocolError) as error:
            logging.info("a remote URL was not fetched: %.200r: %s: %s", url, type(error).__name__, error)
            raise BadRecord("refused", url[:80], "the URL cannot be fetched") from error

    def close(self) -> None:
        """Lets the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, url: str, reserve: Callable[[int], None]) -> bytes:
        for _ in range(MAX_REDIRECTIONS + 1):
            parts = urlsplit(url[: MAX_URL + 1])
            if len(url) > MAX_URL or len(parts.hostname or "") > 253:
                raise ValueError("the URL is too long")
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
                raise ValueError("not a plain http or https URL")
            moved, data = await self._get(parts, reserve)
            if moved is None:
                return data
            url = urljoin(url, moved)
        raise ValueError("too many redirections")

    async def _resolve(self, host: str, port: int) -> str:
        """An address of the host that may be reached. Raises ValueError unless all of them may be."""
        found = await asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        for address in addresses:
            if not is_public(address) and not any(address in network for network in self.allowed):
                raise ValueError(f"{address} is not public")
        return str(addresses[0])

    async def _get(self, parts: SplitResult, reserve: Callable[[int], None]) -> tuple[str | None, bytes]:
        """(where it moved, b"") or (None, the body) of one request."""
        host, secure = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        name = host.encode("idna").decode()
        checked = await self._resolve(name, port)
        context = ssl.create_default_context() if secure else None
        reader, writer = await asyncio.open_connection(
            checked, port, ssl=context, server_hostname=name if secure else None, limit=1 << 16
        )
        try:
            connection = h11.Connection(h11.CLIENT, MAX_HEADER_BYTES)
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
                "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]") if parts.query else ""
            )
            shown = f"[{name}]" if ":" in name else name
            headers = [("Host", shown if parts.port is None else f"{shown}:{port}"), ("Accept", "image/*, video/*")]
            headers += [("Accept-Encoding", "identity"), ("Connection", "close"), ("User-Agent", "kimi_jax")]
            writer.write(connection.send(h11.Request(method="GET", target=target, headers=headers)))
            writer.write(connection.send(h11.EndOfMessage()))
            await writer.drain()
            return await self._receive(connection, reader, reserve)
        finally:
            writer.transport.abort()

    async def _receive(
        self, connection: h11.Connection, reader: asyncio.StreamReader, reserve: Callable[[int], None]
    ) -> tuple[str | None, bytes]:
        data = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                if event.status_code in (301, 302, 303, 307, 308):
                    return headers.get("location", ""), b""
                if event.status_code != 200 or headers.get("content-encoding", "identity") != "identity":
                    raise ValueError(f"status {event.status_code}")
            elif isinstance(event, h11.Data):
                if len(data) + len(event.data) > self.max_bytes:
                    raise ValueError(f"more than {self.max_bytes} bytes")
                reserve(len(event.data))
                data += event.data
            elif isinstance(event, h11.EndOfMessage):
                return None, bytes(data)
            elif not isinstance(event, h11.InformationalResponse):
                raise ValueError("the connection ended")
