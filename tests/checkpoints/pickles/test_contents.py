"""PyTorch checkpoints are read as torch reads them, and what rebuilds no tensor is left out."""

from __future__ import annotations

import argparse
import collections
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.checkpoints.entries import MappedFile
from ldm.errors import UnsafePickleError
from tests.checkpoints.malicious import (
    CONTAINERS,
    LEGACY_HEAD,
    call,
    group,
    inst,
    legacy_sections,
    listed,
    name,
    number,
    obj,
    storage,
    table,
    tensor,
    text,
)
from tests.checkpoints.pickles.helpers import (
    READERS,
    assert_same,
    read,
    read_bytes,
    refusal,
    save,
    state_dict,
)
from tests.helpers import randn


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        dict,
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {"state_dict": state}},
        lambda state: {"epoch": 3, "state_dict": {"version": "1", "state_dict": state}},
    ],
    ids=["bare", "a dict", "wrapped", "wrapped twice", "among others"],
)
def test_a_state_dict_has_the_same_keys_however_it_is_wrapped(
    tmp_path: Path, container: str, wrap: Callable[[Any], object]
) -> None:
    path = save(wrap(state_dict()), tmp_path / "w.ckpt", container)
    pickled = read(path, container)
    assert_same(pickled, state_dict())
    assert pickled.stubs == ()


def test_what_is_beside_a_state_dict_has_its_way_as_a_key(tmp_path: Path, container: str) -> None:
    moments = {"step": 7, "exp_avg": randn(2, 3)}
    content = {
        "optimizer_states": [{"state": {12: moments}, "param_groups": [{"params": [0, 1]}]}],
        "state_dict": {"w": randn(2, seed=1), "state_dict": randn(3, seed=2)},
        "model": {"state_dict": {"w": randn(4, seed=3)}},
        "pair": (randn(1, seed=4), [randn(1, seed=5)]),
    }
    pickled = read(save(content, tmp_path / "w.ckpt", container), container)
    assert_same(
        pickled,
        {
            "optimizer_states.0.state.12.exp_avg": moments["exp_avg"],
            "w": content["state_dict"]["w"],
            "state_dict": content["state_dict"]["state_dict"],
            "model.state_dict.w": content["model"]["state_dict"]["w"],
            "pair.0": content["pair"][0],
            "pair.1.0": content["pair"][1][0],
        },
    )


def test_a_tensor_alone_has_no_key(tmp_path: Path, container: str) -> None:
    assert_same(read(save(randn(3), tmp_path / "w", container), container), {"": randn(3)})


def test_nothing_saved_is_nothing_read(tmp_path: Path, container: str) -> None:
    pickled = read(save({}, tmp_path / "w", container), container)
    assert (pickled.entries, pickled.stubs) == ({}, ())


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, container: str, protocol: int) -> None:
    noise = torch.randint(0, 2, (16 * 12,), generator=torch.Generator().manual_seed(0))
    content = {str(dtype): noise.to(torch.uint8).view(dtype)[:6].clone() for dtype in DTYPES}
    content |= {f"{key}, 2-d": value.reshape(2, 3) for key, value in content.items()}
    path = save(content, tmp_path / "w", container, pickle_protocol=protocol)
    pickled = read(path, container)
    assert_same(pickled, content)
    if container == "zip":  # torch writes the newest types into the old container, but not back
        assert_same(pickled, torch.load(path, weights_only=False))
    assert len(pickled.entries) == 2 * len(DTYPES) and pickled.stubs == ()


def test_views_of_one_storage_are_read_as_views(tmp_path: Path, container: str) -> None:
    base = randn(4, 6)
    content = {
        "transposed": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "inner": base[1:3, 2:5],
        "steps": base[::2, ::3],
        "permuted": base.view(2, 2, 6).permute(2, 0, 1),
        "whole": base,
        "one": base[3, 5],
        "none": base[4:],
        "none, deep": base[:, :0].t(),
        "single": base[:, 1:2].t(),
    }
    path = save(content, tmp_path / "w", container)
    pickled = read(path, container)
    assert_same(pickled, content)
    assert_same(pickled, torch.load(path, weights_only=False))
    whole = pickled.entries["whole"]
    assert pickled.entries["row"].offset == whole.offset + 2 * 6 * 4
    assert whole.stride is None and pickled.entries["transposed"].stride == (1, 6)
    assert path.stat().st_size < 2 * 4 * base.numel() + 4000  # so they did share it


