"""Loading, downloading, packing: how fast and in how much memory, against a peer in the same run.

    python benchmarks/data.py [--only loading,download,workers,memory] [--quick]

Rounds of ours and of the peer alternate, so that a busy machine slows both; numbers are medians.
Prints one table a row and, as the last line, one JSON object. What is written lies in a temporary
folder, but for the environment of img2dataset (--peer-env), which is kept for the next time.
"""

import argparse
import asyncio
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import cycle
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CAPTIONLIB_SHARED") or ROOT.parent / "shared")
PEER_ENV = Path.home() / ".cache" / "captionlib-benchmarks"
PEER = "img2dataset==1.47.0"
TARGETS = {
    "load_vs_seed": ">= 10", "load_vs_limit": ">= 0.85", "download_vs_img2dataset": ">= 2",
    "lost_rows": "0", "two_workers_vs_one": ">= 1.8", "rss_growth": "<= 1.15",
}  # fmt: skip
SECONDS_ALLOWED = 20 * 60  # of the memory row
# Downloads go to memory: a new file on ext4 costs 7 us or, for minutes after many were deleted,
# 180 us, which would say more of the rounds before than of the programs.
MEMORY_DISK = "/dev/shm"


class Skip(Exception):
    """A row that cannot be measured here; the message says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows, with commas between")
    parser.add_argument("--quick", action="store_true", help="fewer images, rows and rounds")
    parser.add_argument("--peer-env", type=Path, default=PEER_ENV, help="img2dataset's own venv")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    result: dict = {"quick": arguments.quick, **dict.fromkeys(TARGETS)}
    for name in arguments.only.split(","):
        place = MEMORY_DISK if name == "download" and os.path.isdir(MEMORY_DISK) else None
        with tempfile.TemporaryDirectory(prefix="captionlib-bench-", dir=place) as folder:
            try:
                result |= ROWS[name](Path(folder), arguments)
            except Skip as reason:
                result[f"{name}_skipped"] = str(reason)
                print(f"\n{name}: skipped: {reason}")
    print(json.dumps(result))


def show(title: str, **rows) -> None:
    """One table: a line a name, either text or a ratio with its target."""
    print(f"\n{title}\n| what | value | target |\n|---|---|---|")
    for name, value in rows.items():
        text = f"{value:.3g}" if isinstance(value, float) and value < 100 else f"{value}"
        print(f"| {name} | {text} | {TARGETS.get(name, '')} |", flush=True)


def interleaved(functions: dict, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns; rounds of warming up are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + warm_up):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of rounds that were neighbours."""
    return median(a / b for a, b in zip(above, below, strict=True))


def originals() -> list[Path]:
    files = sorted((SHARED / "flickr8k" / "originals").glob("*.jpg"))
    if not files:
        raise Skip(f"no pictures in {SHARED}/flickr8k/originals (set CAPTIONLIB_SHARED)")
    return files


# Loading: one process on one core, files in the page cache


