"""The emoji of four artists as SVG, from the npm packages of Iconify. They are downloaded once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from emojis.prompts import OBJECTS

FOLDER = Path("build/emojis/art")


class ArtSet(NamedTuple):
    """An npm package that holds the SVG of every emoji of an artist in one JSON file."""

    package: str
    version: str
    sha256: str  # of the package's tarball
    licence: str  # SPDX

    @property
    def url(self) -> str:
        return f"https://registry.npmjs.org/@iconify-json/{self.package}/-/{self.package}-{self.version}.tgz"


SETS = {
    "noto": ArtSet(
        "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0",
    ),
    "blob": ArtSet(
        "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0",
    ),
    "fluent": ArtSet(
        "fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT",
    ),
    "twemoji": ArtSet(
        "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0",
    ),
}  # fmt: skip


class Drawing(NamedTuple):
    """The SVG elements of an emoji, and the width and height of their coordinates."""

    body: str
    width: float
    height: float


@functools.lru_cache
def drawings(style: str, folder: Path = FOLDER) -> dict[str, Drawing]:
    """The drawing of every object in a style. Downloads the set into `folder` if it is not there.

    Raises:
        OSError: the set cannot be downloaded, or its checksum is not the expected one.
    """
    icons = _icons(SETS[style], folder)
    return {name: _drawing(icons, icon) for name, icon in OBJECTS.items()}


def _drawing(icons: dict[str, Any], name: str) -> Drawing:
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"][alias.get("parent", name)]
    return Drawing(icon["body"], icon.get("width", icons["width"]), icon.get("height", icons["height"]))


def _icons(art: ArtSet, folder: Path) -> dict[str, Any]:
    path = folder / f"{art.package}-{art.version}.tgz"
    if not path.exists():
        _download(art, path)
    with tarfile.open(path) as archive:
        file = archive.extractfile("package/icons.json")
        assert file is not None, "every package of Iconify has this file"
        return json.load(file)


def _download(art: ArtSet, path: Path) -> None:
    try:
        with urllib.request.urlopen(art.url, timeout=60) as response:
            content = response.read()
    except urllib.error.URLError as error:
        raise OSError(f"{art.url} cannot be downloaded ({error.reason}): put it into {path.parent}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != art.sha256:
        raise OSError(f"{art.url} has the SHA-256 {found}, expected is {art.sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")  # two runs may download at the same time
    part.write_bytes(content)
    part.replace(path)  # atomic: an interruption leaves no incomplete file