def test_no_dimensions_and_no_elements(tmp_path: Path, container: str) -> None:
    content = {"scalar": torch.tensor(2.5), "none": torch.zeros(0), "deep": torch.zeros(3, 0, 2)}
    assert_same(read(save(content, tmp_path / "w", container), container), content)


def test_a_tensor_with_two_names_is_one_entry(tmp_path: Path, container: str) -> None:
    shared = randn(3)
    pickled = read(save({"a": shared, "b": shared}, tmp_path / "w", container), container)
    assert pickled.entries["a"] is pickled.entries["b"]


def test_parameters_are_tensors(tmp_path: Path, container: str) -> None:
    plain = nn.Parameter(randn(2, 3))
    frozen = nn.Parameter(randn(4), requires_grad=False)
    tagged = nn.Parameter(randn(5))
    tagged.note = "an attribute"  # type: ignore[attr-defined]
    attributed = randn(6)
    attributed.note = {"any": "thing"}  # type: ignore[attr-defined]
    content = {"plain": plain, "frozen": frozen, "tagged": tagged, "attributed": attributed}
    content["grown"] = randn(3).requires_grad_()
    pickled = read(save(content, tmp_path / "w", container), container)
    assert_same(pickled, content)
    assert pickled.stubs == ()


class Labelled(Tensor):
    """A tensor of another class, with the same bytes."""


def test_a_subclass_is_read_as_a_tensor_and_named(tmp_path: Path, container: str) -> None:
    path = save({"w": randn(3).as_subclass(Labelled)}, tmp_path / "w", container)
    pickled = read(path, container)
    assert_same(pickled, {"w": randn(3)})
    assert pickled.stubs == (f"{__name__}.Labelled",)


