"""Damaged pickles, and damaged archives around them, are refused in one line."""

from __future__ import annotations

import io
import pickle
import struct
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.errors import TruncatedError, UnreadableError
from tests.checkpoints import malicious
from tests.checkpoints.malicious import (
    CONTAINERS,
    STORED,
    call,
    group,
    legacy_file,
    listed,
    name,
    number,
    pickle_of,
    storage,
    table,
    tensor,
    text,
    zip_file,
)
from tests.checkpoints.pickles.helpers import (
    assert_same,
    read,
    read_bytes,
    refusal,
    save,
    state_dict,
)
from tests.helpers import a_million_dicts


def test_a_legacy_file_that_is_cut_off_says_how_much_is_missing(tmp_path: Path) -> None:
    whole = save(state_dict(), tmp_path / "whole", "legacy").read_bytes()
    first = len(whole) - 2 * 8 - (12 + 5) * 4  # where the first storage begins
    for length in range(1, len(whole)):
        said = refusal(whole[:length], "legacy", tmp_path, TruncatedError)
        assert f"found {length:,} bytes" in said
        assert (f"expected {len(whole):,} bytes" in said) == (length >= first), length


def test_a_zip_file_that_is_cut_off_says_so(tmp_path: Path) -> None:
    whole = save(state_dict(), tmp_path / "whole", "zip").read_bytes()
    for length in (*range(4, len(whole), 16), *range(len(whole) - 40, len(whole))):
        said = refusal(whole[:length], "zip", tmp_path, TruncatedError)
        assert f"found {length:,} bytes" in said


def test_bytes_behind_the_last_storage_do_no_harm(tmp_path: Path) -> None:
    data = legacy_file(table(w=tensor())) + b"more"
    assert list(read_bytes(data, "legacy", tmp_path).entries) == ["w"]