def loading(folder: Path, arguments) -> dict:
    """Every visit has captions of its own, as in an epoch: no tokenizer's cache has seen them."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import pandas as pd
    import torch
    from PIL import Image
    from transformers import ViTImageProcessorPil

    from captionlib import CaptionCollator, train_tokenizer
    from captionlib.collator import PixelTransform, simplejpeg

    files = originals()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    table = pd.concat(map(pd.read_csv, (SHARED / "flickr8k").glob("captions_[ze]?_*.csv")))
    table["lang"] = table.text.map(lambda text: "en" if text.isascii() else "zh")
    # Five captions of one image and language, in turn, until all have been used
    captions = table.groupby(["filename", "lang"]).text.agg(list).sample(frac=1, random_state=0)
    texts = [{"captions": each, "prompts": [""] * len(each)} for each in captions]
    endless = cycle(texts)
    tokenizer = train_tokenizer(table.text, "bpe", 8000)
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    data = squashed(table, files, folder)
    stored = [row["bytes"] for row in data["image"]]
    collator = CaptionCollator(tokenizer, PixelTransform(processor), tokenizer.bos_token_id)
    repeats = 1 if arguments.quick else 5

    padded = {"padding": "max_length", "max_length": 100, "truncation": True}

    def s0() -> None:
        """zero_nlp: open, RGB, the processor, one caption padded to 100; a sample at a time."""
        for file in files:
            image = Image.open(file).convert("RGB")
            processor(image, return_tensors="pt")
            tokenizer(next(endless)["captions"][0], **padded)

    def ours() -> None:
        for _ in range(repeats):
            for start in range(0, len(data), 32):
                rows = data.__getitems__(list(range(start, min(start + 32, len(data)))))
                collator([{**row, **next(endless)} for row in rows])

    def decode() -> None:
        for _ in range(repeats):
            for content in stored:
                Image.open(io.BytesIO(content)).load()

    try:
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        seconds = interleaved({"s0": s0, "ours": ours, "decode": decode}, 7)
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    many = repeats * len(files)
    result = {
        "load_vs_seed": ratio(seconds["s0"], seconds["ours"]) * repeats,
        "load_vs_limit": ratio(seconds["decode"], seconds["ours"]),
        "s0_images_per_s": round(len(files) / median(seconds["s0"])),
        "ours_images_per_s": round(many / median(seconds["ours"])),
        "decode_images_per_s": round(many / median(seconds["decode"])),
        "decoder": "simplejpeg" if simplejpeg else "Pillow",
    }
    limit = {"most_possible_vs_s0": result["decode_images_per_s"] / result["s0_images_per_s"]}
    show("Loading, one core: S0 with one caption, ours with five, packed", **result, **limit)
    return result


def squashed(table, files: list[Path], folder: Path):
    """The originals built by the library; rows as its trainer's DataLoader reads them."""
    from captionlib import build_dataset, check_images
    from captionlib.trainer import undecoded

    names = {file.name for file in files}
    own = table[table.filename.isin(names) & (table.lang == "zh")].rename(
        columns={"text": "caption"}
    )
    checks = check_images(files)
    data = build_dataset(
        own.assign(split="train"),
        checks,
        folder / "dataset",
        files[0].parent,
        stored_size=224,
        squash=True,
        check_lang=False,
    )
    return undecoded(data["train"])


# Downloading: a server in its own process, both sides in processes started alike


def body(jpeg: bytes, number: int) -> bytes:
    """The picture with its number in a comment: decodable, and no two alike."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + f"{number:08d}".encode() + jpeg[2:]


def jpeg_of_100_kb() -> bytes:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (332, 332, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=90)
    return out.getvalue()


BAD = ("http 404", "http 500", "a web page", "connection cut short")


def fate(number: int) -> str:
    """Why picture `number` cannot be had, or ""; a tenth cannot, in four equal kinds."""
    return BAD[number // 10 % 4] if number % 10 == 9 else ""


async def serve(port: int) -> None:
    """Answers for ever; `/times` tells when the first request came and the last answer went."""
    from aiohttp import web

    jpeg, times = jpeg_of_100_kb(), []

    async def picture(request: web.Request) -> web.StreamResponse:
        times.append(time.time())
        number = int(request.match_info["number"])
        content, problem = body(jpeg, number), fate(number)
        if problem in ("http 404", "http 500"):
            answer = web.Response(status=int(problem[-3:]))
        elif problem == "a web page":
            answer = web.Response(text="<html>no</html>", content_type="text/html")
        else:
            headers = {"Content-Type": "image/jpeg", "Content-Length": str(len(content))}
            answer = web.StreamResponse(headers=headers)
            await answer.prepare(request)
            await answer.write(content if not problem else content[: len(content) // 2])
            if problem:
                request.transport.close()
        times.append(time.time())
        return answer

    async def told(_) -> web.Response:
        span = (max(times) - min(times)) if times else 0
        times.clear()
        return web.json_response(span)

    app = web.Application()
    app.add_routes([web.get("/{number:[0-9]+}.jpg", picture), web.get("/times", told)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


OURS = """if __name__ == "__main__":
    import sys, pandas, captionlib
    urls = open(sys.argv[1]).read().split()
    table = pandas.DataFrame({"url": urls, "filename": [url.split("/")[-1] for url in urls]})
    manners = {"connections": 64, "per_host": 64, "timeout": 10, "tries": 1}
    captionlib.download(table, sys.argv[2], allow_private=True, **manners)
"""
THEIRS = """if __name__ == "__main__":
    import sys, img2dataset
    img2dataset.download(
        sys.argv[1], output_folder=sys.argv[2], output_format="files", input_format="txt",
        resize_mode="no", disable_all_reencoding=True, extract_exif=False, processes_count=1,
        thread_count=int(sys.argv[3]), timeout=10, retries=0,
    )
