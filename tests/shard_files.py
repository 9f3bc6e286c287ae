"""Shards for tests."""

from vqbeam.vqvae.storage.records import open_shard


def write_shard(path, records):
    """Writes a TFRecord file; returns its size in bytes."""
    with open_shard(path) as shard:
        for record in records:
            shard.write(record)
    return path.stat().length if hasattr(path.stat(), "length") else path.stat().st_size