TWO = group(number(2))
ONE = group(number(1))
VIEWS = {
    "longer than its storage": tensor(shape=group(number(3))),
    "behind its storage": tensor(offset=number(1)),
    "a stride too long": tensor(stride=TWO),
    "a stride of 0": tensor(shape=group(number(2), number(2)), stride=group(number(0), number(1))),
    "petabytes out of one number": tensor(shape=group(number(1 << 50)), stride=group(number(0))),
    "a negative size": tensor(shape=group(number(-1))),
    "a negative stride": tensor(offset=number(1), stride=group(number(-1))),
    "a negative offset": tensor(offset=number(-1), shape=ONE),
    "a huge size": tensor(shape=group(number(1 << 100)), stride=group(number(0))),
    "a huge offset": tensor(offset=number(1 << 70)),
    "a huge stride": tensor(stride=group(number(1 << 62))),
    "a size that is True": tensor(shape=group(pickle.NEWTRUE)),
    "an offset that is False": tensor(offset=pickle.NEWFALSE),
    "a size that is 2.0": tensor(shape=group(pickle.BINFLOAT + struct.pack(">d", 2.0))),
    "a size that is text": tensor(shape=group(text("2"))),
    "sizes in a list": tensor(shape=listed(number(2))),
    "no strides": tensor(stride=pickle.NONE),
    "more strides than sizes": tensor(stride=group(number(1), number(1))),
    "too many dimensions": tensor(shape=group(*[number(1)] * 65), stride=group(*[number(1)] * 65)),
    "no elements, and more than can be counted": tensor(
        shape=group(number(0), number(1 << 31), number(1 << 31)), stride=group(*[number(1)] * 3)
    ),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_must_lie_in_its_storage(tmp_path: Path, container: str, kind: str) -> None:
    said = refusal(CONTAINERS[container](table(w=VIEWS[kind])), container, tmp_path)
    assert "describes a tensor" in said


@pytest.mark.parametrize("numel", [3, 1 << 54, -1, 1 << 90])
def test_a_storage_must_lie_in_its_file(tmp_path: Path, container: str, numel: int) -> None:
    data = CONTAINERS[container](table(w=tensor(storage(numel=numel))))
    missing = container == "legacy" and 0 < numel < 1 << 60
    said = refusal(data, container, tmp_path, TruncatedError if missing else UnreadableError)
    assert ("expected" in said) == missing


def test_a_storage_has_one_type_and_one_size(tmp_path: Path, container: str) -> None:
    for other in (storage("IntStorage"), storage(numel=1)):
        data = CONTAINERS[container](table(a=tensor(), b=tensor(other, shape=ONE)))
        assert "storage '0' in two ways" in refusal(data, container, tmp_path)


def test_the_type_of_a_storage_counts_its_bytes(tmp_path: Path) -> None:
    """8 bytes are two floats, and one double: not two."""
    one = zip_file(table(w=tensor(storage("DoubleStorage", numel=1), shape=ONE)))
    assert_same(
        read_bytes(one, "zip", tmp_path),
        {"w": torch.frombuffer(bytearray(STORED), dtype=torch.float64)},
    )
    two = zip_file(table(w=tensor(storage("DoubleStorage"))))
    assert "8 bytes in data/0, whose tensors need 16" in refusal(two, "zip", tmp_path)


def test_two_tensors_with_one_key_are_refused(tmp_path: Path, container: str) -> None:
    clash = table(a=table(b=tensor()), **{"a.b": tensor()})
    wrapped = table(w=tensor(), state_dict=table(w=tensor()))
    for content, key in ((clash, "a.b"), (wrapped, "w")):
        assert f"key '{key}'" in refusal(CONTAINERS[container](content), container, tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        pickle.STOP,
        pickle.POP,
        pickle.TUPLE,
        pickle.NONE + pickle.TUPLE2,
        pickle.NONE * 2 + pickle.TUPLE3,
        pickle.BINGET + b"\0",
        pickle.NONE + b"q\2h\1",
        pickle.EMPTY_DICT + pickle.NONE + pickle.APPEND,
        pickle.EMPTY_LIST + b"NNs",
        pickle.EMPTY_DICT + b"(Nu",
        pickle.NONE + pickle.NONE + pickle.APPEND,
        pickle.NONE + b"NNs",
        pickle.NONE + pickle.EMPTY_TUPLE + pickle.REDUCE,
        name("os", "system") + pickle.NONE + pickle.REDUCE,
        pickle.NONE + pickle.NONE + pickle.STACK_GLOBAL,
        text("o\ns") + text("system") + pickle.STACK_GLOBAL,
        name("o\x1bs", "system"),
        name("o" * 300, "system"),
        pickle.INT + b"1_0\n",
        pickle.INT + b"1" * 150 + b"x\n",
        pickle.PROTO + b"\x7f" + pickle.NONE,
        pickle.NEXT_BUFFER,
        pickle.DUP,
        pickle.PERSID + b"0\n",
        b"\xff",
        pickle.MARK + pickle.OBJ,
        call(name("collections", "OrderedDict"), listed(pickle.NONE)),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, container: str, body: bytes) -> None:
    data = zip_file(body) if container == "zip" else legacy_file(body, keys=())
    assert "holds a pickle" in refusal(data, container, tmp_path)


def test_a_pickle_that_is_not_of_torch_is_refused(tmp_path: Path) -> None:
    assert "no magic number" in refusal(pickle.dumps({"a": 1}, 2), "legacy", tmp_path)
    other = pickle.dumps(malicious.LEGACY_MAGIC, 2) + pickle.dumps(1002, 2)
    assert "unknown version" in refusal(other, "legacy", tmp_path)


def test_the_storages_of_a_legacy_file_are_those_of_its_tensors(tmp_path: Path) -> None:
    content = table(w=tensor())
    for keys in ((), ("1",), ("0", "0"), ("0", "1")):
        assert "other storages" in refusal(legacy_file(content, keys), "legacy", tmp_path)
    wrong = legacy_file(content)[: -8 - 8] + struct.pack("<q", 1) + STORED
    assert "1 numbers in storage '0' for 2" in refusal(wrong, "legacy", tmp_path)


# --- Zip archives ----------------------------------------------------------------------------


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor()), compression=zipfile.ZIP_DEFLATED)
    assert "stored uncompressed" in refusal(data, "zip", tmp_path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    for order in (b"big", b"", b"middle"):
        data = zip_file(table(w=tensor()), {"byteorder": order})
        assert "not little-endian" in refusal(data, "zip", tmp_path)


def test_a_file_from_before_the_byte_order_was_noted_is_little_endian(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor())).replace(b"archive/byteorder", b"archive/otherfile")
    assert_same(read_bytes(data, "zip", tmp_path), {"w": torch.tensor([1.5, -2.5])})


