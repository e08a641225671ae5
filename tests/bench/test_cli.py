"""The commands: the last line is JSON, and what is wrong is one line and status 2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.endpoint import Naming
from bench.serving import ServerDied, free_port, lorikeet_command, serve
from tests.bench.fake_sse import Script, fake_sse_server


@pytest.fixture
def server() -> Iterator[tuple[str, Script]]:
    with fake_sse_server() as found:
        yield found


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def asked(url: str, *more: str) -> tuple[str, ...]:
    return ("--url", url, "--model", "pocket", "--adapters", "a,b,c,d,e,f,g,h", "--size", "smoke", *more)


def test_a_run_ends_in_one_json_line_and_keeps_a_file(server: tuple[str, Script], tmp_path: Path) -> None:
    url, _ = server
    done = invoke("run", "closed-1", *asked(url, "--repeats", "2", "--against-base", "--out", str(tmp_path)))
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert [cell["workload"] for cell in last["cells"]] == ["closed-1", "closed-1"]
    assert last["cells"][0]["ratios"]["lorikeet, base only"]["num_pairs"] == 2
    (path,) = tmp_path.glob("run-*.json")
    assert "runs" in json.loads(path.read_text())["cells"][0]
    shown = invoke("report", str(path), "--markdown", "--plots", str(tmp_path / "plots"))
    assert shown.exit_code == 0 and "| lorikeet |" in shown.stdout
    assert len(list((tmp_path / "plots").iterdir())) == 4


def test_with_json_nothing_else_is_printed(server: tuple[str, Script], tmp_path: Path) -> None:
    done = invoke("run", "closed-1", *asked(server[0], "--repeats", "1", "--json", "--out", str(tmp_path)))
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_what_was_measured_before_the_end_came_is_kept(server: tuple[str, Script], tmp_path: Path) -> None:
    done = invoke("run", "closed-1", "storm", *asked(server[0], "--repeats", "1", "--out", str(tmp_path)))
    assert done.exit_code == 2 and "40" in done.output  # adapters, and there are eight
    (path,) = tmp_path.glob("run-*.json")
    assert [cell["workload"] for cell in json.loads(path.read_text())["cells"]] == ["closed-1"]


@pytest.mark.parametrize("naming", list(Naming))
def test_every_naming_can_be_chosen(server: tuple[str, Script], tmp_path: Path, naming: Naming) -> None:
    url, script = server
    arguments = asked(url, "--repeats", "1", "--naming", naming, "--label", "other", "--out", str(tmp_path))
    assert invoke("run", "closed-1", *arguments, "--json").exit_code == 0
    assert ("ignore_eos" in script.bodies[0]) == (naming not in (Naming.NONE, Naming.LLAMA))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "closed-9"), "no workload or scenario 'closed-9'"),
        (("run", "closed-1", "--size", "huge"), "no size 'huge'"),
        (("run", "closed-1", "--naming", "other", "--url", "http://127.0.0.1:9"), "other"),
        (("run", "closed-1", "--url", "http://127.0.0.1:9"), "does not list its models"),
        (("sweep", "closed-1", *asked("http://127.0.0.1:9")), "closed loop"),
        (("shapes", "13b", "nowhere"), "no shape '13b'"),
        (("adapters", "nowhere", "nowhere"), "nowhere"),
        (("report", "nowhere.json"), "cannot be read"),
        (("kernels", "--shape", "13b"), "no shape '13b'"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(arguments: tuple[str, ...], words: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr and done.stderr.startswith("lorikeet bench: ")


def test_a_run_without_an_answer_keeps_nothing(server: tuple[str, Script], tmp_path: Path) -> None:
    url, script = server
    script.fault = "status"
    done = invoke("run", "closed-1", *asked(url, "--out", str(tmp_path)))
    assert done.exit_code == 2 and "429" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_and_adapters_are_made(tmp_path: Path) -> None:
    assert invoke("shapes", "tiny", str(tmp_path / "tiny")).exit_code == 0
    made = invoke("adapters", str(tmp_path / "tiny"), str(tmp_path / "a"), "--count", "2", "--ranks", "2,4")
    assert "adapter-0000 to adapter-0001" in made.stdout
    again = invoke("shapes", "tiny", str(tmp_path / "tiny"))
    assert again.exit_code == 2 and "not empty" in again.stderr


def test_the_list_names_workloads_and_scenarios() -> None:
    lines = invoke("list").stdout.splitlines()
    assert len(lines) > 40
    assert any(line.startswith("slora-alpha0.3-cv1") for line in lines)
    assert any("scenario" in line for line in lines)


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    port = free_port()
    command = lorikeet_command("pocket", None, tmp_path, port, "--no-such-flag")
    with (
        pytest.raises(ServerDied, match="no-such-flag"),
        serve(command, f"http://127.0.0.1:{port}", tmp_path / "log"),
    ):
        pass


def test_a_command_that_is_told_to_end_leaves_no_server(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from bench.options import told\n"
        "from bench.serving import free_port, serve\n"
        "folder = Path(sys.argv[1])\n"
        "(folder / 'health').write_text('ok')\n"
        "port = free_port()\n"
        "command = (sys.executable, '-m', 'http.server', str(port), '--bind', '127.0.0.1', '-d', str(folder))\n"
        "with told(), serve(command, f'http://127.0.0.1:{port}', folder / 'log', ready='/health') as served:\n"
        "    print(served.pid, flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"  # a signal just before one long wait would be seen only after it
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        os.kill(pid, 0)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
