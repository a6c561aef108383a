"""Checkpoints as PyTorch writes them since 1.6: a zip archive with a pickle and the storages."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from struct import Struct

from ldm.checkpoints.entries import ZIP_PICKLE, Archive, MappedFile, Record
from ldm.checkpoints.pickles.instructions import Machine, cut_off
from ldm.checkpoints.pickles.limits import DIRECTORY, Purse
from ldm.checkpoints.pickles.tree import archive_of, naming
from ldm.errors import CheckpointError, UnreadableError

LOCAL_HEADER = Struct("<4s22xHH")  # its signature, and the lengths of its name and extra field
END = Struct("<4s18x")  # a signature, numbers, and then a comment
END_SIGNATURE, MAX_COMMENT = b"PK\x05\x06", 65535


def read_torch_zip(file: MappedFile) -> Archive:
    """What is in a checkpoint as PyTorch writes it since 1.6: a zip archive with, in one folder,
    the content as a pickle (`data.pkl`), each storage's bytes (`data/<key>`), and notes. Of each
    the archive has a checksum, for whoever reads the tensors (`Entry.records`): to compare it takes
    a look at every byte.

    Raises:
        UnreadableError: this is no such file, or a damaged one.
        TruncatedError: its end is missing.
        UnsafePickleError: it makes its tensors by means that ldm does not know.
    """
    with naming(file):
        directory, end = zip_directory(file)
        folder = torch_folder([info.orig_filename for info in directory])
        records = zip_records(file, directory, end)
        order = records.get(f"{folder}/byteorder")
        if order is not None and file.bytes[order.start : order.start + order.size] != b"little":
            raise UnreadableError("is not little-endian: its record byteorder says so")
        program = records[f"{folder}/data.pkl"]
        machine = Machine(file, program.start, program.start + program.size, Purse())
        content = machine.load()
        found = {}
        for key, storage in machine.calls.storages.items():
            record = records.get(f"{folder}/data/{key}")
            if record is None:
                raise UnreadableError(f"has no record data/{key}, which holds a tensor")
            if record.size < storage.nbytes:
                raise UnreadableError(
                    f"has {record.size} bytes in data/{key}, whose tensors need {storage.nbytes}"
                )
            found[key] = record
        starts = {key: record.start for key, record in found.items()}
        origins = {key: (program, record) for key, record in found.items()}
        return archive_of(content, machine, ZIP_PICKLE, starts, origins)


def zip_directory(file: MappedFile) -> tuple[list[zipfile.ZipInfo], int]:
    """The records that an archive lists at its end, and where the list begins."""
    latest = max(0, len(file) - END.size)
    if file.bytes.rfind(END_SIGNATURE, max(0, latest - MAX_COMMENT), latest + 4) < 0:
        raise cut_off("the list of records at its end is missing", file)
    try:
        with zipfile.ZipFile(Window(file)) as archive:
            return archive.infolist(), archive.start_dir
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise UnreadableError(f"is a damaged zip archive: {error}") from error


class Window:
    """A mapped file as `zipfile` wants it: it seeks, and reads no more than a sane directory."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self.at, len(self.file))[whence]
        if at < 0:
            raise OSError("it refers to bytes before its beginning")
        self.at = at
        return at

    def tell(self) -> int:
        return self.at

    def read(self, length: int = -1) -> bytes:
        start = self.at
        self.at = len(self.file) if length < 0 else min(start + length, len(self.file))
        if self.at - start > DIRECTORY:
            raise UnreadableError(f"is a zip archive that lists more than {DIRECTORY} bytes")
        return self.file.bytes[start : self.at]


def torch_folder(names: Sequence[str]) -> str:
    """The one folder of a checkpoint's archive; torch names it after the file."""
    folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(folders) != 1:
        found = f"{len(folders)} files named data.pkl"
        raise UnreadableError(f"is a zip archive, but none of PyTorch's: it has {found}")
    if f"{folders[0]}/constants.pkl" in names:
        raise UnreadableError("is a TorchScript program: ldm reads weights alone (a `state_dict`)")
    return folders[0]


def zip_records(
    file: MappedFile, directory: Sequence[zipfile.ZipInfo], end: int
) -> dict[str, Record]:
    """Where the records' bytes are, once it is sure that no two share any.

    The directory tells where a record's local header is. Behind that are the name once more, a
    padding of any length (torch aligns its storages by it), and the bytes.
    """
    records: dict[str, Record] = {}
    free = 0  # all before it is taken
    for info in sorted(directory, key=lambda info: info.header_offset):
        name = info.orig_filename
        said = f"is a damaged zip archive: its record {name[:60]!r}"
        if info.flag_bits & 1:
            raise UnreadableError(f"is an encrypted zip archive (its record {name[:60]!r})")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnreadableError(
                f"has its record {name[:60]!r} compressed: tensors must be stored uncompressed, as"
                " torch.save writes them"
            )
        if info.compress_size != info.file_size:
            raise UnreadableError(f"{said} has two sizes")
        at = info.header_offset
        if at < free or at + LOCAL_HEADER.size > end:
            raise UnreadableError(f"{said} begins inside of another, or outside of the file")
        signature, name_length, padding = LOCAL_HEADER.unpack_from(file.bytes, at)
        start = at + LOCAL_HEADER.size + name_length + padding
        free = start + info.file_size
        if signature != b"PK\x03\x04" or free > end:
            raise UnreadableError(f"{said} lies outside of the file, or has no header")
        if name in records:
            raise UnreadableError(f"{said} is there twice")
        records[name] = Record(file, name, start, info.file_size, info.CRC)
    return records
