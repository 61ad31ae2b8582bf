"""Fetch one picture from a web that is slow, broken or hostile: its bytes, or a named failure.

Asks robots.txt first, follows redirects by hand, connects to no private address, and reads no more
than it was allowed. Keeps no files and no ledger: that is download.py. Used by processdata_01.
"""

import asyncio
import email.utils
import io
import ipaddress
import random
import re
import socket
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import aiohttp
from PIL import Image
from protego import Protego
from yarl import URL

import captionlib
from captionlib.errors import InputError
from captionlib.images import MAX_PIXELS, ImageError

TOKEN = "captionlib"  # what the rules of a robots.txt name us
USER_AGENT = f"{TOKEN}/{captionlib.__version__} (dataset download; contact: {{contact}})"
MAX_REDIRECTS = 5
REDIRECTS = {301, 302, 303, 307, 308}
ROBOTS_BYTES = 512_000  # of a robots.txt; RFC 9309, section 2.5, asks for 500 KiB at least
KEEP_ALIVE = 2.0  # seconds; many hosts with longer ones run out of sockets
PIECE = 1 << 16  # bytes read at once
HEADERS = ("JPEG", "PNG", "GIF", "WEBP")  # formats whose size is looked at while they arrive
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
PUBLIC_6 = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out (RFC 4291, section 2.4)
# Reasons, or their beginnings, that another try may change. All others are for good.
PASSING = (
    "timeout", "no connection", "connection cut short", "robots.txt unavailable",
    "file name of several URLs",  # the next table may be mended
    "http 408", "http 425", "http 429", "http 500", "http 502", "http 503", "http 504",
)  # fmt: skip


@dataclass(frozen=True)
class Manners:
    """How to fetch. timeout in seconds for one request, max_bytes for a decoded body."""

    connections: int = 64
    per_host: int = 16
    timeout: float = 20.0
    tries: int = 3
    wait: float = 0.5  # seconds before the second try; doubled each time
    max_wait: float = 30.0  # a server that asks for more (Retry-After) is given up
    max_bytes: int = 20_000_000
    max_pixels: int = MAX_PIXELS
    robots: bool = True  # obey robots.txt and X-Robots-Tag
    allow_private: bool = False  # connect to loopback and to the local network, too
    contact: str = "not given"

    def __post_init__(self):
        for name in ("connections", "per_host", "tries", "max_bytes", "max_pixels", "timeout"):
            if not 0 < getattr(self, name) < 1e12:
                raise InputError(f"{name} of download must be above 0, not {getattr(self, name)}.")
        if not self.contact.isprintable():
            raise InputError(f"contact of download must be one line of text: {self.contact!r}.")


class FetchError(Exception):
    """A try that failed; its text is the reason. `wait`: seconds that the server asked for."""

    def __init__(self, reason: str, http: int | None = None, wait=0.0, final=False, tries=0):
        super().__init__(reason)
        self.http, self.wait, self.tries = http, wait, tries
        self.again = not final and reason.startswith(PASSING)


class _PrivateAddress(OSError):
    """Raised where a socket is made; aiohttp hands it on inside a ClientConnectorError."""


class _Host:
    """What is known of one scheme, host and port."""

    def __init__(self, per_host: int):
        self.slots, self.lock = asyncio.Semaphore(per_host), asyncio.Lock()
        self.robots: bytes | FetchError | None = None  # its text, or why there is none


