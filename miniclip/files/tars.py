"""Read the files of a tar, up to the first damage. Damaged headers never make a read endless."""

import tarfile
from collections.abc import Iterator
from os import PathLike, fspath
from typing import BinaryIO, NamedTuple

from miniclip.errors import listed
from miniclip.files.pictures import is_picture
from miniclip.files.reading import open_regular


class Member(NamedTuple):
    """A file in an uncompressed tar. It can be read without the rest of the tar."""

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """Read the bytes of the file. Raises OSError."""
        with open_regular(self.archive) as file:
            file.seek(self.offset)
            return file.read(self.size)


def members(archive: str | PathLike[str], damage: list[str]) -> Iterator[Member]:
    """Yield the files of a tar up to its first damage. Add a line about the damage to `damage`.

    Links are left out. If images are links, a line in `damage` names them.
    """
    name, last = fspath(archive), -1
    links: list[str] = []
    try:
        with open_regular(archive) as file:
            bounded = _Bounded(file)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:  # type: ignore[call-overload]
                for info in tar:
                    tar.members.clear()  # without this, all headers would stay in memory
                    if info.size < 0 or info.offset <= last:
                        raise ValueError(f"the header of {info.name!r:.200} points backwards")
                    last = info.offset
                    if not info.isfile():
                        is_link = info.islnk() or info.issym()
                        links += [info.name] * (is_link and is_picture(info.name))
                        continue
                    if info.issparse() or info.offset_data + info.size > bounded.size:
                        kind = (
                            "is sparse" if info.issparse() else f"should have {info.size:,} bytes"
                        )
                        raise ValueError(f"{info.name!r:.200} {kind}")
                    yield Member(name, info.name, info.offset_data, info.size)
                file.seek(tar.offset)
                # At a damaged header, tarfile stops without an error.
                if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise ValueError(f"the header at byte {tar.offset:,} is damaged")
            if links:
                note = f"{name}: links are not read: {listed(links)}. Unpack the tar first"
                damage += [note] * (note not in damage)
    # tarfile raises many kinds of errors for a damaged header.
    except (OSError, tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError,
            RecursionError) as error:  # fmt: skip
        note = f"{name}: the tar cannot be read to its end: {str(error)[:300]}"
        damage += [note] * (note not in damage)  # only once: each epoch reads the tar again


class _Bounded:
    """An open tar. `read` raises ValueError if a damaged header asks for bytes beyond the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.size = file.seek(0, 2)
        self.seek(0)
        self.ended = False

    def read(self, count: int) -> bytes:
        if not 0 <= count <= max(self.size - self.tell(), 512) or self.ended:
            raise ValueError(f"a header asks for {count:,} bytes")
        data = self.file.read(count)
        # After an empty read, tarfile reads again only if the tar is damaged.
        self.ended = count > 0 and not data
        return data
