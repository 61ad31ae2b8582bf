"""A loopback server that answers with raw bytes, in a thread: what no web framework would send."""

import asyncio
import gzip
import io
import threading
import zlib
from collections import Counter

from PIL import Image


def jpeg(side=16, seed=0):
    out = io.BytesIO()
    Image.new("RGB", (side, side), (seed % 256, seed // 256 % 256, 7)).save(out, "JPEG")
    return out.getvalue()


def answer(body=b"", status="200 OK", **headers):
    """The bytes of a whole HTTP answer; names of headers with _ for -."""
    lines = {"Content-Length": len(body), "Content-Type": "image/jpeg"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{text}\r\n".encode() + body


def gzip_bomb(megabytes=1000):
    """Zeros, packed: one byte in a thousand. Its checksum, which nobody should reach, is wrong."""
    packer, piece = zlib.compressobj(9, wbits=31), bytes(1_000_000)
    first = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * (megabytes - 1) + packer.flush()


async def drip(writer):
    writer.write(answer(jpeg())[:60])
    while True:
        await asyncio.sleep(0.05)
        writer.write(b" ")
        await writer.drain()


async def endless(writer):
    writer.write(answer(Content_Length=None, Connection="close"))
    while True:
        writer.write(bytes(1 << 16))
        await writer.drain()


async def silence(writer):
    await asyncio.sleep(3600)


ROBOTS = answer(status="404 Not Found")
PAGES = {
    "/robots.txt": ROBOTS,
    "/good": answer(jpeg()),
    "/zipped": answer(gzip.compress(jpeg()), Content_Encoding="gzip"),
    "/loop": answer(status="302 Found", Location="/loop"),
    "/to-file": answer(status="302 Found", Location="file:///etc/passwd"),
    "/to-data": answer(status="302 Found", Location="data:image/png;base64,AA=="),
    "/to-good": answer(status="301 Moved Permanently", Location="/good"),
    "/too-long": answer(jpeg(), Content_Length=100_000, Connection="close"),
    "/too-short": answer(jpeg(), Content_Length=100),
    "/html": answer(b"<html>no</html>", Content_Type="text/html"),
    "/html-lies": answer(b"\n <!DOCTYPE html><html>no</html>"),
    "/empty": answer(),
    "/204": answer(status="204 No Content", Content_Length=None),
    "/206": answer(jpeg(), status="206 Partial Content"),
    "/bad-chunks": answer(b"zz\r\nnonsense", Content_Length=None, Transfer_Encoding="chunked"),
    "/bad-header": b"HTTP/1.1 200 OK\r\nA\x00\xff b c\r\n\r\n",
    "/no-http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "/noise": answer(bytes(range(256)) * 40),
    "/bad-gzip": answer(b"not gzip at all", Content_Encoding="gzip"),
    "/noai": answer(jpeg(), X_Robots_Tag="noindex, noai"),
    "/big": answer(bytes(3_000_000)),
    "/drip": drip,
    "/endless": endless,
    "/silence": silence,
}


class BadServer:
    """`with BadServer(pages) as server:`; a page is bytes, or a coroutine function of the writer.

    `server.requests` counts by path, `server.agents` holds the User-Agent lines, `server.most_open`
    the most requests at once; `delay` in seconds is before every answer.
    """

    def __init__(self, pages=PAGES, host="127.0.0.1", delay=0.0):
        self.pages, self.host, self.delay = dict(pages), host, delay
        self.requests, self.agents, self.open, self.most_open = Counter(), set(), 0, 0
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()

    @property
    def url(self):
        return f"http://{self.host}:{self.port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self):
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self):
        self._stop, tasks = asyncio.Event(), set()

        async def client(reader, writer):
            tasks.add(asyncio.current_task())
            try:
                await self._client(reader, writer)
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(client, self.host, 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _client(self, reader, writer):
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            path = request.split(b" ", 2)[1].decode()
            self.requests[path] += 1
            self.agents |= {x for x in request.decode().split("\r\n") if x.startswith("User-A")}
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            try:
                await asyncio.sleep(self.delay)
                page = self.pages.get(path.partition("?")[0], answer(status="404 Not Found"))
                if not isinstance(page, bytes):
                    await page(writer)
                    continue
                writer.write(page)
                await writer.drain()
            finally:
                self.open -= 1
            if b"Connection: close" in page:
                return
