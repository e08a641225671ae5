"""Every format is read for what it means, every syntax with its lines, and what is wrong is named where it stands."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from base.images import MAX_ASPECT_RATIO
from base.processor import Processor
from base.prompt import TextPart
from server import media
from server.decode import decode, open_image
from tests.support.pictures import picture
from tests.training.rows import ROWS, data_url, png, put_pictures, write
from training.data.checks import RowCheck
from training.data.faults import Fault, FaultKind, Found, RowRejected, shown
from training.data.formats import Conversation, DataFile, Format, PictureRoot, Row, pictures, read_rows


def read(path: Path, **options: object) -> list[Conversation | Fault]:
    return list(DataFile(path, **options))  # type: ignore[arg-type]


def one(folder: Path, row: object) -> Conversation:
    (result,) = read(write(folder, row))
    assert isinstance(result, Conversation), str(result)
    return result


def fault(folder: Path, *rows: object) -> Fault:
    """The only fault of a file, in its last row."""
    results = read(write(folder, *rows))
    (found,) = [result for result in results if isinstance(result, Fault)]
    assert found.origin.line == len(rows)
    assert found.origin.file == "rows.jsonl"
    return found


def told(conversation: Conversation) -> list[tuple[str, list[str]]]:
    return [
        (
            turn.role,
            [part.text if isinstance(part, TextPart) else f"[{part.shown_as[:9]}]" for part in turn.parts],
        )
        for turn in conversation.turns
    ]


# ---- what the formats mean


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_found_from_its_first_row(tmp_path: Path, name: str) -> None:
    put_pictures(tmp_path)
    kind, row = ROWS[name]
    file = DataFile(write(tmp_path, row, row))
    assert all(isinstance(item, Conversation) for item in file)
    assert file.kind == kind


MEANINGS: dict[str, list[tuple[str, list[str]]]] = {
    "alpaca": [("user", ["Translate.\na kite"]), ("assistant", ["un cerf-volant"])],
    "alpaca_whole": [
        ("system", ["Be brief."]), ("user", ["[a.png]", "What is it?"]), ("assistant", ["A kite."]),
        ("user", ["And this? ", "[b.png]"]), ("assistant", ["A boat."]),
    ],
    "sharegpt": [
        ("system", ["You see."]), ("user", ["[a.png]", "\nWhat is it?"]), ("assistant", ["A kite."]),
        ("user", ["Sure?"]), ("assistant", ["Yes, I am."]),
    ],
    "role_content": [
        ("user", ["Compare ", "[a.png]", " and ", "[b.png]"]), ("assistant", ["The same."]),
    ],
    "openai": [
        ("system", ["Answer in words."]), ("user", ["What is it?", "[data:imag]", "[b.png]"]),
        ("assistant", ["A kite."]), ("user", ["Say <image> in words."]), ("assistant", ["A tag."]),
    ],
    "openai_tools": [
        ("user", ["What is a kite?"]), ("assistant", []), ("tool", ["A toy that flies."]),
        ("assistant", ["A toy that flies."]),
    ],
    "query_response": [
        ("user", ["[a.png]", "What is it?"]), ("assistant", ["A kite."]), ("user", ["And its colour?"]),
        ("assistant", ["Red."]),
    ],
    "prompt_completion": [("user", ["Once upon"]), ("assistant", [" a time\n"])],
    "prompt_completion_messages": [
        ("user", ["Hi"]), ("assistant", ["Hello."]), ("user", ["Bye"]), ("assistant", ["See you."]),
    ],
}  # fmt: skip
LOSS = {
    "alpaca_whole": (True, True), "openai": (False, True), "query_response": (False, True),
    "prompt_completion_messages": (False, True), "openai_tools": (True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANINGS)
def test_a_row_means_its_turns(tmp_path: Path, name: str) -> None:
    put_pictures(tmp_path)
    conversation = one(tmp_path, ROWS[name][1])
    assert told(conversation) == MEANINGS[name]
    if name in LOSS:
        assert conversation.loss == LOSS[name]
    assert str(conversation.origin) == "rows.jsonl:1"


def test_the_same_conversation_in_six_formats_is_one_and_the_same(tmp_path: Path) -> None:
    put_pictures(tmp_path)
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A kite."}]
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is it?"}]
    names = {"user": "human", "assistant": "gpt"}
    rows: list[dict[str, object]] = [
        {"instruction": "What is it?", "output": "A kite.", "images": "a.png"},
        {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns], "images": ["a.png"]},
        {"messages": turns, "images": ["a.png"]},
        {"messages": [{"role": "user", "content": parts}, turns[1]]},
        {"query": "<image>What is it?", "response": "A kite.", "images": ["./a.png"]},
        {"prompt": "What is it?", "completion": "A kite.", "images": [{"path": "a.png"}]},
    ]  # fmt: skip
    conversations = [one(tmp_path, row) for row in rows]
    assert len(set(conversations)) == 1
    assert len({conversation.digest() for conversation in conversations}) == 1
    other = one(tmp_path, rows[0] | {"images": "b.png"})
    assert other.digest() != conversations[0].digest()
    assert other.question_digest() != conversations[0].question_digest()


def test_columns_are_renamed_and_what_is_not_used_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": "What?", "a": "That.", "id": 7, "note": None})
    file = DataFile(path, columns={"q": "prompt", "a": "completion"})
    (row,) = list(file)
    assert isinstance(row, Conversation)
    assert told(row) == [("user", ["What?"]), ("assistant", ["That."])]
    assert file.unused == {"id": 1}
    (clash,) = read(write(tmp_path, {"q": "1", "prompt": "2", "completion": "3"}), columns={"q": "prompt"})
    assert isinstance(clash, Fault)


def test_a_format_may_be_named(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "query": "c", "response": "d"}
    (found,) = read(write(tmp_path, row))
    assert isinstance(found, Fault) and found.kind == FaultKind.UNKNOWN_FORMAT
    (chosen,) = read(write(tmp_path, row), kind=Format.QUERY_RESPONSE)
    assert isinstance(chosen, Conversation) and told(chosen)[0] == ("user", ["c"])


# ---- what is wrong

ALPACA = {"instruction": "a", "output": "b"}


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def asks(*parts: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def pictured(text: str, *images: str) -> dict[str, object]:
    return ALPACA | {"instruction": text, "images": list(images)}


WRONG: dict[str, tuple[FaultKind, str, list[object]]] = {
    "bad JSON": (FaultKind.BAD_JSON, "", [ALPACA, '{"instruction": "a", "output": }']),
    "not an object": (FaultKind.BAD_JSON, "", [ALPACA, "[1, 2]"]),
    "a key twice": (FaultKind.BAD_JSON, "", ['{"instruction": "a", "output": "b", "output": "c"}']),
    "NaN": (FaultKind.BAD_JSON, "", ['{"instruction": "a", "output": NaN}']),
    "too deep": (FaultKind.BAD_JSON, "", ['{"instruction": ' + "[" * 100_000]),
    "no format": (FaultKind.UNKNOWN_FORMAT, "", [{"question": "a", "answer": "b"}]),
    "another format": (FaultKind.MIXED_FORMAT, "", [ALPACA, {"prompt": "a", "completion": "b"}]),
    "images later": (
        FaultKind.MIXED_FORMAT, "", [turns("user", "assistant"), turns("user", "assistant") | {"images": ["a.png"]}],
    ),
    "a field gone": (FaultKind.MISSING_FIELD, "output", [ALPACA, {"instruction": "a"}]),
    "a null field": (FaultKind.MISSING_FIELD, "output", [{"instruction": "a", "output": None}]),
    "a number": (FaultKind.BAD_VALUE, "output", [{"instruction": "a", "output": 5}]),
    "half a character": (FaultKind.BAD_VALUE, "output", ['{"instruction": "a", "output": "\\ud800"}']),
    "no pair": (FaultKind.BAD_VALUE, "history[0]", [ALPACA | {"history": [["a"]]}]),
    "too few flags": (FaultKind.BAD_VALUE, "loss", [{"query": "a", "response": "b", "loss": [True, True]}]),
    "a flag of words": (FaultKind.BAD_VALUE, "loss", [{"query": "a", "response": "b", "loss": "yes"}]),
    "no label": (FaultKind.NO_LABEL, "", [{"query": "a", "response": "b", "loss": False}]),
    "empty target": (FaultKind.EMPTY_TARGET, "output", [{"instruction": "a", "output": " \n"}]),
    "answer first": (FaultKind.ROLE_ORDER, "messages[0].content", [turns("assistant")]),
    "two questions": (FaultKind.ROLE_ORDER, "messages[1].content", [turns("user", "user", "assistant")]),
    "late system": (FaultKind.ROLE_ORDER, "messages[2].content", [turns("user", "assistant", "system")]),
    "no answer": (FaultKind.ROLE_ORDER, "messages[2].content", [turns("user", "assistant", "user")]),
    "no turns": (FaultKind.ROLE_ORDER, "", [turns()]),
    "unknown role": (FaultKind.ROLE_ORDER, "messages[0].role", [turns("robot")]),
    "tool without call": (FaultKind.ROLE_ORDER, "messages[1].content", [turns("user", "tool")]),
    "image too few": (FaultKind.IMAGE_COUNT, "images", [pictured("<image><image>", "a.png")]),
    "image too many": (FaultKind.IMAGE_COUNT, "images", [pictured("<image>", "a.png", "b.png")]),
    "image in answer": (FaultKind.IMAGE_COUNT, "output", [ALPACA | {"output": "<image>", "images": ["a.png"]}]),
    "image missing": (FaultKind.IMAGE_MISSING, "images[0]", [ALPACA | {"images": ["c.png"]}]),
    "image NUL": (FaultKind.IMAGE_MISSING, "images[0]", [ALPACA | {"images": ["c\0.png"]}]),
    "a folder": (FaultKind.IMAGE_MISSING, "images[0]", [ALPACA | {"images": ["."]}]),
    "up and out": (FaultKind.IMAGE_OUTSIDE_ROOT, "images[0]", [ALPACA | {"images": ["../out.png"]}]),
    "absolute": (FaultKind.IMAGE_OUTSIDE_ROOT, "images[0]", [ALPACA | {"images": ["/etc/hostname"]}]),
    "a link out": (FaultKind.IMAGE_OUTSIDE_ROOT, "images[0]", [ALPACA | {"images": ["link.png"]}]),
    "remote": (FaultKind.IMAGE_REMOTE, "images[0]", [ALPACA | {"images": ["https://example.com/a.png"]}]),
    "bad base64": (FaultKind.IMAGE_UNDECODABLE, "images[0]", [ALPACA | {"images": ["data:image/png;base64,???"]}]),
    "detail": (
        FaultKind.BAD_VALUE, "messages[0].content[0].image_url.url.detail",
        [asks({"type": "image_url", "image_url": {"url": "a.png", "detail": "max"}})],
    ),
    "a part of audio": (
        FaultKind.BAD_VALUE, "messages[0].content[0].type", [asks({"type": "audio"})],
    ),
    "an unknown field": (
        FaultKind.BAD_VALUE, "messages[1].reasoning",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_where_it_stands(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    put_pictures(inside)
    (tmp_path / "out.png").write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    kind, field, rows = WRONG[name]
    found = fault(inside, *rows)
    assert (found.kind, found.complaint.field) == (kind, field)
    assert found.complaint.expected and found.complaint.fix
    assert len(str(found)) < 900


def test_a_bad_row_does_not_hide_the_next(tmp_path: Path) -> None:
    results = read(write(tmp_path, "{", "nonsense", ALPACA, "", {"instruction": 3, "output": "b"}, ALPACA))
    assert [type(result) for result in results] == [Fault, Fault, Conversation, Fault, Conversation]
    assert [result.origin.line for result in results] == [1, 2, 3, 5, 6]


def test_a_value_is_shown_short() -> None:
    for value in ("x" * 10**6, [["y" * 1000] * 1000] * 1000, {"k" * 1000: {"a": {"b": {"c": 1}}}}, b"bytes"):
        assert len(shown(value)) <= 80
    assert shown("a") == '"a"'
    assert shown(Found("2 images")) == "2 images"


# ---- syntaxes


def test_every_syntax_tells_the_line_of_a_row(tmp_path: Path) -> None:
    array = '[\n {"prompt": "a\\n",\n  "completion": "b"},\n\n {"prompt": "c", "completion": "d"}]\n'
    (tmp_path / "rows.json").write_text(array, "utf-8-sig")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["a\n", "b"], ["c", "d"]])
    write(tmp_path, {"prompt": "a\n", "completion": "b"}, {"prompt": "c", "completion": "d"})
    lines = {"rows.json": [2, 5], "rows.csv": [2, 4], "rows.jsonl": [1, 2]}
    for name, expected in lines.items():
        results = read(tmp_path / name)
        assert [result.origin.line for result in results] == expected
        assert all(isinstance(result, Conversation) for result in results)
        assert [told(result)[0][1] for result in results if isinstance(result, Conversation)] == [
            ["a\n"],
            ["c"],
        ]


def test_a_csv_cell_may_hold_json(tmp_path: Path) -> None:
    put_pictures(tmp_path)
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["q", "response", "pictures", "loss", "history"])
        rows.writerow(["What?", "[1, 2]", '["a.png"]', "[true, true]", '[["a", "b"]]'])
        rows.writerow(["What?", "b", "a.png", "", ""])
        rows.writerow(["What?", "b", "", "", ""])
        rows.writerow(["What?", "b", '["a.png"', "", ""])
        rows.writerow(["What?", "b"])
    first, second, third, bad, short = read(
        tmp_path / "rows.csv", columns={"q": "query", "pictures": "images"}
    )
    assert isinstance(first, Conversation) and first.loss == (True, True) and len(first.pictures) == 1
    assert told(first)[-1] == ("assistant", ["[1, 2]"])
    assert isinstance(second, Conversation) and len(second.pictures) == 1
    assert isinstance(third, Conversation) and third.pictures == ()
    assert isinstance(bad, Fault) and (bad.kind, bad.origin.line) == (FaultKind.BAD_JSON, 5)
    assert isinstance(short, Fault) and (short.kind, short.origin.line) == (FaultKind.BAD_FILE, 6)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.txt", b"{}", 1),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}\n', 2),
        ("rows.json", b'[{"prompt": "a", "completion": "b"},\n {"prompt": }]', 2),
        ("rows.json", b'[{"prompt": "a", "completion": "b"}\n {}]', 2),
        ("rows.json", b'[{"prompt": "a", "completion": "b"}', 1),
        ("rows.json", b'{"data": []}', 1),
        ("rows.json", b"[\n\xff]", 2),
        ("rows.csv", b'prompt,completion\na,b\n"a', 3),
        ("rows.csv", b"prompt,completion\n\xff,b\n", 2),
    ],
)  # fmt: skip
def test_a_broken_file_is_a_fault_with_its_line(tmp_path: Path, name: str, content: bytes, line: int) -> None:
    (tmp_path / name).write_bytes(content)
    faults = [item for item in read_rows(tmp_path / name) if isinstance(item, Fault)]
    assert [found.origin.line for found in faults] == [line]
    assert faults[0].kind in (FaultKind.BAD_FILE, FaultKind.BAD_JSON)


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "none.jsonl")
    assert isinstance(found, Fault) and found.kind == FaultKind.BAD_FILE


def test_parquet_asks_for_pyarrow_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (found,) = read(tmp_path / "rows.parquet")
    assert isinstance(found, Fault) and "pip install pyarrow" in found.complaint.fix


def test_parquet_rows_are_numbered_and_may_hold_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = {"bytes": png(), "path": None}
    batches = [
        [{"prompt": "a", "completion": "b", "images": [image]}],
        [{"prompt": "c", "completion": "d", "images": None}],
    ]
    file = SimpleNamespace(
        iter_batches=lambda batch_size: [
            SimpleNamespace(to_pylist=lambda rows=rows: rows) for rows in batches
        ]
    )
    module = SimpleNamespace(ParquetFile=lambda path: file)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=module))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    rows = [row for row in read_rows(tmp_path / "rows.parquet") if isinstance(row, Row)]
    assert [row.origin.line for row in rows] == [1, 2]
    conversations = read(tmp_path / "rows.parquet")
    assert [len(item.pictures) for item in conversations if isinstance(item, Conversation)] == [1, 0]


# ---- rows of no sense

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["<image>", "user", "assistant", "tool", "data:,", "/", "..", "a.png", "text", "image_url"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["role", "content", "from", "value", "type", "text", "image_url", "url", "tool_calls", "function", "loss"]
    ), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def inner(value: object) -> list[object]:
    """The lists and objects directly in a JSON value."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, dict | list)]


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("junk")
    put_pictures(folder)
    return folder


