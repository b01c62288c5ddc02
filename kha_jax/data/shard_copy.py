"""A checked copy of shards that lie in a bucket, on this machine."""

from pathlib import Path

from kha_jax.data import tokenizers
from kha_jax.data.shard_files import META, SPLITS, Meta, read_meta, verify
from kha_jax.errors import DataError, StorageError
from kha_jax.storage import Objects, being_built

LARGEST = 10**10  # bytes of ids


def copied(url: str, base: Path, meta: Meta) -> Path:
    """The folder below `base` that holds a copy of the shards below a URL, which is made where it
    is not there: whole, and compared with every sha256.

    Raises:
        DataError: there is too much for a copy, or a shard is not what meta.json says.
        StorageError: the store does not answer, or the copy cannot be written.
    """
    size = sum(meta.total(split, "tokens") for split in SPLITS) * meta.dtype.itemsize
    if size >= LARGEST:
        raise DataError(
            f"{url} holds {size:,} bytes, too many for a copy in config.data.cache_dir; leave that "
            "out, and they are read by ranges"
        )
    folder = base / "-".join(meta.fingerprint(split)[:16] for split in SPLITS)
    if (folder / META).exists() and read_meta(folder).shards == meta.shards:
        return folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        with being_built(base, folder.name) as temporary:
            _copy(Objects(url), temporary, meta)
            verify(temporary, meta, documents=False)
            if not (folder / META).exists():  # another process may have been faster
                temporary.rename(folder)
    except OSError as error:
        raise StorageError(f"{base} cannot be written: {error.strerror or error}") from None
    return folder


def _copy(objects: Objects, folder: Path, meta: Meta) -> None:
    names = [shard.name for split in SPLITS for shard in meta.shards[split]]
    files = [f"{name}{suffix}" for name in names for suffix in (".bin", ".crc")]
    here = tokenizers.FILE in objects.listing()
    for name in [*files, *([tokenizers.FILE] if here else []), META]:
        objects.copy(name, folder / name)
