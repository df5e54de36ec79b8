"""The directory that an export works in, and how its result becomes visible.

Everything is written to ``BUNDLE/.partial/``; a variant's directory is moved into place only when
it is complete, and ``lowmem.json`` is replaced last. So a killed export leaves a bundle that is as
it was, or none at all. The journal names the variants under work: the next export moves those of
them that no manifest names back, and with them those that were being replaced; then it goes on
where the killed one was, or clears ``.partial/`` and begins anew. It touches nothing else. BUNDLE
itself is locked meanwhile, and the journal is the last that goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from export.journal import Checksums, Finished, Journal
from export.linking import sync_directory, sync_tree
from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import MANIFEST, Bundle, Manifest, parse_manifest
from lowmem.disk import DISK_FULL, check_room
from lowmem.errors import BundleError, CapacityError, InputError, LowmemError

PARTIAL = ".partial"
_SPARE_BYTES = 64 * 2**20


class Workspace:
    """One export's hold on a bundle directory; use it as a context manager.

    A block that fails takes back what has been done since ``begin``, and an OSError in it becomes
    the one error of a target that cannot be written.

    Attributes:
        bundle: The bundle's directory.
        partial: Where this export writes.
    """

    def __init__(self, bundle: Path) -> None:
        """Takes hold of a directory, and undoes what a killed export had moved in it.

        Raises:
            BundleError: The manifest or the journal is damaged.
            InputError: The directory holds something else than a bundle, or cannot be written; or
                another export is writing to it.
        """
        self.bundle = bundle
        self.partial = bundle / PARTIAL
        self._journal = Journal(self.partial)
        self._lock: int | None = None
        self._has_begun = False
        if bundle.exists() and not bundle.is_dir():
            raise InputError(f"a bundle is a directory, got the file {bundle}")
        if not bundle.is_dir():
            return
        try:
            self._take_lock()
            if not self._is_ours():
                raise InputError(
                    f"{bundle} is not empty and is no bundle: choose another directory"
                )
            if self.partial.is_symlink():
                raise InputError(f"{self.partial} must be a directory, got a link: remove it")
            self._take_back()
        except OSError as error:
            self._release()
            raise _unwritable(bundle, error) from error
        except BaseException:
            self._release()
            raise

    def manifest(self) -> Manifest | None:
        """The manifest that stands in the directory, or None.

        Raises:
            BundleError: It is damaged.
        """
        path = self.bundle / MANIFEST
        if not path.exists():
            return None
        return parse_manifest(strict_json.read_object(path), str(path))

    def finished(self, work: str) -> Finished:
        """The steps of the same work that a killed export has finished.

        Raises:
            BundleError: The journal is damaged.
        """
        return self._journal.finished(work) if self._journal.path.exists() else {}

    def foresee(self, variant: str, least_bytes: int) -> None:
        """Refuses what ``begin`` would refuse, before anything is measured for a variant's sake.

        Args:
            variant: Its name.
            least_bytes: What its files will take at least.

        Raises:
            CapacityError: The disk has not enough room.
            InputError: Something else lies in its place.
        """
        self._check_names([variant])
        if not self.partial.exists():  # of which some may be kept
            check_room(self.bundle, least_bytes, "the export")

    def _check_names(self, variants: Iterable[str]) -> None:
        """Refuses to put variants where something that is not in the manifest lies."""
        manifest = self.manifest()
        for variant in variants:
            known = manifest is not None and variant in manifest.variants
            if os.path.lexists(self.bundle / variant) and not known:
                raise InputError(
                    f"{self.bundle / variant} is there and is no variant of the bundle: move it "
                    "to another place"
                )

    def begin(
        self, variants: Iterable[str], needed_bytes: int, work: str, keep: Collection[str] = ()
    ) -> None:
        """Starts a journal, or goes on with the one that is there.

        Args:
            variants: Those that will be written.
            needed_bytes: What all files together will take on the disk.
            work: Digest of all that decides the variants' bytes.
            keep: Files of a killed export of the same work, by their paths in ``partial``. All
                else in there goes, and without any the journal too.

        Raises:
            CapacityError: The disk has not enough room.
            InputError: The directory cannot be written, another export is writing to it, or it
                holds something under the name of a variant that is not in the manifest.
        """
        variants = sorted(variants)
        self._check_names(variants)
        kept = {self.partial / path for path in keep}
        try:
            if self._lock is None:
                self.bundle.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                if os.listdir(self.bundle):
                    raise InputError(_busy(self.bundle))
            if not kept:
                self.clear()
            needed = needed_bytes + _SPARE_BYTES - sum(map(_allocated, kept))
            check_room(self.bundle, needed, "the export")
            self._has_begun = True
            if kept:
                _empty(self.partial, {*kept, self._journal.path, self._journal.steps_path})
                self._journal.drop_torn_line()
            else:
                self.partial.mkdir()
                self._journal.create(variants, work)
        except OSError as error:
            raise _unwritable(self.bundle, error) from error

    def record(self, step: str, files: Mapping[str, Checksums]) -> None:
        """Notes a finished step; what it wrote into each file must be on the disk by now."""
        self._journal.append(step, files)

    def publish(self, variants: Sequence[str], manifest: Manifest) -> None:
        """Moves finished variants into place, then replaces the manifest, then cleans up."""
        for variant in variants:
            sync_tree(self.partial / variant)
            target = self.bundle / variant
            if target.exists():
                target.rename(self.partial / f"replaced-{variant}")
            (self.partial / variant).rename(target)
        sync_directory(self.bundle)
        # Made in the workspace, so that a kill leaves no temporary file outside of it.
        with cache.replacing(self.partial / MANIFEST) as file:
            file.write(strict_json.dumps(manifest.to_json()).encode())
        (self.partial / MANIFEST).replace(self.bundle / MANIFEST)
        sync_directory(self.bundle)
        self.clear()

    def clear(self) -> None:
        """Removes ``partial`` with all that is in it, the journal last."""
        if self.partial.exists():
            _empty(self.partial, {self._journal.path})
            self._journal.path.unlink(missing_ok=True)
            self.partial.rmdir()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._has_begun:
            # What cannot be taken back now is left to the next export.
            with contextlib.suppress(OSError, LowmemError):
                self._take_back()
                self.clear()
        self._release()
        if isinstance(error, OSError):
            raise _unwritable(self.bundle, error) from error

    def _is_ours(self) -> bool:
        """Whether a directory is empty or a bundle, if only one that an export has just begun."""
        there = set(os.listdir(self.bundle))
        if not there or MANIFEST in there or self._journal.path.exists():
            return True
        if there != {PARTIAL} or self.partial.is_symlink() or not self.partial.is_dir():
            return False
        return all(name.startswith(".lowmem-") for name in os.listdir(self.partial))

    def _take_lock(self) -> None:
        """Locks the bundle's directory while this is open, if its file system has locks."""
        self._lock = os.open(self.bundle, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(_busy(self.bundle)) from error
        except OSError:
            return

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_back(self) -> None:
        """Moves variants that are not in the manifest back, and replaced ones that are."""
        if not self._journal.path.exists():
            return
        manifest = self.manifest()
        named = manifest.variants if manifest is not None else {}
        for variant in self._journal.variants():
            target, mine = self.bundle / variant, self.partial / variant
            replaced = self.partial / f"replaced-{variant}"
            if variant in named and (not replaced.exists() or self._is_intact(variant)):
                continue
            # Where both are there, the one in place was not moved there by an export.
            if target.exists() and not mine.exists():
                target.rename(mine)
            if replaced.exists():
                replaced.rename(target)

    def _is_intact(self, variant: str) -> bool:
        try:
            Bundle(self.bundle).check(variant)
        except BundleError:
            return False
        return True


def _busy(bundle: Path) -> str:
    return f"another export is writing to {bundle}: let it finish"


def _unwritable(bundle: Path, error: OSError) -> LowmemError:
    if error.errno in DISK_FULL:
        return CapacityError(f"the disk is full: {bundle}")
    return InputError(f"{bundle} cannot be written: {error.strerror}")


def _allocated(path: Path) -> int:
    """Bytes that a file takes on the disk for itself."""
    status = path.stat()
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _empty(directory: Path, keep: Collection[Path]) -> None:
    """Removes all but some files from a directory; links are not followed."""
    for path in directory.iterdir():
        if path in keep:
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif any(path in kept.parents for kept in keep):
            _empty(path, keep)
        else:
            shutil.rmtree(path)
