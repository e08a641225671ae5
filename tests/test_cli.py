"""The command line: what it sends, what it says, and that it answers before the heavy libraries are there.

A real HTTP server on a free port plays the remote side, so the client commands run unmodified.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from server.cli import app
from server.commands import fit as fits
from server.commands.check import skeleton
from server.commands.doctor import problems
from server.commands.hardware import Machine
from server.commands.serve import flags_command
from server.sources import describe

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "fastapi", "pydantic", "httpx2", "numpy", "PIL")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


# ---- the door


def test_help_answers_without_any_heavy_library() -> None:
    code = (
        "import sys, lorikeet\nsys.argv = ['lorikeet', '--help']\ntry: lorikeet.main()\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted(set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "adapters" in done.stdout
    assert loaded.isdisjoint(HEAVY)


def test_the_folder_of_the_entry_point_wins_over_a_stranger_named_adapters(tmp_path: Path) -> None:
    stranger = tmp_path / "adapters"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("raise RuntimeError('the wrong adapters package')")
    code = (
        "import sys, lorikeet\nsys.argv = ['lorikeet', '--help']\ntry: lorikeet.main()\nexcept SystemExit: pass\n"
        "import adapters; print('FOUND', adapters.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith(f"FOUND {ROOT / 'adapters' / '__init__.py'}"), done.stderr


def test_version_names_the_libraries_that_decide_the_numbers() -> None:
    shown = json.loads(run("version", "--json").stdout)
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= set(shown)


# ---- serve


def call_serve(*arguments: str) -> tuple[Mapping[str, object], Path | None]:
    import typer

    seen: list[tuple[Mapping[str, object], Path | None]] = []
    parser = typer.Typer()
    parser.command()(flags_command(lambda flags, config: seen.append((flags, config))))
    result = CliRunner().invoke(parser, list(arguments))
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_setting_is_a_flag_with_its_environment_name_in_the_help() -> None:
    text = run("serve", "--help").stdout
    words = text.replace(",", " ").replace("]", " ").split()
    for doc in describe():
        assert words.count(doc.environment) == 1, doc.name
        assert doc.flag in text, doc.name


def test_flags_that_were_not_given_are_not_passed_on() -> None:
    assert call_serve() == ({}, None)


def test_given_flags_arrive_under_the_settings_names() -> None:
    flags, config = call_serve(
        "--port",
        "9",
        "--adapter-root",
        "a,b",
        "--adapter-root",
        "c",
        "--no-load-on-demand",
        "--config",
        "x.toml",
    )
    assert flags == {"port": "9", "adapter_root": "a,b,c", "load_on_demand": False}
    assert config == Path("x.toml")


@pytest.mark.parametrize(
    "arguments", [("--prot", "9"), ("--port", "many"), ("--host", "0.0.0.0"), ("stray",)]
)
def test_serve_refuses_what_it_does_not_know_or_may_not_do(arguments: tuple[str, ...]) -> None:
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert arguments[0].removeprefix("--") in result.output


# ---- the commands that speak to a server


@dataclass(slots=True)
class Remote:
    """What a pretended server was asked, and what it answers to each `METHOD path`."""

    url: str
    replies: dict[str, tuple[int, bytes]]
    asked: list[tuple[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def remote() -> Iterator[Remote]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            line = f"{self.command} {self.path}"
            state.asked.append((line, json.loads(body) if body.startswith(b"{") else body or None))
            state.keys.append(self.headers.get("authorization"))
            status, content = state.replies.get(line, (404, b"not ours"))
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Remote(f"http://127.0.0.1:{server.server_port}", {})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


ENTRY = {
    "name": "json",
    "version": 2,
    "kind": "lora",
    "rank": 16,
    "targets": ["q_proj", "v_proj"],
    "tier": "device",
}


def ok(value: object) -> tuple[int, bytes]:
    return 200, json.dumps(value).encode()


def test_list_shows_a_row_for_each_adapter(remote: Remote) -> None:
    remote.replies["GET /v1/adapters"] = ok({"object": "list", "data": [ENTRY]})
    result = run("adapters", "list", "--url", remote.url)
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("json", "2", "lora", "16", "q_proj,v_proj", "device"))


def test_versions_shows_each_and_which_is_current(remote: Remote) -> None:
    record = {**ENTRY, "versions": [1, 2], "aliases": [], "digest": "ab" * 32}
    remote.replies["GET /v1/adapters"] = ok({"data": [record]})
    for number in (1, 2):
        shown = {
            **record,
            "version": number,
            "current": number == 2,
            "aliases": ["prod"] if number == 1 else [],
        }
        remote.replies[f"GET /v1/adapters/json%40{number}"] = ok(shown)
    lines = run("adapters", "versions", "json", "--url", remote.url).stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["1", "no", "prod"], ["2", "yes", "-"]]
    document = json.loads(run("adapters", "versions", "json", "--json", "--url", remote.url).stdout)
    assert [version["current"] for version in document["versions"]] == [False, True]
    assert run("adapters", "versions", "nobody", "--url", remote.url).exit_code == 1


def test_promote_and_rollback_send_what_was_asked(remote: Remote) -> None:
    remote.replies["POST /v1/adapters/acme%2Fjson/promote"] = ok(ENTRY)
    remote.replies["POST /v1/adapters/acme%2Fjson/rollback"] = ok(ENTRY)
    for arguments in (
        ("promote", "acme/json", "2"),
        ("promote", "acme/json", "sha256:0a1b2c3d", "--no-load"),
    ):
        assert run("adapters", *arguments, "--url", remote.url).exit_code == 0
    for more in ((), ("--no-load",)):
        assert run("adapters", "rollback", "acme/json", *more, "--url", remote.url).exit_code == 0
    assert [body for _, body in remote.asked] == [
        {"version": "2"},
        {"version": "sha256:0a1b2c3d", "load": False},
        {},
        {"load": False},
    ]


def test_aliases_are_set_listed_and_removed(remote: Remote) -> None:
    record = {"alias": "ft:prod", "target": "json@2", "before": ["json@1"]}
    remote.replies["PUT /v1/aliases/ft%3Aprod"] = ok(record)
    remote.replies["GET /v1/aliases"] = ok({"data": [record]})
    remote.replies["DELETE /v1/aliases/ft%3Aprod"] = ok({"alias": "ft:prod", "deleted": True})
    assert run("adapters", "alias", "set", "ft:prod", "json@2", "--url", remote.url).exit_code == 0
    assert remote.asked == [("PUT /v1/aliases/ft%3Aprod", {"target": "json@2"})]
    listed = run("adapters", "alias", "list", "--url", remote.url).stdout
    assert listed.splitlines()[1].split() == ["ft:prod", "json@2", "json@1"]
    assert json.loads(run("adapters", "alias", "list", "--json", "--url", remote.url).stdout)["data"] == [
        record
    ]
    assert run("adapters", "alias", "remove", "ft:prod", "--url", remote.url).exit_code == 0
    remote.replies["GET /v1/aliases"] = ok({"data": []})
    assert "alias set" in run("adapters", "alias", "list", "--url", remote.url).stdout


def test_profiles_are_shown_set_and_reset(remote: Remote, tmp_path: Path) -> None:
    effective = {
        "temperature": {"value": 0.2, "from": "adapter"},
        "stop": {"value": ["END"], "from": "package"},
        "max_tokens": {"value": None, "from": "default"},
    }
    record = {**ENTRY, "profile": {"temperature": 0.2}, "profile_from": {"temperature": "adapter"}}
    remote.replies["GET /v1/adapters/json"] = ok({**record, "effective": effective})
    remote.replies["PATCH /v1/adapters/json"] = ok(record)
    shown = run("adapters", "profile", "show", "json", "--url", remote.url).stdout.splitlines()
    assert [line.split() for line in shown[1:]] == [
        ["temperature", "0.2", "adapter"],
        ["stop", '["END"]', "package"],
        ["max_tokens", "-", "default"],
    ]
    document = run("adapters", "profile", "show", "json", "--json", "--url", remote.url).stdout
    assert json.loads(document) == effective
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    words = ["temperature=0.2", 'stop=["END"]', "stop=END", f"system_prompt=@{tmp_path / 'prompt.txt'}"]
    for word, value in zip(words, (0.2, ["END"], "END", "Be brief.\n"), strict=True):
        remote.asked.clear()
        assert run("adapters", "profile", "set", "json", word, "--url", remote.url).exit_code == 0
        assert remote.asked == [("PATCH /v1/adapters/json", {"profile": {word.partition("=")[0]: value}})]
    for fields, profile in (((), None), (("stop", "top_p"), {"stop": None, "top_p": None})):
        remote.asked.clear()
        assert run("adapters", "profile", "reset", "json", *fields, "--url", remote.url).exit_code == 0
        assert remote.asked == [("PATCH /v1/adapters/json", {"profile": profile})]
    assert run("adapters", "profile", "set", "json", "temperature", "--url", remote.url).exit_code == 2


def test_traffic_is_set_listed_shown_and_ended(remote: Remote) -> None:
    shadow = {"version": 4, "share": 0.1, "tokens_per_minute": None}
    record = {"alias": "prod", "target": "json@2", "shares": {"2": 0.95, "3": 0.05}, "sticky": "user"}
    remote.replies["PUT /v1/traffic/prod"] = ok({**record, "shadow": shadow})
    remote.replies["GET /v1/traffic"] = ok({"data": [{**record, "shadow": shadow}]})
    remote.replies["GET /v1/traffic/prod"] = ok({**record, "shadow": None})
    remote.replies["DELETE /v1/traffic/prod"] = ok({**record, "shadow": None})
    words = ("set", "prod", "2=95", "3=5", "--shadow", "4", "--share", "0.1", "--sticky", "header:x-id")
    assert run("adapters", "traffic", *words, "--url", remote.url).exit_code == 0
    assert remote.asked == [
        (
            "PUT /v1/traffic/prod",
            {
                "weights": {"2": 95.0, "3": 5.0},
                "sticky": "header:x-id",
                "shadow": {"version": 4, "share": 0.1},
            },
        )
    ]
    listed = run("adapters", "traffic", "list", "--url", remote.url).stdout.splitlines()
    assert listed[1].split() == ["prod", "json@2", "2:95%,3:5%", "user", "4:10%"]
    assert run("adapters", "traffic", "show", "prod", "--url", remote.url).stdout.split()[-1] == "-"
    assert json.loads(run("adapters", "traffic", "end", "prod", "--json", "--url", remote.url).stdout) == {
        **record,
        "shadow": None,
    }
    remote.replies["GET /v1/traffic"] = ok({"data": []})
    assert "traffic set" in run("adapters", "traffic", "list", "--url", remote.url).stdout
    assert run("adapters", "traffic", "set", "prod", "2", "--url", remote.url).exit_code == 2


def test_add_with_upload_sends_the_package_and_registers_it(remote: Remote, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin"):
        (tmp_path / name).write_bytes(name.encode())
    remote.replies["POST /v1/adapter-uploads"] = ok({"id": "up-1", "source": "upload:up-1"})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        remote.replies[f"PUT /v1/adapter-uploads/up-1/{name}"] = ok({"file": name})
    remote.replies["POST /v1/adapters"] = ok(ENTRY)
    result = run("adapters", "add", "json", str(tmp_path), "--upload", "--no-promote", "--url", remote.url)
    assert result.exit_code == 0, result.output
    assert remote.asked == [
        ("POST /v1/adapter-uploads", {}),
        ("PUT /v1/adapter-uploads/up-1/adapter_config.json", b"adapter_config.json"),
        ("PUT /v1/adapter-uploads/up-1/adapter_model.safetensors", b"adapter_model.safetensors"),
        ("POST /v1/adapters", {"name": "json", "source": "upload:up-1", "promote": False}),
    ]
    del remote.replies["PUT /v1/adapter-uploads/up-1/adapter_config.json"]
    assert run("adapters", "add", "json", str(tmp_path), "--upload", "--url", remote.url).exit_code == 1


def test_list_cuts_no_word_off_however_narrow_the_terminal(remote: Remote) -> None:
    name, targets = "a-team/a-long-name-of-an-adapter", [f"target_{i}" for i in range(30)]
    entry = {**ENTRY, "name": name, "targets": targets}
    remote.replies["GET /v1/adapters"] = ok({"object": "list", "data": [entry]})
    result = CliRunner().invoke(app, ["adapters", "list", "--url", remote.url], env={"COLUMNS": "40"})
    assert name in result.stdout
    assert ",".join(targets) in result.stdout


def test_the_address_may_end_as_openais_clients_want_it(remote: Remote) -> None:
    remote.replies["GET /v1/adapters"] = ok({"object": "list", "data": [ENTRY]})
    assert run("adapters", "list", "--url", f"{remote.url}/v1").exit_code == 0


def test_json_output_is_the_servers_own_document(remote: Remote) -> None:
    remote.replies["GET /v1/adapters"] = ok({"object": "list", "data": [ENTRY]})
    assert json.loads(run("adapters", "list", "--json", "--url", remote.url).stdout)["data"] == [ENTRY]


def test_a_name_with_a_slash_is_one_path_segment(remote: Remote) -> None:
    remote.replies["GET /v1/adapters/acme%2Fjson%402"] = ok(ENTRY)
    assert "q_proj,v_proj" in run("adapters", "show", "acme/json@2", "--url", remote.url).stdout


def test_add_sends_the_folder_as_an_absolute_path(remote: Remote, tmp_path: Path, monkeypatch: Any) -> None:
    remote.replies["POST /v1/adapters"] = ok(ENTRY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    result = run(
        "adapters", "add", "json", "mine", "--pin", "--no-load", "--sha256", "ab", "--url", remote.url
    )
    assert result.exit_code == 0
    body = {
        "name": "json",
        "source": str((tmp_path / "mine").resolve()),
        "sha256": "ab",
        "pin": True,
        "load": False,
    }
    assert remote.asked == [("POST /v1/adapters", body)]


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
def test_each_verb_posts_to_its_own_path(remote: Remote, verb: str) -> None:
    remote.replies[f"POST /v1/adapters/json/{verb}"] = ok({"name": "json"})
    assert run("adapters", verb, "json", "--url", remote.url).exit_code == 0


def test_remove_deletes(remote: Remote) -> None:
    remote.replies["DELETE /v1/adapters/json"] = ok({"id": "json", "deleted": True})
    assert run("adapters", "remove", "json", "--url", remote.url).exit_code == 0


def test_the_key_comes_from_the_environment(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.replies["GET /v1/adapters"] = ok({"data": []})
    monkeypatch.setenv("LORIKEET_URL", remote.url)
    monkeypatch.setenv("LORIKEET_API_KEY", "sesame")
    assert run("adapters", "list").exit_code == 0
    assert remote.keys == ["Bearer sesame"]


def test_a_refusal_is_told_with_its_code_and_details(remote: Remote) -> None:
    error = {"message": "rank 128 is over 64", "code": "adapter_rejected", "details": ["q_proj"]}
    remote.replies["POST /v1/adapters"] = (422, json.dumps({"error": error}).encode())
    result = run("adapters", "add", "json", "/x", "--url", remote.url)
    assert result.exit_code == 1
    assert "rank 128 is over 64 [adapter_rejected]" in result.output
    assert "- q_proj" in result.output


def test_a_missing_or_wrong_key_is_told_by_the_option_that_gives_it(remote: Remote) -> None:
    error = {"message": "send the header Authorization", "code": "invalid_api_key"}
    remote.replies["GET /v1/adapters"] = (401, json.dumps({"error": error}).encode())
    assert "--api-key" in run("adapters", "list", "--url", remote.url).output


def test_a_server_that_is_not_there_is_named_and_not_a_traceback() -> None:
    result = run("adapters", "list", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "http://127.0.0.1:9" in result.output
    assert "Traceback" not in result.output


# ---- chat

CHAT = "POST /v1/chat/completions"


def frames(*pieces: str) -> bytes:
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces), {}]
    lines = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    return "".join([": keep-alive\n\n", *lines, "data: [DONE]\n\n"]).encode()


@pytest.fixture
def chatty(remote: Remote) -> Remote:
    remote.replies["GET /v1/models"] = ok({"data": [{"id": "lorikeet-pocket"}, {"id": "json"}]})
    remote.replies[CHAT] = (200, frames("A red ", "circle."))
    return remote


def asked(remote: Remote) -> list[Any]:
    return [body for line, body in remote.asked if line == CHAT]


def test_chat_writes_the_answer_and_asks_through_the_adapter(chatty: Remote) -> None:
    result = run("chat", "What is it?", "--adapter", "json", "--system", "Be brief.", "--url", chatty.url)
    assert result.stdout == "A red circle.\n"
    (body,) = asked(chatty)
    assert (body["model"], body["adapter"], body["stream"]) == ("lorikeet-pocket", "json", True)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_chat_sends_a_picture_as_a_data_url_before_the_text(chatty: Remote, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    run("chat", "What is it?", "--image", str(picture), "--url", chatty.url)
    parts = asked(chatty)[0]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    assert parts[0]["image_url"]["url"] == "data:image/png;base64,iVBORw=="


def test_compare_asks_each_adapter_the_same(chatty: Remote) -> None:
    result = run("chat", "What is it?", "--compare", "base,json", "--url", chatty.url)
    assert [body["adapter"] for body in asked(chatty)] == ["base", "json"]
    assert "base: A red circle." in result.stdout
    assert "json: A red circle." in result.stdout


def test_a_conversation_remembers_and_takes_commands(chatty: Remote) -> None:
    lines = "Hello.\n/adapter json\nAnd now?\n/reset\nWho?\n/quit\n"
    result = CliRunner().invoke(app, ["chat", "--url", chatty.url], input=lines)
    assert result.exit_code == 0
    assert [body["adapter"] for body in asked(chatty)] == ["base", "json", "json"]
    assert [len(body["messages"]) for body in asked(chatty)] == [1, 3, 1]


def test_an_error_in_the_stream_ends_the_command_with_its_message(chatty: Remote) -> None:
    chatty.replies[CHAT] = (
        200,
        b'data: {"error": {"message": "draining", "code": "draining"}}\n\ndata: [DONE]\n\n',
    )
    result = run("chat", "Hello.", "--url", chatty.url)
    assert result.exit_code == 1
    assert "draining [draining]" in result.output


def test_a_picture_that_is_not_there_is_named(chatty: Remote) -> None:
    result = run("chat", "Hello.", "--image", "/no/such.png", "--url", chatty.url)
    assert result.exit_code == 1
    assert "/no/such.png" in result.output


# ---- adapters check


def write_package(folder: Path, rank: int = 4) -> Path:
    name = "model.language_model.layers.0.self_attn.q_proj"
    linear = skeleton("pocket").get_submodule(name)
    width_in, width_out = int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.ones(rank, width_in),
        f"base_model.model.{name}.lora_B.weight": torch.ones(width_out, rank),
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_check_accepts_a_good_package_in_one_line(tmp_path: Path) -> None:
    result = run("adapters", "check", str(write_package(tmp_path / "good")))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("accepted: lora, rank 4")


def test_check_refuses_with_the_reason(tmp_path: Path) -> None:
    result = run(
        "adapters", "check", "--json", "--max-rank", "8", str(write_package(tmp_path / "big", rank=16))
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["reason"] == "rank_too_large"


def test_check_against_a_base_that_is_not_there_says_so(tmp_path: Path) -> None:
    result = run(
        "adapters", "check", "--base", str(tmp_path / "nothing"), str(write_package(tmp_path / "good"))
    )
    assert result.exit_code == 1
    assert "not checked" in result.stdout


# ---- doctor

PLAIN = Machine("Linux", "cpu", ("avx2",), 2, 16 * 10**9, 12 * 10**9, ())
ALL_ON = {
    "cuda": False,
    "bitsandbytes native": True,
    "cpu bf16": True,
    "cpu fused 4-bit": False,
    "triton": False,
}


def test_doctor_reports_as_json_and_its_status_says_whether_something_is_wrong() -> None:
    result = run("doctor", "--json")
    found = json.loads(result.stdout)
    assert {"machine", "versions", "fast_paths", "fits", "problems"} <= set(found)
    assert result.exit_code == (1 if found["problems"] else 0)


def test_doctor_shows_the_same_as_text() -> None:
    assert "Fast paths" in run("doctor").stdout


def test_doctor_finds_a_missing_quantisation_library() -> None:
    found = problems(PLAIN, {**ALL_ON, "bitsandbytes native": False})
    assert any("bitsandbytes" in problem.what and problem.fix for problem in found)


@pytest.mark.parametrize(
    ("shape", "linears", "nf4", "kv", "lora"),
    [(fits.SHAPES[0], 2.775e9, 1.431e9, 36_864, 59.9e6), (fits.SHAPES[1], 6.525e9, 3.366e9, 57_344, 80.7e6)],
    ids=["3B", "7B"],
)
def test_what_fits_follows_from_the_published_sizes(
    shape: fits.Shape, linears: float, nf4: float, kv: int, lora: float
) -> None:
    assert fits.language_parameters(shape) == pytest.approx(linears, rel=1e-3)
    assert fits.language_parameters(shape) * fits.NF4_BYTES == pytest.approx(nf4, rel=1e-3)
    assert fits.kv_bytes_per_token(shape) == kv
    assert 16 * fits.lora_width(shape) * 2 == pytest.approx(lora, rel=1e-3)


def test_a_memory_too_small_for_the_weights_fits_nothing() -> None:
    assert not fits.fit(fits.SHAPES[1], 4 * 10**9).does_fit
    assert fits.fit(fits.SHAPES[1], 80 * 10**9).does_fit
