"""`blackmamba data prepare` on real text: its speed, its memory, and that a kill changes nothing.

Gathers sources and documentation of installed packages as JSON Lines (plain, gz and zst in turn),
prepares them in one go, prepares them again with a SIGKILL to the whole group on the way, and
compares every file of the two.

    python benchmarks/data_prepare.py --work /tmp/bench --mb 1000
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOTS = ("/usr/share/doc", "/usr/share/man", "/usr/lib/python3", "/usr/include")
_FILE_MB = 64
_CLI = "from blackmamba.cli.main import entry_point; entry_point()"


def documents(roots: Sequence[Path]) -> Iterator[str]:
    """Each different text file of 200 bytes to 2 MB, in the order of its name."""
    seen: set[bytes] = set()
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            content = path.read_bytes()
            if path.suffix == ".gz":
                with contextlib.suppress(OSError, EOFError, zlib.error):  # named so, but is not
                    content = gzip.decompress(content)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if not 200 <= len(content) <= 2e6 or b"\0" in content or digest in seen:
                continue
            seen.add(digest)
            try:
                yield content.decode()
            except UnicodeDecodeError:
                continue


def gather(folder: Path, roots: Sequence[Path], n_bytes: float) -> int:
    """Write at least so many bytes of text as JSON Lines; how many they are."""
    folder.mkdir(parents=True)
    total, number, texts = 0, 0, documents(roots)
    text = next(texts, None)
    while text is not None and total < n_bytes:
        with _opened(folder / f"text-{number:03}.jsonl", number) as file:
            end = min(total + _FILE_MB * 1e6, n_bytes)
            while text is not None and total < end:
                file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
                total += len(text.encode())
                text = next(texts, None)
        number += 1
    return total


def _opened(path: Path, number: int) -> IO[bytes]:
    if number % 3 == 1:
        return gzip.open(f"{path}.gz", "wb", 1)  # pyright: ignore
    if number % 3 == 2:
        import zstandard

        return zstandard.open(f"{path}.zst", "wb")  # pyright: ignore
    return path.open("wb")


def prepare(text: Path, out: Path, workers: int, kill_after: int = 0) -> tuple[float, float, str]:
    """One command; with `kill_after`, it is killed when that many shards are there.

    Returns:
        Seconds, most memory of all its processes together (PSS, bytes), and what it printed.
    """
    command = [sys.executable, "-c", _CLI, "data", "prepare", "--text", str(text), "--out"]
    command += [str(out), "--workers", str(workers), "--vocab-size", "16384"]
    command += ["--sample-mb", "32", "--shard-mb", "64"]
    began, most = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None:
        most = max(most, memory(process.pid))
        if kill_after and len(list(out.glob("train-*.bin"))) >= kill_after:
            time.sleep(3)  # somewhere inside of the next shard
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.5)
    printed = process.communicate()[0]
    assert process.returncode in (0, -signal.SIGKILL), process.returncode
    return time.monotonic() - began, most, printed


def memory(group: int) -> float:
    """Bytes that the processes of a group hold together; shared pages count once."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(x.split()[1]) for x in lines if x.startswith("Pss:"))
        except (OSError, ProcessLookupError):
            continue
    return total


def digest(folder: Path) -> str:
    """SHA-256 of all files and their names."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."):
        whole.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return whole.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather, prepare twice, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for texts and results")
    parser.add_argument("--mb", type=float, default=1000, help="of text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--also", type=Path, action="append", default=[], help="more to gather")
    args = parser.parse_args(arguments)
    text = args.work / "text"
    if not text.exists():
        roots = [Path(sysconfig.get_path("purelib")), *map(Path, ROOTS), *args.also]
        print(f"gathered {gather(text, roots, args.mb * 1e6) / 1e6:,.1f} MB of text", flush=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start", flush=True)
    rows: list[tuple[str, float, float, str]] = []
    digests: list[str] = []
    for name, kills in (("in one go", (0,)), ("killed once, then resumed", (4, 0))):
        out = args.work / name.split()[0]
        shutil.rmtree(out, ignore_errors=True)
        for kill_after in kills:
            seconds, most, printed = prepare(text, out, args.workers, kill_after)
            rows.append((f"{name}{' (killed)' * bool(kill_after)}", seconds, most, printed))
            print(rows[-1], flush=True)
        digests.append(digest(out))
    print("| | seconds, all | most memory, all processes | encoding |\n|---|---|---|---|")
    for name, seconds, most, printed in rows:
        print(f"| {name} | {seconds:.0f} | {most / 1e6:.0f} MB | {printed.partition(chr(10))[0]} |")
    print(f"SHA-256 of all files, in one go:   {digests[0]}")
    print(f"SHA-256 of all files, resumed:     {digests[1]}")
    if digests[0] != digests[1]:
        raise SystemExit("the two differ")


if __name__ == "__main__":
    main()
