"""Values cross between the two processes unchanged, and nothing but values does."""

from __future__ import annotations

import pickle
import socket
import subprocess
from dataclasses import dataclass

import pytest
import torch

from adapters.errors import AdapterBusy, AdapterRejected, RejectReason
from adapters.ref import BASE, AdapterRef
from base.prompt import PromptImage, PromptInputs
from engine.errors import AdapterUnavailable, ContextTooLong, QueueFull
from engine.messages import Failed, Submit, Tokens
from engine.pipe import Pipe, decode, encode
from engine.request import GenerationRequest
from engine.sampling import SamplingParams

REF = AdapterRef("a", 3, "d" * 64)


def crossed(value: object) -> object:
    (back,) = decode(encode((value,)))
    return back


def test_a_request_crosses_with_its_pixels() -> None:
    image = PromptImage(torch.rand(8, 12), (1, 4, 2), "d", 3, 2)
    prompt = PromptInputs((1, 2, 3), (image,), torch.arange(9).reshape(3, 3), -1)
    request = GenerationRequest("r", prompt, BASE, SamplingParams(max_tokens=3, stop=("a",)), 12.5)
    back = crossed(Submit(request))
    assert isinstance(back, Submit)
    assert torch.equal(back.request.prompt.images[0].pixels, image.pixels)
    assert torch.equal(back.request.prompt.positions, prompt.positions)
    assert back.request.sampling == request.sampling
    assert back.request.adapter.is_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_keep_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape, dtype=dtype)
    back = crossed(tensor)
    assert isinstance(back, torch.Tensor)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert torch.equal(back, tensor)


ERRORS = (
    QueueFull("full", 2.5),
    ContextTooLong(9, 8),
    AdapterBusy("a", 3),
    AdapterRejected(RejectReason.BAD_SHAPE, "wrong", ("x", "y")),
    AdapterUnavailable("a@1", AdapterRejected(RejectReason.NON_FINITE, "nan")),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_keep_their_class_fields_and_text(error: Exception) -> None:
    back = crossed(Failed("r", error))  # type: ignore[arg-type]
    assert isinstance(back, Failed)
    assert type(back.error) is type(error)
    assert str(back.error) == str(error)
    assert {k: str(v) for k, v in vars(back.error).items()} == {k: str(v) for k, v in vars(error).items()}


@dataclass(frozen=True)
class Foreign:
    """Not of our rooms."""


class Runs:
    def __init__(self, call: object, *args: object) -> None:
        self.pair = (call, args)

    def __reduce__(self) -> tuple[object, object]:
        return self.pair


@pytest.mark.parametrize(
    "value",
    [
        Foreign(),
        Runs(subprocess.run, ["true"]),
        Runs(eval, "1"),
        Runs(getattr, "a", "b"),
        Runs(torch.load, "x"),
        Runs(decode, b""),  # a function of our own rooms
    ],
    ids=["class", "subprocess", "eval", "getattr", "torch.load", "ours"],
)
def test_what_is_no_value_of_ours_is_refused(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="may not cross"):
        decode(pickle.dumps((value,), protocol=5))


def test_everything_arrives_in_order_and_the_end_is_told() -> None:
    one, other = socket.socketpair()
    ours, theirs = Pipe(one, "one"), Pipe(other, "other")
    sent = [Tokens("r", tuple(range(i))) for i in range(500)] + [Tokens("r", tuple(range(200_000)))]
    for value in sent:
        ours.send(value)
    got: list[object] = []
    while len(got) < len(sent):
        got += theirs.receive(10)
    assert got == sent
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive(10)
    theirs.close()


def test_silence_is_told_from_an_end() -> None:
    one, other = socket.socketpair()
    ours, theirs = Pipe(one, "one"), Pipe(other, "other")
    with pytest.raises(TimeoutError):
        theirs.receive(0.01)
    ours.close()
    theirs.close()
