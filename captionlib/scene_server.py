"""Serve the drawn scenes on loopback the way the real web does: some of them badly.

`SceneServer` is a context manager; `scene_table` writes the table of URLs that goes with it, in
zero_nlp's columns. Used by processdata_01 and the tests.
"""

import asyncio
import io
import threading
import zlib
from collections import Counter

import pandas as pd
from aiohttp import web
from PIL import Image

from captionlib import scenes

PORT = 8471  # always the same where it is free, so that a second run knows its URLs again
# What happens to scene number n of the training split, by n modulo 200. "moved" and "busy"
# end well; the others do not, 3.5 % in all. The other splits are served without a fault.
TROUBLE = {
    3: "missing", 18: "forbidden", 33: "slow", 63: "web page", 93: "cut", 108: "blank",
    123: "bomb", 153: "moved", 183: "busy",
}  # fmt: skip
ROBOTS = "User-agent: *\n" + "".join(
    f"Disallow: /train-*{n:03d}.png\n" for n in range(18, 999, 200)
)
BOMB_SIDE = 12_000  # pixels: 144 million, in a file of 18 kB


def scene_name(split: str, number: int) -> str:
    """The file name of a scene, "test-000007.png"."""
    return f"{split}-{number:06d}.png"


def scene_of(filename: str) -> scenes.Scene:
    """The scene that a file name of `scene_table` stands for."""
    split, number = filename.removesuffix(".png").rsplit("-", 1)
    return scenes.make_scene(int(number), split)


def png(scene: scenes.Scene) -> bytes:
    """The scene's picture as a PNG file."""
    return as_png(scenes.draw(scene))


def as_png(image: Image.Image) -> bytes:
    """The picture as a PNG file, quickly."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def scene_table(numbers: dict[str, int], base_url: str) -> pd.DataFrame:
    """Columns text, url, filename, lang, split: five captions a scene in each language.

    numbers: {"train": 6000, "val": 200, ...} scenes; each has 15 rows.
    """
    rows = [
        (text, f"{base_url}/{scene_name(split, n)}", scene_name(split, n), lang, split)
        for split, count in numbers.items()
        for n in range(count)
        for lang, texts in scenes.captions(scenes.make_scene(n, split), n).items()
        for text in texts
    ]
    return pd.DataFrame(rows, columns=["text", "url", "filename", "lang", "split"])


class SceneServer:
    """`with SceneServer() as server:` answers at `server.url` until the block ends.

    port: the wished port; another free one when it is in use, or with 0. `server.requests` counts
    the requests by path.
    """

    def __init__(self, port: int = PORT):
        self.port = port
        self.requests: Counter = Counter()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "SceneServer":
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _serve(self) -> None:
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application()
        app.router.add_get("/{name}", self._answer)
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
        except OSError:  # in use: let the system choose
            await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name == "robots.txt":
            return web.Response(text=ROBOTS)
        self.requests[name] += 1
        split, number = name.removesuffix(".png").rsplit("-", 1)
        trouble = TROUBLE.get(int(number) % 200) if split == "train" else None
        if trouble == "missing":
            raise web.HTTPNotFound
        if trouble == "slow":
            await asyncio.sleep(3600)
        if trouble == "web page":
            return web.Response(
                text="<html>This picture has moved.</html>", content_type="text/html"
            )
        if trouble == "moved" and "moved" not in request.query:
            raise web.HTTPFound(f"/{name}?moved")
        if trouble == "busy" and self.requests[name] == 1:
            raise web.HTTPTooManyRequests(headers={"Retry-After": "1"})
        if trouble == "bomb":
            body = _bomb()
        elif trouble == "blank":
            body = as_png(Image.new("RGB", (64, 64), "lightgrey"))
        else:
            body = png(scene_of(name))
        body = body[: len(body) * 2 // 3] if trouble == "cut" else body
        return web.Response(body=body, content_type="image/png")


def _bomb() -> bytes:
    """A correct PNG of 12,000 x 12,000 black pixels, one bit each, in about 18 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    side = BOMB_SIDE.to_bytes(4, "big")
    header = side + side + bytes([1, 0, 0, 0, 0])  # one bit a pixel, grey, not interlaced
    rows = zlib.compress(bytes((BOMB_SIDE // 8 + 1) * BOMB_SIDE), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