def test_a_script_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.script(nn.Linear(2, 3)).save(str(path))
    assert "TorchScript" in refusal(path.read_bytes(), "zip", tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "none of PyTorch's: it has 0"),
        (["word/document.xml"], "none of PyTorch's: it has 0"),
        (["a/data.pkl", "b/data.pkl"], "none of PyTorch's: it has 2"),
    ],
)
def test_an_archive_of_something_else_is_refused(
    tmp_path: Path, names: list[str], said: str
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for record in names:
            archive.writestr(record, b"")
    assert said in refusal(buffer.getvalue(), "zip", tmp_path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor(storage(key="1"))))
    assert "no record data/1" in refusal(data, "zip", tmp_path)


# An entry of the central directory begins with a signature. At 8 are its flags, at 20 and 24 its
# sizes (in the archive and outside of it), at 42 the offset of its local header, at 46 its name.
CENTRAL = b"PK\x01\x02"


def central(data: bytes, record: str) -> int:
    """Where the central directory's entry for a record begins."""
    return data.rindex(record.encode()) - 46


def changed(data: bytes, at: int, form: str, value: int) -> bytes:
    new = struct.pack(form, value)
    return data[:at] + new + data[at + len(new) :]


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor()))
    entry, other = central(data, "archive/data/0"), central(data, "archive/data.pkl")
    assert data[entry : entry + 4] == CENTRAL
    other_header = struct.unpack_from("<I", data, other + 42)[0]
    for at, form, value, said in (
        (8, "<H", 1, "encrypted"),
        (20, "<I", 4, "two sizes"),
        (42, "<I", other_header, "begins inside of another"),
        (42, "<I", other_header + 1, "begins inside of another"),
        (42, "<I", len(data), "damaged zip archive"),
        (42, "<I", 0xFFFFFFF0, "damaged zip archive"),
    ):
        assert said in refusal(changed(data, entry + at, form, value), "zip", tmp_path), said
    grown = changed(changed(data, entry + 20, "<I", 1 << 30), entry + 24, "<I", 1 << 30)
    assert "outside of the file" in refusal(grown, "zip", tmp_path)
    shrunk = changed(changed(data, entry + 20, "<I", 7), entry + 24, "<I", 7)
    assert "7 bytes in data/0" in refusal(shrunk, "zip", tmp_path)
    header = struct.unpack_from("<I", data, entry + 42)[0]
    assert "has no header" in refusal(changed(data, header, "<B", 0), "zip", tmp_path)


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO(zip_file(table(w=tensor())))
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", STORED)
    assert "there twice" in refusal(buffer.getvalue(), "zip", tmp_path)


def test_a_directory_without_end_is_refused(tmp_path: Path) -> None:
    data = zip_file(table(w=tensor()), {f"data/x{n}": b"" for n in range(20_000)})
    started = time.process_time()
    assert "lists more than" in refusal(data, "zip", tmp_path)
    assert time.process_time() - started < 10 * a_million_dicts()


def test_an_archive_behind_four_gigabytes_is_read(tmp_path: Path) -> None:
    """From there on a directory needs longer offsets (zip64). Most of this file is a hole."""
    path = tmp_path / "weights"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_of(table(w=tensor())))
        archive.start_dir += 5 << 30
        archive.writestr("archive/data/0", STORED)
    assert path.stat().st_size > 5 << 30
    if path.stat().st_blocks * 512 > 1 << 20:
        path.unlink()
        pytest.skip("this file system has no holes")
    pickled = read(path, "zip")
    assert pickled.entries["w"].offset > 5 << 30
    assert_same(pickled, {"w": torch.tensor([1.5, -2.5])})
    path.unlink()


def test_the_folder_of_an_archive_may_have_any_name(tmp_path: Path) -> None:
    for folder in ("model", "v1-5 pruned", "グリーン"):
        path = save(state_dict(), tmp_path / f"{folder}.pt", "zip")
        assert_same(read(path, "zip"), state_dict())