def test_tensors_of_a_gpu_are_read_where_there_is_none(
    tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = save(state_dict(), tmp_path / "w", container)
    assert b"cuda:0" in path.read_bytes()
    assert_same(read(path, container), state_dict())


@pytest.fixture
def lightning() -> Iterator[types.ModuleType]:
    """A module that is there when a checkpoint is written, and not when it is read."""
    module = types.ModuleType("pytorch_lightning")
    for attribute in ("ModelCheckpoint", "AttributeDict"):
        base = dict if attribute == "AttributeDict" else object
        made = type(attribute, (base,), {"__module__": "pytorch_lightning"})
        setattr(module, attribute, made)
    sys.modules["pytorch_lightning"] = module
    yield module
    sys.modules.pop("pytorch_lightning", None)


def test_a_training_checkpoint_is_read_without_its_code(
    tmp_path: Path, container: str, lightning: Any
) -> None:
    callback = lightning.ModelCheckpoint()
    callback.best_model_score = randn(1)
    state = state_dict()
    path = save(
        {
            "epoch": 4,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": state,
            "callbacks": {
                lightning.ModelCheckpoint: {"best_model_score": randn(1), "dirpath": "/a"},
                "object": callback,
            },
            "optimizer_states": [
                {"state": {0: {"step": 1, "exp_avg": randn(2)}}, "param_groups": [{"lr": 1e-4}]}
            ],
            "lr_schedulers": [{"milestones": collections.Counter([3]), "last": np.float64(0.5)}],
            "hyper_parameters": lightning.AttributeDict(lr=1e-4, weights=randn(2)),
            "args": argparse.Namespace(seed=1, name="x" * 3000),
            "rng": np.arange(3),
            "big": 1 << 3000,
            "numbers": {1, 2, 3},
            "frozen": frozenset([1]),
            "default": collections.defaultdict(list, {"w": randn(2, seed=3)}),
        },
        tmp_path / "w.ckpt",
        container,
    )
    del sys.modules["pytorch_lightning"]
    pickled = read(path, container)
    score = "callbacks.pytorch_lightning.ModelCheckpoint.best_model_score"
    moment = "optimizer_states.0.state.0.exp_avg"
    expected = {**state, score: randn(1), moment: randn(2), "default.w": randn(2, seed=3)}
    assert_same(pickled, expected)
    # numpy's own names have moved; of the others each is there, once, in the order of the file.
    assert [stub for stub in pickled.stubs if not stub.startswith(("numpy", "_codecs"))] == [
        "pytorch_lightning.ModelCheckpoint",
        "collections.Counter",
        "pytorch_lightning.AttributeDict",
        "argparse.Namespace",
        "__builtin__.set",
        "__builtin__.frozenset",
        "__builtin__.list",
    ]
    assert any(stub.startswith("numpy") and stub.endswith("scalar") for stub in pickled.stubs)
    assert "pytorch_lightning" not in sys.modules


def short(value: str) -> bytes:
    """A string as Python 2 wrote it."""
    return pickle.SHORT_BINSTRING + bytes([len(value)]) + value.encode()


def python_2_tensor(key: str, of: bytes) -> bytes:
    kind = name("torch", of.decode())
    identity = group(short("storage"), kind, short(key), short("cpu"), number(2), pickle.NONE)
    sizes = call(name("torch", "Size"), group(number(2)))
    arguments = (identity + pickle.BINPERSID, number(0), sizes, group(number(1)))
    return call(name("torch._utils", "_rebuild_tensor"), *arguments)


def test_a_file_of_python_2_is_read(tmp_path: Path) -> None:
    """Strings of bytes, long integers as text, an OrderedDict made from a list of its pairs."""
    pairs = listed(
        pickle.EMPTY_LIST
        + pickle.MARK
        + short("w")
        + python_2_tensor("94", b"FloatStorage")
        + pickle.APPENDS,
        listed(short("count"), pickle.INT + b"9007199254740993\n"),
        listed(short("done"), pickle.INT + b"01\n"),
    )
    state = call(name("collections", "OrderedDict"), pairs)
    body = pickle.EMPTY_DICT + short("state_dict") + state + pickle.SETITEM
    keys = pickle.PROTO + b"\x02" + listed(short("94")) + pickle.STOP
    path = tmp_path / "w"
    path.write_bytes(
        legacy_sections(*LEGACY_HEAD, pickle.PROTO + b"\x02" + body + pickle.STOP, keys)
    )
    expected = torch.load(path, weights_only=False)["state_dict"]
    assert expected["count"] == 9007199254740993 and expected["done"] is True
    assert_same(read(path, "legacy"), {"w": expected["w"]})
    assert torch.equal(expected["w"], torch.tensor([1.5, -2.5]))


def test_a_key_has_an_end(tmp_path: Path, container: str) -> None:
    content = {"a" * 249: {"b" * 250: randn(1)}, "c" * 501: 1.0, "d" * 300: {"e" * 300: [2]}}
    path = save(content, tmp_path / "w", container)
    assert list(read(path, container).entries) == ["a" * 249 + "." + "b" * 250]
    for key in ("a" * 501, "a" * 100_000):
        data = save({key: randn(1)}, tmp_path / "long", container).read_bytes()
        assert "longer than 500" in refusal(data, container, tmp_path)
    data = save({"a" * 250: {"b" * 250: randn(1)}}, tmp_path / "long", container).read_bytes()
    assert "longer than 500" in refusal(data, container, tmp_path)


def test_long_strings_and_numbers_cost_nothing(
    tmp_path: Path, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can be no names: an array that was pickled as text may take megabytes."""
    monkeypatch.setattr("ldm.checkpoints.pickles.limits.PURSE", 100_000)
    long = {"text": "x" * 200_000, "bytes": b"x" * 200_000, "number": 1 << 1_600_000}
    path = save({**long, "w": randn(1)}, tmp_path / "w", container)
    assert_same(read(path, container), {"w": randn(1)})


def test_a_key_that_no_terminal_should_see_is_escaped(tmp_path: Path, container: str) -> None:
    content = {"a\x1b[2J\nb": randn(1), "grün": randn(1, seed=1), None: {("x",): randn(1, seed=2)}}
    pickled = read(save(content, tmp_path / "w", container), container)
    assert list(pickled.entries) == ["a\\x1b[2J\\nb", "grün", "a nonetype.a tuple"]


def test_reading_keeps_no_page_and_opens_nothing_else(tmp_path: Path, container: str) -> None:
    """The bytes of tensors are not looked at: a file that is all hole but for them is as quick."""
    path = save({"w": torch.zeros(1 << 22)}, tmp_path / "w", container)
    file = MappedFile(path)
    entry = READERS[container](file).entries["w"]
    assert resident_pages(file) <= 1  # the file's last page, if it is not a whole one
    entry.map()[0] = 3.0
    assert torch.load(path, weights_only=True)["w"][0] == 0


def resident_pages(file: MappedFile) -> int:
    """In how many pages of the mapping this process has something of its own, or of the file's."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell which pages are in memory")
    lines = iter(smaps.read_text().splitlines())
    for line in lines:
        if line.endswith(str(file.path)):
            return next(int(row.split()[1]) for row in lines if row.startswith("Rss:")) // 4
    raise AssertionError("the file is not mapped")


# --- What does not rebuild a tensor ----------------------------------------------------------


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (quantised, "QInt8Storage"),
        (lambda: torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.ones(2, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "torch._utils._rebuild_tensor_v2"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "torch.bits8"),
    ],
    ids=["quantised", "sparse", "sparse rows", "meta", "conjugated", "bits"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_another_kind_is_refused_by_name(
    tmp_path: Path, container: str, make: Callable[[], Tensor], said: str
) -> None:
    data = save({"w": make()}, tmp_path / "saved", container).read_bytes()
    assert said in refusal(data, container, tmp_path, UnsafePickleError)


def test_a_storage_in_the_hands_of_a_stranger_is_refused_by_name(
    tmp_path: Path, container: str
) -> None:
    called = call(name("foreign", "rebuild"), storage(), number(0))
    built = call(name("foreign", "Tensor")) + group(storage(), number(0)) + pickle.BUILD
    for fragment, who in ((called, "foreign.rebuild"), (built, "foreign.Tensor")):
        said = refusal(CONTAINERS[container](fragment), container, tmp_path, UnsafePickleError)
        assert who in said


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path: Path, container: str) -> None:
    data = save(nn.Linear(2, 3), tmp_path / "saved", container).read_bytes()
    said = refusal(data, container, tmp_path, UnsafePickleError)
    assert "inside of objects" in said and "torch.nn.modules.linear.Linear" in said


NAMESPACE = ("argparse", "Namespace")
OBJECTS = {  # ways in which an object can stand beside weights
    "INST": lambda *arguments: inst(*NAMESPACE, *arguments),
    "OBJ": lambda *arguments: obj(name(*NAMESPACE), *arguments),
    "REDUCE": lambda *arguments: call(name(*NAMESPACE), *arguments),
    "NEWOBJ": lambda *arguments: name(*NAMESPACE) + group(*arguments) + pickle.NEWOBJ,
    "NEWOBJ_EX": lambda *arguments: (
        name(*NAMESPACE) + group(*arguments) + pickle.EMPTY_DICT + pickle.NEWOBJ_EX
    ),
    "BUILD": lambda *arguments: call(name(*NAMESPACE)) + listed(*arguments) + pickle.BUILD,
}


@pytest.mark.parametrize("way", OBJECTS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_objects_beside_weights_take_none_with_them(
    tmp_path: Path, container: str, way: str, count: int
) -> None:
    """Whichever instruction makes them, however many, with arguments or without."""
    for arguments in ((), (number(1), text("a")), (OBJECTS[way](),)):
        objects = {f"o{n}": OBJECTS[way](*arguments) for n in range(count)}
        program = table(a=tensor(), **objects, w=table(b=OBJECTS[way](*arguments), c=tensor()))
        pickled = read_bytes(CONTAINERS[container](program), container, tmp_path)
        stored = torch.tensor([1.5, -2.5])
        assert_same(pickled, {"a": stored, "w.c": stored})
        assert pickled.stubs == ("argparse.Namespace",)


def test_a_class_of_torch_that_is_called_is_a_stub(tmp_path: Path, container: str) -> None:
    """Only where it is an argument is it understood."""
    data = CONTAINERS[container](table(w=tensor(), other=call(name("torch", "Tensor"), number(3))))
    pickled = read_bytes(data, container, tmp_path)
    assert list(pickled.entries) == ["w"] and pickled.stubs == ("torch.Tensor",)


def test_a_rebuilding_of_rebuildings_is_refused(tmp_path: Path, container: str) -> None:
    """Python's stack would end before the pickle does."""
    again = name("torch._tensor", "_rebuild_from_type_v2")
    args = group(again, name("torch", "Tensor"), pickle.EMPTY_TUPLE, pickle.NONE)
    for _ in range(2000):
        args = group(again, name("torch", "Tensor"), args, pickle.NONE)
    data = CONTAINERS[container](again + args + pickle.REDUCE)
    assert "_rebuild_from_type_v2" in refusal(data, container, tmp_path, UnsafePickleError)


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        (text("0"), "outside of its pickle"),
        (group(text("module"), text("a")), "outside of its pickle"),
        (group(text("storage"), name("os", "system"), text("0"), text("cpu"), number(2)), "os.sys"),
        (
            group(
                *(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu")),
                *(number(2), group(text("1"), number(0), number(1))),
            ),
            "outside of its pickle",
        ),
    ],
    ids=["text", "another kind", "of a global", "a view"],
)
def test_a_persistent_id_of_another_kind_is_refused(
    tmp_path: Path, container: str, identity: bytes, said: str
) -> None:
    data = CONTAINERS[container](identity + pickle.BINPERSID)
    assert said in refusal(data, container, tmp_path, UnsafePickleError)
