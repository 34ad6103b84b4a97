"""Text to train on where there is no network but a package registry's: a folder of JSON Lines.

Prose, documentation and sources that Debian and Python packages bring along, each different
document once, as `{"text": ...}`. What a page repeats from other pages (menus, footers) is left
out. The text belongs to the packages' authors: make it anew rather than pass it on.

    mkdir debs && (cd debs && apt-get download anarchism dict-gcide linux-doc-6.1 ...)
    python benchmarks/gather_text.py --debs debs --python SITE_PACKAGES --out text --mb 160

docs/paper.md names the packages that its numbers were made with, of Debian 12.
"""

import argparse
import collections
import contextlib
import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

SHARES = {"prose": 0.5, "documentation": 0.3, "source": 0.2}
"""Of the whole; a kind that has less gives all of it."""
PROSE = ("anarchism", "crawl", "dict-", "fortunes", "jargon", "miscfiles", "wesnoth", "wordnet")
_SOURCE = {".py", ".c", ".h", ".el", ".rs", ".vim", ".pl"}
_TEXT = {".txt", ".rst", ".md", ".html", ".htm", ".page", ".pod", ".adoc", ".cfg", ".des", ".dz",
         ".noun", ".verb", ".adj", ".adv", ".xhp", ".texi", ""}  # fmt: skip
_MAX_BYTES, _MIN_BYTES, _OFTEN = 60e6, 400, 6
_OTHER_LANGUAGES = re.compile(r"/(translations|po|(?!en)[a-z]{2}-[A-Z]{2}|ar|ca|cs|da|de|el|es|eu|"
                              r"fa|fi|fr|gl|hr|hu|id|it|ja|ko|lt|nb|nl|pl|pt|ro|ru|sl|sr|sv|te|tr|uk|vi|"
                              r"zh)(/|\b)")  # fmt: skip
_BLOCK = re.compile(r"</?(p|div|li|ul|ol|h[1-6]|tr|table|pre|br|dt|dd|section|title)\b[^>]*>", re.I)
_DROP = re.compile(r"<(script|style|head|nav|footer|form)\b.*?</\1>|<!--.*?-->", re.I | re.S)
_GLOSS = re.compile(r"^\d{8} \d\d [nvasr] [0-9a-f]{2} (.*?) \d{3} .*?\| (.*)$")
_TRANSLATED = re.compile(r'_\s*"((?:[^"]|"")*)"')


def documents(root: Path, often: "collections.Counter[int]") -> Iterator[tuple[str, str]]:
    """Kind and text of each file below `root` that has words in it, in the order of the names."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        suffix = path.suffix if path.suffix != ".gz" else Path(path.stem).suffix
        is_manual = re.search(r"/man[1-9]/", name) is not None
        if path.is_symlink() or not path.is_file() or _OTHER_LANGUAGES.search("/" + name):
            continue
        if not (is_manual or suffix in _SOURCE or suffix in _TEXT):
            continue
        content = path.read_bytes()
        if path.suffix in (".gz", ".dz"):
            with contextlib.suppress(OSError, EOFError, zlib.error):
                content = gzip.decompress(content)
        if not _MIN_BYTES <= len(content) <= _MAX_BYTES or b"\0" in content:
            continue
        text = content.decode(errors="replace")
        if text.count("\ufffd") > 1e-3 * len(text):
            continue
        if suffix in _SOURCE:
            yield "source", text
            continue
        text = _words(text, suffix, often)
        if len(text) >= _MIN_BYTES and "GNU GENERAL PUBLIC LICENSE" not in text[:2000]:
            yield ("prose" if name.startswith(PROSE) else "documentation"), text


def _words(text: str, suffix: str, often: "collections.Counter[int]") -> str:
    if suffix in (".html", ".htm", ".page", ".xhp"):
        text = _BLOCK.sub("\n", _DROP.sub("", text))
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        kept: list[str] = []
        for line in (line.rstrip() for line in text.split("\n")):
            often[hash(line)] += len(line) > 0
            if often[hash(line)] <= _OFTEN and (line or (kept and kept[-1])):
                kept.append(line)
        return "\n".join(kept)
    if suffix in (".noun", ".verb", ".adj", ".adv"):  # WordNet: words and what they mean
        found = (_GLOSS.match(line) for line in text.split("\n"))
        return "\n".join(f"{_names(m[1])}: {m[2].strip()}" for m in found if m)
    if suffix == ".cfg":  # Wesnoth: what its people say
        found = (m[1].replace('""', '"') for m in _TRANSLATED.finditer(text))
        return "\n".join(line for line in found if line.count(" ") > 3)
    return re.sub(r"\n{3,}", "\n\n", text)


def _names(words: str) -> str:
    return ", ".join(word.replace("_", " ") for word in words.split()[::2])


def gather(roots: Sequence[Path], out: Path, n_bytes: float, seed: int = 0) -> dict[str, int]:
    """Write OUT/KIND.jsonl, shuffled by document; how many bytes of each kind."""
    kinds: dict[str, list[str]] = {kind: [] for kind in SHARES}
    seen: set[bytes] = set()
    often: collections.Counter[int] = collections.Counter()
    for root in roots:
        for kind, text in documents(root, often):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                kinds[kind] += _pieces(text)
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, int] = {}
    for kind, texts in kinds.items():
        random.Random(seed).shuffle(texts)
        total = 0
        with (out / f"{kind}.jsonl").open("w", encoding="utf-8") as file:
            for text in texts:
                if total > SHARES[kind] * n_bytes:
                    break
                total += len(text.encode())
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        written[kind] = total
    return written


def _pieces(text: str, limit: int = 100_000) -> list[str]:
    """A book is many documents."""
    pieces: list[str] = []
    while len(text) > limit:
        ends = (text.rfind(mark, limit // 2, limit) for mark in ("\n\n", "\n", " "))
        cut = next((end for end in ends if end > 0), limit)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--debs", required=True, type=Path, help="folder of downloaded .deb files")
    parser.add_argument("--python", required=True, type=Path, help="folder of Python packages")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--mb", type=float, default=160, help="of text in all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for deb in sorted(args.debs.glob("*.deb")):
            folder = Path(temporary, deb.name.split("_")[0])
            folder.mkdir()
            subprocess.run(["dpkg", "-x", deb, folder], check=True)
        for kind, n in gather([Path(temporary), args.python], args.out, args.mb * 1e6).items():
            print(f"{kind}: {n / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
