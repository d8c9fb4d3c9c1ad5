"""Caches in object storage: copied there and back, and fetched for a command that reads one.

Whatever fsspec has a file system for will do (``s3://``, ``gs://``, ``hf://``). Every file is checked
against the manifest, which is copied last, so that a split without one is not whole; an interrupted copy
resumes. (fsspec's own caches of files know no checksums and keep half of a file whose copy was stopped.)
"""

import fcntl
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from analysis.runs.files import hash_file
from analysis.terminal import progress
from sekd_fairseq.errors import CacheError, UserError
from sekd_fairseq.teacher_cache.format import MANIFEST, Manifest, parts_of
from sekd_fairseq.teacher_cache.reader import TeacherCache
from sekd_fairseq.teacher_cache.tail import TAIL

#: Beside an unfinished copy: the SHA-256 of the manifest that it is of.
UPLOADING = "uploading"


def is_address(place: str | Path) -> bool:
    """Whether a place is an address (``s3://...``) and not a path."""
    return "://" in str(place)


def split_folder(root: str, split: str) -> Path:
    """The folder of one split of a cache: of an address, its copy on this machine (:func:`fetched`)."""
    return fetched(f"{root.rstrip('/')}/{split}") if is_address(root) else Path(root) / split


def fetched(url: str) -> Path:
    """The copy on this machine of one split's cache at an address.

    It lies in ``$XDG_CACHE_HOME/sekd_fairseq`` (by default in ``~/.cache``) under the hash of its
    manifest, so a cache that is built anew at the same address is fetched anew. Of several processes
    one fetches, the others wait.

    Raises
    ------
    CacheError, UserError
        As :func:`fetch`.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sekd_fairseq"
    content = manifest_bytes(url)
    digest = hashlib.sha256(content).hexdigest()
    home.mkdir(parents=True, exist_ok=True)
    directory = home / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{digest[:16]}"
    with open(f"{directory}.lock", "w") as lock:
        with suppress(OSError):  # some file systems have no locks; then every process fetches
            fcntl.flock(lock, fcntl.LOCK_EX)
        receive(url, directory, content)
    return directory


def remote_manifest(url: str) -> Manifest:
    """The manifest of one split's cache at an address."""
    return manifest_of(manifest_bytes(url), url)


def manifest_bytes(url: str) -> bytes:
    """The manifest's file of one split's cache at an address."""
    with storage(url) as (system, root):
        content: bytes = system.cat_file(f"{root}/{MANIFEST}")
    return content


def publish(directory: Path, url: str) -> int:
    """Copy one split's cache to an address; returns the bytes that were sent.

    Files that a stopped copy of this cache left there are kept, those of another's are not.

    Raises
    ------
    CacheError
        It is not whole, or another cache is at the address.
    UserError
        The address cannot be written to.
    """
    manifest = TeacherCache.open(directory).manifest
    content = (directory / MANIFEST).read_bytes()
    files = files_of(manifest, directory)
    sent = 0
    with storage(url) as (system, root):
        complete = system.exists(f"{root}/{MANIFEST}")
        if complete and system.cat_file(f"{root}/{MANIFEST}") != content:
            raise CacheError(f"{url}: holds another cache; delete it or name another address")
        system.makedirs(root, exist_ok=True)
        if not complete:
            _begin_upload(system, root, [name for name, _ in files], content)
        for name, digest in progress(files, desc=f"to {url}", unit="file"):
            path = directory / name
            size = path.stat().st_size
            if system.exists(f"{root}/{name}") and system.size(f"{root}/{name}") == size:
                continue
            if digest is not None and hash_file(path) != digest:
                raise CacheError(
                    f"{path}: does not match its checksum; restore it, or delete it and {MANIFEST} and run its "
                    "build_cache command again"
                )
            system.put_file(str(path), f"{root}/{name}")
            sent += size
        if not complete:
            system.pipe_file(f"{root}/{MANIFEST}", content)
            sent += len(content)
        if system.exists(f"{root}/{UPLOADING}"):
            system.rm_file(f"{root}/{UPLOADING}")
    return sent


def _begin_upload(system: Any, root: str, names: Sequence[str], content: bytes) -> None:
    """Say what is being copied; where that is not what was copied before, delete what is in its place,
    because files of two caches may be of one size."""
    digest = hashlib.sha256(content).hexdigest().encode()
    place = f"{root}/{UPLOADING}"
    if system.exists(place) and system.cat_file(place) == digest:
        return
    for name in {*names, TAIL}:  # not every cache has a tail law
        if system.exists(f"{root}/{name}"):
            system.rm_file(f"{root}/{name}")
    system.pipe_file(place, digest)


def fetch(url: str, directory: Path) -> int:
    """Copy one split's cache from an address; returns the bytes that were received.

    Raises
    ------
    CacheError
        There is none, a file is missing or damaged, or another cache is in the directory.
    UserError
        The address cannot be read.
    """
    return receive(url, directory, manifest_bytes(url))