@given(name=st.sampled_from(sorted(ROWS)), data=st.data())
@settings(max_examples=60)
def test_no_row_ends_the_check(
    with_pictures: Path, processor: Processor, name: str, data: st.DataObject
) -> None:
    kind, row = ROWS[name]
    broken = place = json.loads(json.dumps(row))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.sampled_from(inner(place))) if inner(place) else place
    if isinstance(place, dict) and place:
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JUNK)
    elif isinstance(place, list):
        place.append(data.draw(JUNK))
    first, second = read(write(with_pictures, broken, row), kind=kind)
    assert isinstance(second, Conversation)
    if isinstance(first, Conversation):
        RowCheck(processor).complaints(first)
        assert len(first.digest()) == 64
    else:
        assert first.complaint.expected


# ---- pictures


def test_pictures_stay_closed_until_they_are_needed(tmp_path: Path) -> None:
    put_pictures(tmp_path)
    conversation = one(tmp_path, ROWS["sharegpt"][1])
    (tmp_path / "a.png").unlink()
    assert len(conversation.blank_messages()) == 5
    with pytest.raises(RowRejected):
        conversation.messages()


def _cmyk(path: Path) -> None:
    picture(3, 64, 48).convert("CMYK").save(path, "JPEG")


def _large_jpeg(path: Path) -> None:
    picture(3, 1600, 1200).save(path, "JPEG")


