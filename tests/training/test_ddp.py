"""Several processes make the adapter that one makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training import launched
from training.loop.runlog import read_log

ROOT = Path(__file__).parents[2]
# without MPI, --cpu starts one process whatever --num_processes says; --multi_gpu starts them, on CPUs by this word
ENVIRONMENT = {
    **os.environ,
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),
}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_make_the_adapter_of_one_and_the_first_alone_writes(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]  # fmt: skip
    command = [sys.executable, *launcher, "-m", "tests.training.launched", str(together)]
    started = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    launched.main(alone)
    _, said = started.communicate(timeout=110)
    assert started.returncode == 0, said[-3000:]
    one = load_file(alone / "adapter-0.safetensors")
    for index in (0, 1):
        two = load_file(together / f"adapter-{index}.safetensors")
        assert two.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    heard_alone = json.loads((alone / "heard-0.json").read_text())
    heard = [json.loads((together / f"heard-{index}.json").read_text()) for index in (0, 1)]
    assert heard[0]["losses"] == heard[1]["losses"] == pytest.approx(heard_alone["losses"], rel=1e-5)
    assert heard[0]["norms"] == heard[1]["norms"] == pytest.approx(heard_alone["norms"], rel=1e-4)
    assert heard[0]["labels"] == heard[1]["labels"] == heard_alone["labels"]
    assert heard[0]["evals"] == heard[1]["evals"]
    for (loss, scores), (loss_alone, scores_alone) in zip(
        heard[0]["evals"], heard_alone["evals"], strict=True
    ):
        assert loss == pytest.approx(loss_alone, rel=1e-5) and scores == scores_alone
    assert heard[0]["hooked"] == heard_alone["hooked"] == [2, 4, 5] and heard[1]["hooked"] == []
    assert "accumulation is 3 micro-batches a step" in heard[0]["uneven"] == heard[1]["uneven"]
    steps = [event["step"] for event in read_log(together / "log.jsonl") if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5]
