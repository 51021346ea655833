"""A bucket for tests."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Object storage in memory, reached as s3://."""

    protocol = "s3"
    store = {}  # noqa: RUF012 (fsspec's interface)
    pseudo_dirs = [""]  # noqa: RUF012
    fails = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3:/").removeprefix("s3://"))

    def _open(self, path, mode="rb", **kwargs):
        if self.fails:
            raise OSError("the network is away")
        return super()._open(path, mode, **kwargs)


def register() -> None:
    """From here on s3:// is this."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
