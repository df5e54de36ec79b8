"""What a source is, by its bytes, and whether it stays so while it is exported."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from export.sources import Source
from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import file_sha256
from lowmem.errors import BundleError
from lowmem.progress import Progress

# A file that was written this short a time ago may be written again at what its disk's clock takes
# for the same time: its hash is not remembered.
_SETTLED_SECONDS = 2


class SourceIdentity:
    """The hashes of a source's files, and their status when they were hashed.

    Attributes:
        sha256: One hash over the sorted names and hashes of the files.
        files: File name to sha256.
    """

    def __init__(self, source: Source, progress: Progress) -> None:
        """Hashes the files, but for those whose hashes this user's cache knows.

        Raises:
            BundleError: A file cannot be read.
        """
        self._statuses: dict[Path, os.stat_result] = {}
        self.files: dict[str, str] = {}
        paths = source.files()
        for done, path in enumerate(paths):
            progress("hashing the source", done, len(paths))
            try:
                self._statuses[path] = path.stat()
                self.files[path.name] = cache.verified_sha256(path) or self._hash(path)
            except OSError as error:
                raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        self.sha256 = hashlib.sha256(strict_json.canonical(sorted(self.files.items()))).hexdigest()

    def check(self) -> None:
        """Checks that no file has changed since it was hashed.

        Raises:
            BundleError: One has; it is named.
        """
        for path, before in self._statuses.items():
            try:
                unchanged = cache.identity(path.stat()) == cache.identity(before)
            except OSError:
                unchanged = False
            if not unchanged:
                raise changed(path)

    def _hash(self, path: Path) -> str:
        sha256, before = file_sha256(path), self._statuses[path]
        if time.time() - before.st_mtime > _SETTLED_SECONDS:
            cache.remember_sha256(path, sha256, before=before)
        return sha256


def changed(path: Path) -> BundleError:
    """The error for a file of the source that is not what it was when it was hashed."""
    return BundleError(f"{path} changed during the export: repeat it once the file stays as it is")