"""


def peer_python(folder: Path) -> str:
    """The Python of the peer's environment, made where there is none."""
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_folder / "python")
    if not list(bin_folder.glob("img2dataset*")):
        quiet = {"capture_output": True, "text": True}
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        made = subprocess.run([python, "-m", "pip", "install", "-q", PEER], **quiet)
        if made.returncode:
            raise Skip(f"cannot install {PEER}: {made.stderr.strip()[-200:]}")
    return python


def download(folder: Path, arguments) -> dict:
    """URLs a second between the first request and the last answer, as the server saw them:
    the start and the end of the processes, much slower in the peer, are left out."""
    python, port = peer_python(arguments.peer_env), free_port()
    count = 1000 if arguments.quick else 5000
    base = f"http://127.0.0.1:{port}"
    urls = folder / "urls.txt"
    urls.write_text("\n".join(f"{base}/{number}.jpg" for number in range(count)))
    commands = {"ours": [sys.executable, "-c", OURS]} | {
        f"peer_{threads}": [python, "-c", THEIRS, str(threads)] for threads in (32, 64)
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    lost = 0
    try:
        wait_for(f"{base}/times")
        for number in range(1 if arguments.quick else 3):
            for name, (program, flag, code, *more) in commands.items():
                out = folder / f"{name}-{number}"
                run([program, flag, code, str(urls), str(out), *more], folder)
                span = json.loads(urllib.request.urlopen(f"{base}/times").read())
                rates[name].append(count / span)
                if name == "ours":
                    lost += lost_rows(out, count)
    finally:
        server.kill()
        server.wait()
    best = max(("peer_32", "peer_64"), key=lambda name: median(rates[name]))
    result = {
        "download_vs_img2dataset": ratio(rates["ours"], rates[best]),
        "lost_rows": lost,
        **{f"{name}_urls_per_s": round(median(each)) for name, each in rates.items()},
    }
    show("Download, loopback, 100 KB each, a tenth bad (404, 500, html, cut short)", **result)
    return result


def lost_rows(out: Path, count: int) -> int:
    """URLs without one row that says what became of them, or with other bytes than were served."""
    with sqlite3.connect(out / "ledger.sqlite") as ledger:
        rows = ledger.execute("SELECT filename, status, reason, sha256 FROM downloads").fetchall()
    jpeg, known = jpeg_of_100_kb(), {name: rest for name, *rest in rows}
    right = 0
    for number in range(count):
        status, reason, digest = known.get(f"{number}.jpg", (None, "", None))
        if fate(number):
            right += status == "failed" and reason.startswith(fate(number))
        else:
            content = (out / f"{number}.jpg").read_bytes() if status == "ok" else b""
            same = content == body(jpeg, number)
            right += same and digest == hashlib.sha256(content).hexdigest()
    return count - right + len(rows) - len(known)


def free_port() -> int:
    import socket

    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            time.sleep(0.1)
    raise Skip(f"the server does not answer at {url}")


def run(command: list, folder: Path) -> None:
    """Wait for the command; its output is shown only when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise Skip(f"a command ended with {done.returncode}: {done.stderr.strip()[-300:]}")


# Check and pack: one and two workers, memory


def check_and_pack(step: str, table: Path, images: Path, out: Path, workers: int) -> list[str]:
    options = ["--table", table, "--images", images, "--lang", "en", "--data-dir", out]
    command = [sys.executable, "-m", "captionlib", step, *options, "--workers", workers]
    return [str(each) for each in command]


def write_table(path: Path, names: list[str], split: str = "") -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("filename,caption,split\n")
        for number, name in enumerate(names):
            file.write(f"{name},a picture with the number {number},{split}\n")


BARE = """
import sys
from captionlib.packing import encode_jpeg, shrink
from captionlib.images import check_image, open_image
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    path = f"{sys.argv[1]}/{number}.jpg"
    check_image(path)
    encode_jpeg(shrink(open_image(path), 144), 90)
"""


def workers(folder: Path, arguments) -> dict:
    """Copies of the originals with a number after their end, so that no two files are alike."""
    count = 2000 if arguments.quick else 8000  # shards have 1,000: a whole number for each worker
    images, table, files = folder / "images", folder / "table.csv", originals()
    images.mkdir()
    for number in range(count):
        content = files[number % len(files)].read_bytes() + f"{number:08d}".encode()
        (images / f"{number}.jpg").write_bytes(content)
    write_table(table, [f"{number}.jpg" for number in range(count)], "train")
    trials = iter(range(10**6))

    def both(number: int):
        def steps() -> None:
            out = folder / f"data-{next(trials)}"
            for step in ("check", "build"):
                run(check_and_pack(step, table, images, out, number), folder)

        return steps

    def bare(number: int):
        """The same work in processes that share nothing: what this machine makes of two."""

        def steps() -> None:
            bounds = [str(count * k // number) for k in range(number + 1)]
            pairs = zip(bounds[:-1], bounds[1:], strict=True)
            command = [sys.executable, "-c", BARE, str(images)]
            running = [subprocess.Popen([*command, *pair]) for pair in pairs]
            if any(process.wait() for process in running):
                raise Skip("the bare processes failed")

        return steps

    cases = {f"{n}_workers": both(n) for n in (1, 2)}
    cases |= {f"{n}_bare": bare(n) for n in (1, 2)}
    seconds = interleaved(cases, 1 if arguments.quick else 2, warm_up=0)
    result = {
        "two_workers_vs_one": ratio(seconds["1_workers"], seconds["2_workers"]),
        "two_bare_processes_vs_one": ratio(seconds["1_bare"], seconds["2_bare"]),
        **{
            f"{name}_images_per_s": round(count / median(each), 1) for name, each in seconds.items()
        },
    }
    show(f"Check + pack of {count} photographs, whole commands", **result)
    return result


def memory(folder: Path, arguments) -> dict:
    """The most memory of all processes together, every half second, at n and at 10 n rows."""
    small, files = (10_000, 2_000) if arguments.quick else (100_000, 20_000)
    images, deadline = folder / "images", time.monotonic() + SECONDS_ALLOWED
    names = draw_and_link(images, files, small * 10)
    peaks, seconds = {}, {}
    for count in (small, small * 10):
        table, start = folder / f"{count}.csv", time.monotonic()
        write_table(table, names[:count])
        peaks[count] = [0, 0]
        for step in ("check", "build"):
            command = check_and_pack(step, table, images, folder / f"data-{count}", 2)
            peak = peak_memory(command, folder, deadline)
            peaks[count] = [max(pair) for pair in zip(peaks[count], peak, strict=True)]
        seconds[count] = time.monotonic() - start
    first, last = peaks[small], peaks[small * 10]
    result = {
        "rss_growth": last[0] / first[0],
        "memory_pss_ratio": last[1] / first[1] if first[1] else None,
        **{f"rss_mb_{count}_rows": round(each[0] / 1e6) for count, each in peaks.items()},
        **{f"pss_mb_{count}_rows": round(each[1] / 1e6) for count, each in peaks.items()},
        **{f"seconds_{count}_rows": round(each) for count, each in seconds.items()},
    }
    show(f"Memory of check + pack, {small} and {small * 10} rows, {files} files", **result)
    return result


def draw_and_link(images: Path, files: int, links: int) -> list[str]:
    """Small JPEGs of noise in big blocks, and hard links to them, a thousand a folder."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    names = [f"{number // 1000:05d}/{number % 1000:05d}.jpg" for number in range(links)]
    for number, name in enumerate(names):
        path = images / name
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        if number < files:
            blocks = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            blocks.resize((64, 64), Image.Resampling.NEAREST).save(path, quality=90)
        else:
            os.link(images / names[number % files], path)
    return names


def peak_memory(command: list[str], folder: Path, deadline: float) -> tuple[int, int]:
    """The most bytes of the command and its children: RSS, which counts shared pages once a
    process, and PSS, which does not (0 where the system has none)."""
    import psutil

    peak = (0, 0)
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        while process.poll() is None:
            now, tree = (0, 0), psutil.Process(process.pid)
            try:
                tree = [tree, *tree.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            for each in tree:
                try:
                    info = each.memory_full_info()
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                now = now[0] + info.rss, now[1] + getattr(info, "pss", 0)
            peak = max(peak[0], now[0]), max(peak[1], now[1])
            if time.monotonic() > deadline:
                for each in reversed(tree):
                    each.kill()
                process.wait()
                raise Skip(f"not finished after {SECONDS_ALLOWED // 60} minutes")
            time.sleep(0.5)
        if process.wait():
            output.seek(0)
            raise Skip(f"a command ended with {process.returncode}: {output.read()[-300:]}")
    return peak


ROWS = {"loading": loading, "download": download, "workers": workers, "memory": memory}


if __name__ == "__main__":
    main()
