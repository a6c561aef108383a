"""The last step: the weights of a plan, read into the stage that it is for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.checkpoints.entries import Record
from ldm.checkpoints.planning import Place, Plan
from ldm.errors import HalfOverflowError, NonFiniteError, UnreadableError
from ldm.text import CLIPTextEncoder, check_tokenizer
from ldm.tokenizer import Tokenizer

CHUNK = 1 << 20  # numbers that are copied at once: few enough to be checked while still in cache


def fill(
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
    check: bool = True,
    tokenizer: Tokenizer | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Give a stage its weights, in the order in which they lie on disk, and return it.

    On a CPU, weights that are stored as they are asked for stay on the mapped file: they cost no
    copy, and the file may be replaced, but not written into, while the model lives. A plan is for
    one model: the stage that comes back is its own.

    Args:
        device, dtype: where the weights go, and as what.
        check: look at every number now, so that NaN or infinity is an error here and not a black
            picture, and compare the checksums that a zip archive has; False leaves what need not
            change unread until the model runs.
        tokenizer: of a text encoder, which without it encodes token ids only.
        trainable: whether its weights take gradients; a stage that only draws needs none.

    Raises:
        NonFiniteError: with `check`, NaN or infinity is among them.
        HalfOverflowError: with `check`, a value that only `dtype` cannot hold.
        UnreadableError: with `check`, bytes that do not have their checksum.
        ValueError: the tokenizer is another model's.
    """
    model, shapes = plan.model, {k: v.shape for k, v in plan.model.state_dict().items()}
    if isinstance(model, CLIPTextEncoder) and tokenizer is not None:
        check_tokenizer(tokenizer, model.config)  # before any work
        model.tokenizer = tokenizer
    in_order = sorted(
        plan.places.items(), key=lambda item: (item[1].entry.file.path, item[1].entry.offset)
    )
    tensors: dict[str, Tensor] = {}
    intact: set[Record] = set()
    for ours, place in in_order:
        if check:
            check_intact(place, intact)
        tensors[ours] = read(place, device, dtype, check).view(shapes[ours])
    model.load_state_dict(tensors, strict=True, assign=True)
    if isinstance(model, CLIPTextEncoder):
        model.rebuild_buffers()
    return model.eval().requires_grad_(trainable)


def check_intact(place: Place, intact: set[Record]) -> None:
    """An error unless the bytes that a tensor is read from have their checksum. Those that were
    looked at before are `intact`; what is looked at here joins them."""
    for record in place.entry.records:
        if record not in intact and not record.is_intact():
            told = f"{place.key} is damaged: the record {record.name} does not have its checksum"
            raise UnreadableError(f"{record.file.path}: {told}; fetch the file again")
        intact.add(record)


def read(place: Place, device: torch.device, dtype: torch.dtype, check: bool) -> Tensor:
    """A tensor of the file. What need not change stays where it is, on the mapped file: nothing is
    copied. All else gets memory of its own."""
    entry = place.entry
    is_plain = entry.stride is None and entry.offset % entry.dtype.itemsize == 0
    if device.type == "cpu" and entry.dtype == dtype and is_plain:
        mapped = entry.map()
        if check:
            check_finite(place, mapped, mapped)
            entry.release()  # a stage takes memory when it runs, not before
        return mapped
    return copied(place, dtype, check).to(device)


def copied(place: Place, dtype: torch.dtype, check: bool) -> Tensor:
    """A tensor of the file in memory of its own, in another dtype: piece by piece, each checked
    while it is still in cache. At most one piece exists twice."""
    result = torch.empty(place.entry.shape, dtype=dtype)
    targets = result.view(-1).split(CHUNK)
    for target, source in zip(targets, place.entry.pieces(CHUNK), strict=True):
        target.copy_(source)
        if check:
            check_finite(place, source, target)
    return result


def check_finite(place: Place, source: Tensor, target: Tensor) -> None:
    """An error unless all numbers of the file, and all that became of them, are finite."""
    # A sum is the fastest look at every number. It may overflow on its own: then look again.
    if target.sum().isfinite():
        return
    stored, arrived = source.double(), target.double()
    where = f"{place.entry.file.path}: {place.key}"
    if not stored.isfinite().all():
        kind = "NaN" if stored.isnan().any() else "infinity"
        raise NonFiniteError(f"{where} holds {kind}: the file is damaged")
    if not arrived.isfinite().all():
        name = str(target.dtype).removeprefix("torch.")
        wider = "float64" if target.dtype == torch.float32 else "float32"
        raise HalfOverflowError(
            f"{where} holds {stored.abs().max().item():g}, too large for {name}: load it as {wider}"
        )