class Fetcher:
    """One session of polite requests: `async with Fetcher(manners) as fetcher`."""

    def __init__(self, manners: Manners):
        self.manners = manners
        self._hosts = defaultdict(lambda: _Host(manners.per_host))
        self._slots = asyncio.Semaphore(manners.connections)

    async def __aenter__(self) -> "Fetcher":
        # for look-ups of names and for slow disks: dead names would hold up the usual six
        threads = ThreadPoolExecutor(2 * self.manners.connections)
        asyncio.get_running_loop().set_default_executor(threads)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE, socket_factory=self._socket
            ),
            timeout=aiohttp.ClientTimeout(total=self.manners.timeout),
            headers={
                "User-Agent": USER_AGENT.format(contact=self.manners.contact),
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    async def fetch(self, url: str, keep: Callable) -> tuple:
        """(await keep(body), tries) of an image; raises FetchError.

        keep runs on a connection's place, so that a slow disk slows the fetching; it must not
        raise. Waiting, for another try or for a slow host, holds no place.
        """

        async def take(answer: aiohttp.ClientResponse):
            return await keep(await self._image(answer))

        return await self._patiently(lambda: self._get(url, take, self.manners.robots))

    async def _patiently(self, attempt: Callable[[], Coroutine]) -> tuple:
        for tries in range(1, self.manners.tries + 1):
            try:
                with _named_failures():
                    return await attempt(), tries
            except FetchError as failed:
                failed.tries = tries
                spread = random.uniform(1, 1.5)  # so that those who failed together come apart
                wait = failed.wait or self.manners.wait * 2 ** (tries - 1) * spread
                if not failed.again or tries == self.manners.tries or wait > self.manners.max_wait:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _get(self, address: str | URL, take: Callable, obey: bool):
        """take(answer) of the URL or of where it leads."""
        url = URL(address)
        for _ in range(MAX_REDIRECTS + 1):
            host = self._host(url)
            if obey:
                await self._obey(host, url)
            get = partial(self._session.get, url, allow_redirects=False)
            async with host.slots, self._slots, get() as answer:
                if answer.status not in REDIRECTS or "Location" not in answer.headers:
                    return await take(answer)
                url = url.join(URL(answer.headers["Location"]))
        raise FetchError("too many redirects")

    def _host(self, url: URL) -> _Host:
        """The host of a URL that we may ask at all."""
        if url.scheme not in ("http", "https"):
            raise FetchError("not an http(s) url")
        if url.user is not None or url.password is not None:
            raise FetchError("credentials in the url")
        name = url.host or ""
        numeric = name.replace(".", "").isdigit()  # 127.1 and 2130706433 are 127.0.0.1, too
        if numeric and not self.manners.allow_private and is_private(name):
            raise FetchError("private address")
        return self._hosts[url.origin()]

    def _socket(self, info: tuple) -> socket.socket:
        """The one place where an address is connected to: after the names are resolved."""
        family, kind, protocol, _, address = info
        if not self.manners.allow_private and is_private(address[0]):
            raise _PrivateAddress("private address")
        return socket.socket(family, kind, protocol)

    async def _obey(self, host: _Host, url: URL) -> None:
        async with host.lock:  # one asks for robots.txt, the others wait for its answer
            if host.robots is None:
                host.robots = await self._robots(url.origin() / "robots.txt")
            if isinstance(host.robots, FetchError):
                raise FetchError(str(host.robots), host.robots.http, final=True)
            rules = _rules(host.robots)
            if not rules.can_fetch(str(url), TOKEN):
                raise FetchError("refused by robots.txt")
            if delay := rules.crawl_delay(TOKEN):
                await asyncio.sleep(min(delay, self.manners.max_wait))

    async def _robots(self, url: URL) -> bytes | FetchError:
        """RFC 9309, section 2.3.1: no such file allows all, a broken server nothing."""
        try:
            return (await self._patiently(lambda: self._get(url, _robots_text, False)))[0]
        except FetchError as failed:
            own = str(failed).startswith(("no connection", "private address", "invalid url"))
            reason = str(failed) if own else f"robots.txt unavailable: {failed}"
            return FetchError(reason, failed.http, final=True)

    async def _image(self, answer: aiohttp.ClientResponse) -> bytearray:
        if answer.status != 200:
            raise _http_error(answer)
        if self.manners.robots and _no_ai(answer.headers.getall("X-Robots-Tag", ())):
            raise FetchError("refused by X-Robots-Tag", 200)
        if answer.content_type in ("text/html", "application/xhtml+xml"):
            raise FetchError("a web page, not an image", 200)
        body = bytearray()
        async for piece in answer.content.iter_chunked(PIECE):
            seen = len(body)
            body += piece
            if seen < PIECE <= len(body):
                _refuse_by_header(body, self.manners.max_pixels)
            if len(body) > self.manners.max_bytes:
                raise FetchError(f"more than {self.manners.max_bytes / 1e6:.0f} MB", 200)
        if not body:
            raise FetchError("empty answer", 200)
        if len(body) < PIECE:
            _refuse_by_header(body, self.manners.max_pixels)
        return body


@contextmanager
def _named_failures():
    try:
        yield
    except FetchError:
        raise
    except TimeoutError:
        raise FetchError("timeout") from None
    except aiohttp.ClientPayloadError:
        raise FetchError("connection cut short") from None
    except aiohttp.ClientResponseError:
        raise FetchError("broken answer") from None
    except (aiohttp.InvalidURL, ValueError):
        raise FetchError("invalid url") from None
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(getattr(error, "os_error", None), _PrivateAddress):
            raise FetchError("private address") from None
        raise FetchError(f"no connection: {type(error).__name__}") from None
    except Exception as error:  # noqa: BLE001 - one URL of a million must not end the run
        raise FetchError(f"unexpected: {type(error).__name__}") from None


def is_private(address: str) -> bool:
    """Whether an IP address is anything but one of the public internet; odd spellings are."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return True
    if ip.version == 6:
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        ip = inner or ip.ipv4_mapped or ip.sixtofour or ip
    foreign = ip.version == 6 and ip not in PUBLIC_6
    return foreign or not ip.is_global or ip.is_multicast or ip.is_reserved


def _refuse_by_header(body: bytearray, max_pixels: int) -> None:
    """FetchError where the first PIECE of the body shows no picture for us."""
    head = bytes(body[:PIECE])  # of more, some of Pillow's readers would hold up all transfers
    if head[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
        raise FetchError("a web page, not an image", 200)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is refused below
            width, height = Image.open(io.BytesIO(head), formats=HEADERS).size
    except Image.DecompressionBombError as error:
        raise FetchError(f"too many pixels: {error}", 200) from None
    except Exception:  # noqa: BLE001 - Pillow's readers raise anything; captionlib check judges
        return
    if width * height > max_pixels:
        raise FetchError(f"too many pixels: {width} x {height}", 200)


async def _robots_text(answer: aiohttp.ClientResponse) -> bytes:
    if answer.status != 200:
        failed = _http_error(answer)
        if 400 <= answer.status < 500 and not failed.again:
            return b""
        raise failed
    body = bytearray()
    async for piece in answer.content.iter_chunked(PIECE):
        body += piece
        if len(body) > ROBOTS_BYTES:
            break
    return zlib.compress(body[:ROBOTS_BYTES])  # kept for every host of the run


@lru_cache(1000)  # some 40 KB each: a host keeps its text, the rules are parsed again
def _rules(robots: bytes) -> Protego:
    return Protego.parse(zlib.decompress(robots).decode("utf-8", "replace") if robots else "")


def _no_ai(headers: list[str]) -> bool:
    """Whether an X-Robots-Tag says noai or noimageai, to all or to us ("captionlib: noai")."""
    for header in headers:
        agent = TOKEN
        for rule in header.lower().split(","):
            named = re.match(r"\s*([\w-]+)\s*:(?!\s*-?\d)(.*)", rule)
            if named and not named[1].startswith("max-"):
                agent, rule = named[1], named[2]
            if agent == TOKEN and rule.strip() in ("noai", "noimageai"):
                return True
    return False


def _http_error(answer: aiohttp.ClientResponse) -> FetchError:
    wait = _retry_after(answer.headers.get("Retry-After", ""))
    return FetchError(f"http {answer.status}", answer.status, wait)


def _retry_after(value: str) -> float:
    """Seconds, from the header's number or date (RFC 9110, section 10.2.3)."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def fetch_bytes(url: str) -> bytes:
    """One URL's body, for `open_image`. Raises ImageError with the reason."""

    async def fetch() -> bytes:
        async def keep(body: bytearray) -> bytes:
            return bytes(body)

        # a person's own request: no crawler's rules
        async with Fetcher(Manners(tries=1, robots=False, allow_private=True)) as fetcher:
            return (await fetcher.fetch(url, keep))[0]

    try:
        return run_coroutine(fetch())
    except FetchError as failed:
        raise ImageError(f"cannot be downloaded: {failed}") from None


def run_coroutine(coroutine: Coroutine):
    """asyncio.run in a thread of its own: inside Jupyter a loop runs already. Ctrl-C cancels it."""
    outcome: list = []
    ended = threading.Event()  # not join: interrupted, it takes the thread for ended (Python 3.11)
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)

    def run() -> None:
        try:
            outcome.append(loop.run_until_complete(task))
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            outcome.append(error)
        finally:
            loop.close()
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        while not ended.wait(0.1):  # short waits: a plain one would not see Ctrl-C on Windows
            pass
    except KeyboardInterrupt:
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