def _clear(path: Path) -> None:
    image = picture(3, 64, 48).convert("RGBA")
    image.putalpha(100)
    image.save(path, "PNG")


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(3, 64, 48).save(path, "JPEG", exif=exif)


def _sixteen_bits(path: Path) -> None:
    Image.linear_gradient("L").convert("I").point(lambda value: value * 257).convert("I;16").save(path, "PNG")


@pytest.mark.parametrize("save", [_cmyk, _large_jpeg, _clear, _turned, _sixteen_bits])
def test_a_picture_is_decoded_as_the_server_decodes_it(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "a.bin")
    budget = 200_000
    ours = PictureRoot(tmp_path, base_max_pixels=budget).refer("a.bin", "images")
    image = ours.open().image
    served = decode(open_image((tmp_path / "a.bin").read_bytes(), 10**8), budget)
    assert (image.size, image.tobytes()) == (served.size, served.tobytes())
    if save is _turned:
        assert ours.size() == image.size == (48, 64)


def test_the_server_s_limits_are_ours() -> None:
    assert (pictures.LOW_MIN_PIXELS, pictures.LOW_MAX_PIXELS) == (media.LOW_MIN_PIXELS, media.LOW_MAX_PIXELS)
    assert pictures.MAX_ASPECT_RATIO == MAX_ASPECT_RATIO


