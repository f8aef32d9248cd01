"""Remote media: which addresses are reached, for how long, and that every failure is told alike."""

import asyncio
import base64
import dataclasses
import ipaddress
import socket
import threading

import openai
import pytest

from kimi_jax.config import preset
from kimi_jax.data import BadRecord
from kimi_jax.serve.app import MAX_REMOTE
from kimi_jax.serve.remote import Fetcher, is_public
from tests.serve.server import ScriptedEngine, byte_tokenizer, client, image_uri, serving

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
PATIENCE = 60


class Site:
    """A server on loopback that answers each path with raw bytes; `release` ends answers that hang."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.answers: dict[str, bytes] = {}
        self.requests: list[bytes] = []
        self.release = threading.Event()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            with connection:
                request = b""
                while b"\r\n\r\n" not in request and request[:1] in b"G" and (piece := connection.recv(4096)):
                    request += piece
                if not request:
                    continue
                self.requests.append(request)
                path = request.split()[1].decode("latin-1") if request.startswith(b"GET ") else ""
                if path == "/hang":
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
                    while not self.release.wait(0.01):  # a byte at a time: no read ever waits long
                        try:
                            connection.sendall(b"x")
                        except OSError:
                            break
                else:
                    connection.sendall(self.answers.get(path, b""))

    def close(self):
        self.release.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(PATIENCE)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def response(status="200 OK", body=b"fetched", *headers):
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def fetch(address, allowed=LOOPBACK, **settings):
    async def run():
        fetcher = Fetcher(allowed, **settings)
        try:
            return await fetcher.fetch(address, taken.append)
        finally:
            fetcher.close()

    taken: list[int] = []
    return asyncio.run(run())


def failure(address, **settings):
    with pytest.raises(BadRecord) as error:
        fetch(address, **settings)
    return error.value


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "192.0.2.1",
    "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001::1", "2001:db8::1",
    "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "3fff::1", "5f00::1",
    "::ffff:0:127.0.0.1",
])  # fmt: skip
def test_address_that_is_not_public_is_known(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_address_that_is_public_is_known(address):
    assert is_public(ipaddress.ip_address(address))


def test_remote_media_of_an_allowed_network_are_fetched(site):
    site.answers = {"/a%20b.png?x=1": response(), "/moved": response("302 Found", b"", "location: /a b.png?x=1")}
    assert fetch(f"{site.address}/a b.png?x=1#part") == b"fetched"
    assert fetch(f"{site.address}/moved") == b"fetched"
    assert f"host: 127.0.0.1:{site.port}".encode() in site.requests[0].lower()


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1", "0",
    "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]", "[fe80::1%25lo]", "１２７.０.０.１", "127。0。0。1", "ⓛocalhost", "localhost.", "127.0.0.1.",
    "169.254.169.254",
])  # fmt: skip
def test_spellings_of_private_hosts_are_never_connected_to(site, host):
    site.answers = {"/": response()}
    failure(f"http://{host}:{site.port}/", allowed=())
    assert site.requests == []


def test_name_is_resolved_once_and_the_connection_made_to_the_checked_address(site, monkeypatch):
    """A name that is public when it is checked and private when it is connected to (DNS rebinding)."""
    real, asked = socket.getaddrinfo, []

    def resolve(host, port, *rest, **more):
        if host == "rebinding.test":
            asked.append(host)
            ip = "127.0.0.1" if len(asked) == 1 else "10.9.9.9"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]
        return real(host, port, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    site.answers = {"/": response()}
    assert fetch(f"http://rebinding.test:{site.port}/") == b"fetched"
    assert asked == ["rebinding.test"]
    failure(f"http://rebinding.test:{site.port}/")  # now it is 10.9.9.9, which is not allowed
    assert len(site.requests) == 1


def test_name_with_one_private_address_is_refused(site, monkeypatch):
    pair = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, site.port)) for ip in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pair)
    failure(f"http://two.test:{site.port}/")
    assert site.requests == []


def test_redirections_are_checked_and_failures_are_told_alike(site, caplog):
    """A private target, another scheme, a loop, a refused port, bad HTTP, a bad status: one message."""
    site.answers = {
        "/private": response("302 Found", b"", "location: http://10.0.0.1/"),
        "/metadata": response("307 Temporary", b"", "location: http://169.254.169.254/latest/meta-data/"),
        "/file": response("302 Found", b"", "location: file:///etc/passwd"),
        "/ftp": response("302 Found", b"", f"location: ftp://127.0.0.1:{site.port}/"),
        "/loop": response("302 Found", b"", "location: /loop"),
        "/nowhere": response("302 Found", b""),
        "/missing": response("404 Not Found"),
        "/packed": response("200 OK", b"x", "content-encoding: gzip"),
        "/garbage": b"garbage\r\n\r\n",
        "/short": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx",
        "/lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        "/headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
        "/large": response("200 OK", b"x" * 5000),
    }
    details = {(e.reason, e.detail) for path in site.answers for e in [failure(site.address + path, max_bytes=4096)]}
    for address in ("http://127.0.0.1:1/", "http://no.such.invalid/", f"http://10.0.0.1:{site.port}/", "http:///x",
                    f"http://u:p@127.0.0.1:{site.port}/", "http://127.0.0.1:99999/", "http://[::1/", "gopher://a/",
                    f"https://127.0.0.1:{site.port}/large", f"{site.address}/a\r\nx: y", "http://" + "a" * 9000,
                    "http://" + "ü" * 3000 + "/"):  # fmt: skip
        error = failure(address, max_bytes=4096)
        details.add((error.reason, error.detail))
    assert details == {("refused", "the URL cannot be fetched")}


def test_time_limit_of_remote_media_is_in_total(site):
    """The site sends a byte every 10 ms for ever, so a limit on each read would never end it."""
    failure(f"{site.address}/hang", seconds=0.3)


def test_slow_names_hold_only_their_own_threads(monkeypatch):
    """Twenty names that hang take the eight threads of names and no other thread."""
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(PATIENCE) and [])

    async def run():
        fetcher = Fetcher(seconds=0.2)
        slow = [asyncio.ensure_future(fetcher.fetch(f"http://{i}.test/", lambda _: None)) for i in range(20)]
        assert await asyncio.to_thread(lambda: "free") == "free"
        assert all(isinstance(e, BadRecord) for e in await asyncio.gather(*slow, return_exceptions=True))
        release.set()
        fetcher.close()

    asyncio.run(run())


def ask(address, urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]
    with client(address) as api:
        return api.chat.completions.create(model="tiny", messages=messages, max_tokens=32)


def test_request_with_a_remote_image_is_answered_only_by_a_server_that_allows_its_network(site):
    """From request to prompt: the same bytes as a data URI give the same prompt; nothing is fetched where it is not
    allowed, and more URLs than a call may have are refused before any is."""
    data_uri = image_uri()
    site.answers = {"/a.png": response(body=base64.b64decode(data_uri.partition(",")[2]))}
    tokenizer = byte_tokenizer()
    config = dataclasses.replace(preset("demo"), media_placeholder_token_id=tokenizer.media_pad_id)
    url = f"{site.address}/a.png"
    engine = ScriptedEngine(tokenizer, lambda _: tokenizer.encode("</think>a square", allow_special_tokens=True))
    with serving(engine, tokenizer, config, remote=True, allowed_networks=LOOPBACK) as address:
        assert ask(address, [url]).choices[0].message.content == "a square"
        ask(address, [data_uri])
        assert list(engine.requests[0].token_ids) == list(engine.requests[1].token_ids)
        assert len(site.requests) == 1
        with pytest.raises(openai.BadRequestError, match=f"more than {MAX_REMOTE} remote URLs"):
            ask(address, [f"{url}?{i}" for i in range(MAX_REMOTE + 1)])
    with serving(engine, tokenizer, config, remote=True) as address:
        with pytest.raises(openai.BadRequestError):
            ask(address, [url])
    with serving(engine, tokenizer, config) as address:
        with pytest.raises(openai.BadRequestError, match="allow_remote_media"):
            ask(address, [url])
    assert len(site.requests) == 1
