"""What an export has set out to write, and what of it is finished, so that another can go on.

Two files. The journal names the variants under work, and is whole from its first moment: what it
names is ours to move and remove. The list of finished steps grows by a line a step, which is
appended once the bytes that it speaks of are on the disk. It has their checksums, and one of its
own: a disk that lost bytes, or a file that was changed since, costs a fresh start and never a
wrong weight.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from export.linking import sync_directory
from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import MANIFEST, is_confined
from lowmem.errors import BundleError

Checksums = Mapping[str, int]
"""Tensor to the CRC-32 of its bytes."""
Finished = dict[str, dict[str, Checksums]]
"""Step to file to what the step wrote into the file."""

_FORMAT = 2


class Journal:
    """The journal in a directory, which need not have one yet.

    Attributes:
        path: The file that names the variants.
        steps_path: The list of finished steps.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "journal.json"
        self.steps_path = directory / "finished"

    def create(self, variants: Iterable[str], work: str) -> None:
        """Writes a journal without finished steps.

        Args:
            variants: Those under work.
            work: Digest of all that decides their bytes.

        Raises:
            OSError: The directory cannot be written.
        """
        value = {"format": _FORMAT, "variants": sorted(variants), "work": work}
        with cache.replacing(self.path) as file:
            file.write(strict_json.dumps(value).encode())
        sync_directory(self.path.parent)

    def variants(self) -> list[str]:
        """The variants under work.

        Raises:
            BundleError: The journal is damaged, or names something else than variants.
        """
        variants = strict_json.read_object(self.path).get("variants")
        if not isinstance(variants, list) or not all(map(_is_variant_name, variants)):
            raise BundleError(
                f"variants must be a list of plain names, got {variants!r:.200} ({self.path})"
            )
        return variants

    def finished(self, work: str) -> Finished:
        """The finished steps of the same work, in order; none of other work, or after damage.

        Raises:
            BundleError: The journal is damaged.
        """
        header = strict_json.read_object(self.path)
        if header.get("format") != _FORMAT or header.get("work") != work:
            return {}
        steps: Finished = {}
        for line in self._whole_lines().splitlines():
            checksum, _, text = line.partition(b" ")
            if checksum != _checksum(text):
                return {}
            record = strict_json.loads(text, str(self.steps_path))
            assert isinstance(record, dict)
            steps |= record
        return steps

    def append(self, step: str, files: Mapping[str, Checksums]) -> None:
        """Notes that a step is finished, and everything it wrote on the disk.

        Raises:
            OSError: The disk is full or fails.
        """
        text = strict_json.canonical({step: files})
        with self.steps_path.open("ab", buffering=0) as file:
            file.write(_checksum(text) + b" " + text + b"\n")
            os.fdatasync(file.fileno())

    def drop_torn_line(self) -> None:
        """Cuts off a last line that was not written to its end.

        Raises:
            OSError: The directory cannot be written.
        """
        os.truncate(self.steps_path, len(self._whole_lines()))

    def _whole_lines(self) -> bytes:
        try:
            data = self.steps_path.read_bytes()
        except FileNotFoundError:
            return b""
        return data[: data.rfind(b"\n") + 1]


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _is_variant_name(name: object) -> bool:
    plain = isinstance(name, str) and is_confined(name) and "/" not in name
    return plain and name not in ("reference", "reports", MANIFEST, ".partial")
