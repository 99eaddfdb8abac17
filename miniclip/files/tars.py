"""The files of a tar, up to the first damage. A false header is damage and costs no time."""

import tarfile
from collections.abc import Iterator
from os import PathLike, fspath
from typing import BinaryIO, NamedTuple

from miniclip.files.reading import open_regular


class Member(NamedTuple):
    """A file inside a tar, uncompressed: its bytes can be read without the rest."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """Its bytes. Raises OSError."""
        with open_regular(self.archive) as file:
            file.seek(self.offset)
            return file.read(self.size)


def members(archive: str | PathLike[str], damage: list[str]) -> Iterator[Member]:
    """Yield the files of a tar up to its first damage, which is described in `damage`."""
    name, last = fspath(archive), -1
    try:
        with open_regular(archive) as file:
            bounded = _Bounded(file)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:  # type: ignore[call-overload]
                for info in tar:
                    tar.members.clear()  # or each header stays in memory
                    if info.size < 0 or info.offset <= last:
                        raise ValueError(f"the header of {info.name!r:.200} leads backwards")
                    last = info.offset
                    if not info.isfile():
                        continue
                    if info.issparse() or info.offset_data + info.size > bounded.size:
                        kind = "is sparse" if info.issparse() else f"has {info.size:,} bytes"
                        raise ValueError(f"{info.name!r:.200} {kind}, and is not all there")
                    yield Member(name, info.name, info.offset_data, info.size)
    # For a false header tarfile raises many kinds of errors.
    except (OSError, tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError,
            RecursionError) as error:  # fmt: skip
        note = f"{name}: cannot be read as a tar to its end: {str(error)[:300]}"
        damage += [note] * (note not in damage)  # training reads a tar again in each epoch


class _Bounded:
    """A file that raises ValueError when tarfile asks for more bytes than there are.

    tarfile reads as many bytes as a header says, and for some headers it asks until it has enough.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.size = file.seek(0, 2)
        self.seek(0)
        self.ended = False

    def read(self, count: int) -> bytes:
        if not 0 <= count <= max(self.size - self.tell(), 512) or self.ended:
            raise ValueError(f"a header speaks of {count:,} bytes")
        data = self.file.read(count)
        self.ended = count > 0 and not data  # tarfile asks once at the end of a sound tar
        return data