def test_a_data_url_and_a_file_of_the_same_bytes_are_the_same_picture(tmp_path: Path) -> None:
    put_pictures(tmp_path)
    root = PictureRoot(tmp_path)
    assert root.refer(data_url(png()), "x").digest() == root.refer("a.png", "x").digest()
    assert json.dumps(data_url(png())) not in repr(root.refer(data_url(png()), "x"))


def test_another_encoding_or_separator_is_named_once(tmp_path: Path) -> None:
    text = '{"prompt": "a", "completion": "b"}\n'
    (tmp_path / "rows.jsonl").write_bytes((text * 9).encode("utf-16"))
    (fault,) = DataFile(tmp_path / "rows.jsonl")
    assert isinstance(fault, Fault) and fault.kind == FaultKind.BAD_FILE
    (tmp_path / "rows.csv").write_text("prompt;completion\na;b\n", encoding="utf-8")
    (fault,) = DataFile(tmp_path / "rows.csv")
    assert isinstance(fault, Fault) and "not by semicolons" in str(fault)


def test_a_format_that_was_named_is_not_said_to_be_of_the_rows_before(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (fault,) = DataFile(tmp_path / "rows.jsonl", kind=Format.ALPACA)
    assert isinstance(fault, Fault)
    assert "alpaca, as was asked for; fix: name the format prompt_completion, or none" in str(fault)
