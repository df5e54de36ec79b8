"""The directory that an export works in, and how its result becomes visible.

Everything is written to ``BUNDLE/.partial/``; a variant's directory is moved into place only when
it is complete, and ``lowmem.json`` is replaced last. So a killed export leaves a bundle that is as
it was, or none at all. The journal names the variants under work: the next export removes those
of them that no manifest names, puts back those that were being replaced, and touches nothing else.
It is locked while its export lives, and is the last that goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import MANIFEST, Bundle, Manifest, is_confined, parse_manifest
from lowmem.errors import BundleError, CapacityError, InputError, LowmemError

PARTIAL = ".partial"
_JOURNAL = "journal.json"
_FICLONE = 0x40049409
_SPARE_BYTES = 64 * 2**20


class Workspace:
    """One export's hold on a bundle directory.

    Attributes:
        bundle: The bundle's directory.
        partial: Where this export writes.
    """

    def __init__(self, bundle: Path) -> None:
        """Takes hold of a directory, and clears what a killed export left in it.

        Raises:
            BundleError: The manifest or the journal is damaged.
            InputError: The directory holds something else than a bundle, or cannot be written; or
                another export is writing to it.
        """
        self.bundle = bundle
        self.partial = bundle / PARTIAL
        self._journal = self.partial / _JOURNAL
        self._lock: BinaryIO | None = None
        if bundle.exists() and not bundle.is_dir():
            raise InputError(f"a bundle is a directory, got the file {bundle}")
        if bundle.is_dir() and not self._is_ours():
            raise InputError(f"{bundle} is not empty and is no bundle: choose another directory")
        try:
            self._clear()
        except OSError as error:
            raise InputError(f"{bundle} cannot be written: {error.strerror}") from error

    def manifest(self) -> Manifest | None:
        """The manifest that stands in the directory, or None.

        Raises:
            BundleError: It is damaged.
        """
        path = self.bundle / MANIFEST
        if not path.exists():
            return None
        return parse_manifest(strict_json.read_object(path), str(path))

    def begin(self, variants: Iterable[str], needed_bytes: int) -> None:
        """Starts a journal.

        Args:
            variants: Those that will be written.
            needed_bytes: What all files together will take on the disk.

        Raises:
            CapacityError: The disk has not enough room.
            InputError: The directory cannot be written, another export is writing to it, or it
                holds something under the name of a variant that is not in the manifest.
        """
        variants = sorted(variants)
        manifest = self.manifest()
        for variant in variants:
            known = manifest is not None and variant in manifest.variants
            if os.path.lexists(self.bundle / variant) and not known:
                raise InputError(
                    f"{self.bundle / variant} is there and is no variant of the bundle: move it "
                    "to another place"
                )
        try:
            self.bundle.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.bundle).free
            if free < needed_bytes + _SPARE_BYTES:
                raise CapacityError(
                    f"the export needs {needed_bytes + _SPARE_BYTES} bytes of disk, {free} are "
                    f"free ({self.bundle})"
                )
            self.partial.mkdir()
            with cache.replacing(self._journal) as file:
                file.write(strict_json.dumps({"format": 1, "variants": variants}).encode())
            self._lock = self._journal.open("rb")
        except FileExistsError as error:
            raise InputError(_busy(self.bundle)) from error
        except OSError as error:
            raise InputError(f"{self.bundle} cannot be written: {error.strerror}") from error
        _try_to_lock(self._lock)

    def publish(self, variants: Sequence[str], manifest: Manifest) -> None:
        """Moves finished variants into place, then replaces the manifest, then cleans up."""
        for variant in variants:
            sync_tree(self.partial / variant)
            target = self.bundle / variant
            if target.exists():
                target.rename(self.partial / f"replaced-{variant}")
            (self.partial / variant).rename(target)
        _sync_directory(self.bundle)
        with cache.replacing(self.bundle / MANIFEST) as file:
            file.write(strict_json.dumps(manifest.to_json()).encode())
        _sync_directory(self.bundle)
        self._release()
        self._clear()

    def abandon(self) -> None:
        """Takes back what this export has done so far, after an error."""
        self._release()
        # What cannot be taken back now is left to the next export.
        with contextlib.suppress(OSError, LowmemError):
            self._clear()

    def _is_ours(self) -> bool:
        """Whether a directory is empty or a bundle, if only one that an export has just begun."""
        there = set(os.listdir(self.bundle))
        if not there or MANIFEST in there or self._journal.exists():
            return True
        if there != {PARTIAL} or self.partial.is_symlink() or not self.partial.is_dir():
            return False
        return all(name.startswith(".lowmem-") for name in os.listdir(self.partial))

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _clear(self) -> None:
        if self.partial.is_symlink():
            raise InputError(f"{self.partial} must be a directory, got a link: remove it")
        if not self.partial.exists():
            return
        if self._journal.exists():
            with self._journal.open("rb") as journal:
                if not _try_to_lock(journal):
                    raise InputError(_busy(self.bundle))
                self._take_back()
        for path in self.partial.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self._journal:
                path.unlink()
        self._journal.unlink(missing_ok=True)
        self.partial.rmdir()

    def _take_back(self) -> None:
        """Removes variants that are not in the manifest, and puts back replaced ones that are."""
        manifest = self.manifest()
        named = manifest.variants if manifest is not None else {}
        variants = strict_json.read_object(self._journal).get("variants")
        if not isinstance(variants, list) or not all(map(_is_variant_name, variants)):
            raise BundleError(
                f"variants must be a list of plain names, got {variants!r:.200} ({self._journal})"
            )
        for variant in variants:
            target, replaced = self.bundle / variant, self.partial / f"replaced-{variant}"
            if variant not in named:
                shutil.rmtree(target, ignore_errors=True)
            elif replaced.exists() and not self._is_intact(variant):
                # Killed between the moves and the new manifest: the old variant goes back.
                shutil.rmtree(target, ignore_errors=True)
                replaced.rename(target)

    def _is_intact(self, variant: str) -> bool:
        try:
            Bundle(self.bundle).check(variant)
        except BundleError:
            return False
        return True


def _busy(bundle: Path) -> str:
    return f"another export is writing to {bundle}: let it finish"


def _is_variant_name(name: object) -> bool:
    plain = isinstance(name, str) and is_confined(name) and "/" not in name
    return plain and name not in ("reference", "reports")


def _try_to_lock(file: BinaryIO) -> bool:
    """Locks a file for as long as it is open; True also where its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def link_or_copy(source: Path, target: Path, *, copy: bool) -> None:
    """Gives a file a second place: by reflink, else by hard link, else by copy.

    Args:
        source: The file; of a link, what it points to.
        target: The new name; must not exist.
        copy: Whether to always write the bytes again.

    Raises:
        CapacityError: The disk is full.
    """
    source = source.resolve()
    if not copy and (_reflink(source, target) or _hard_link(source, target)):
        return
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk is full: {target} could not be copied") from error
        raise


def links(source: Path, directory: Path) -> bool:
    """Whether a file can be given a second place in a directory without writing its bytes."""
    return source.resolve().stat().st_dev == directory.stat().st_dev


def sync_tree(directory: Path) -> None:
    """Brings every file of a directory, and the directories themselves, to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as read, target.open("xb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