def receive(url: str, directory: Path, content: bytes) -> int:
    """Copy the files that a manifest, ``content``, names, and it last; as :func:`fetch`."""
    received = 0
    if (directory / MANIFEST).exists():
        if (directory / MANIFEST).read_bytes() != content:
            raise CacheError(f"{directory}: holds another cache; delete it or name another")
        with suppress(CacheError):
            TeacherCache.open(directory)
            return 0
    with storage(url) as (system, root):
        directory.mkdir(parents=True, exist_ok=True)
        manifest = manifest_of(content, url)
        wanted = files_of(manifest)
        if system.exists(f"{root}/{TAIL}"):
            wanted.append((TAIL, None))
        for name, digest in progress(wanted, desc=f"from {url}", unit="file"):
            path = directory / name
            if digest is not None and path.exists() and hash_file(path) == digest:
                continue
            with arriving(path) as temporary:
                try:
                    system.get_file(f"{root}/{name}", str(temporary))
                except FileNotFoundError as error:
                    raise CacheError(
                        f"{url}/{name}: expected a file of the cache, found none; copy the cache there again "
                        "from where it was built"
                    ) from error
                if digest is not None and hash_file(temporary) != digest:
                    raise CacheError(
                        f"{url}/{name}: does not match its checksum; delete that file and copy the cache there "
                        "again from where it was built"
                    )
                received += temporary.stat().st_size
        with arriving(directory / MANIFEST) as temporary:
            temporary.write_bytes(content)
    TeacherCache.open(directory)
    return received + len(content)


def files_of(manifest: Manifest, directory: Path | None = None) -> list[tuple[str, str | None]]:
    """The files of a cache beside its manifest, with their SHA-256 where that is in it (a tail law has
    its own)."""
    found: list[tuple[str, str | None]] = [(shard.file, shard.sha256) for shard in manifest.shards]
    if directory is not None and (directory / TAIL).exists():
        found.append((TAIL, None))
    for name, _ in found:
        if Path(name).name != name:
            raise CacheError(f"{MANIFEST}: names a file elsewhere: {name}")
    return found


def remote_splits(url: str) -> list[tuple[str, str]]:
    """The address of each split of a cache, and its name (of one split's own address, empty)."""
    with storage(url) as (system, root):
        if system.exists(f"{root}/{MANIFEST}"):
            return [(url, "")]
        names = sorted(Path(path).name for path in system.ls(root, detail=False))
        splits = [name for name in names if system.exists(f"{root}/{name}/{MANIFEST}")]
    if not splits:
        raise CacheError(
            f"{url}: expected a teacher cache ({MANIFEST}), found none; copy one there"
        )
    return [(f"{url.rstrip('/')}/{name}", name) for name in splits]


@contextmanager
def storage(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address and its path there; what goes wrong there is one line."""
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"{url}: expected fsspec, found none ({error}); pip install fsspec"
        ) from error
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{url}: expected an address that fsspec can open, found {reason}"
        ) from error
    system.invalidate_cache()  # others may have written since
    try:
        yield system, str(root).rstrip("/")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise CacheError(
            f"{url}: expected a teacher cache, found none whole ({error}); copy it there from where it was "
            f"built with: python -m sekd_fairseq.copy_cache CACHE {url}"
        ) from error
    except Exception as error:  # every file system has errors of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{url}: cannot be read or written ({reason}); what was copied is kept, run the command again"
        ) from error


@contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """A temporary file that becomes ``path`` once it is whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def manifest_of(content: bytes, url: str) -> Manifest:
    """The manifest of an address, as checked as a local one."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(content)
        try:
            return Manifest.load(Path(folder))
        except CacheError as error:
            raise CacheError(str(error).replace(folder, url)) from error


def manifests_of(root: str, split: str) -> list[Manifest]:
    """Of the caches of every part (``train``, ``train1``, ...) of a split."""
    if is_address(root):
        places = {name: place for place, name in remote_splits(root)}
        known = itertools.takewhile(places.__contains__, parts_of(split))
        return [remote_manifest(places[name]) for name in known]
    folders = (Path(root) / name for name in parts_of(split))
    whole = itertools.takewhile(lambda folder: (folder / MANIFEST).is_file(), folders)
    return [Manifest.load(folder) for folder in whole]


def split_directories(place: str | Path) -> list[Path]:
    """The split folders of a cache, or the folder itself if it is one; of an address, their copies on
    this machine."""
    if is_address(place):
        return [fetched(split) for split, _ in remote_splits(str(place))]
    cache = Path(place)
    if not cache.is_dir():
        raise CacheError(f"{cache}: expected a teacher cache directory, found none")
    if (cache / MANIFEST).exists():
        return [cache]
    splits = sorted(path for path in cache.iterdir() if path.is_dir())
    if not splits:
        raise CacheError(
            f"{cache}: expected a folder with {MANIFEST} for each split, found none; build it "
            "with: python -m sekd_fairseq.build_cache DATA --path TEACHER --output CACHE"
        )
    return splits
