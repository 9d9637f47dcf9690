"""`reinforce-ada serve` with scripted servers: ready, killed and started again, ended with it; and the commands for the real one."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from engine_scenes import refusal
from scripted_servers import answers, until

from reinforce_ada import machine
from reinforce_ada.cli import main
from reinforce_ada.engines import serve
from reinforce_ada.engines.serve import Serving

RUNNER = """
import sys
from pathlib import Path
from scripted_servers import command
from reinforce_ada.engines.serve import Serving, serve
port, logs, failing = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fails"
serving = Serving(model="scripted", replicas=2, port=port, logs=logs)
wrong = [sys.executable, "-c", "raise SystemExit('ValueError: no such model')"]
serve(serving, lambda line: print(line, flush=True), command=lambda i: wrong if failing and i else command(port + i))
"""


def two_free_ports() -> int:
    """The first of two that follow each other, below those that the system gives to the connections of other tests."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one, socket.socket() as two, suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port


def started(port: int, logs: Path, how: str = "") -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(port), str(logs), how], env={**os.environ, "PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell starts what runs in the background
    )  # fmt: skip


def pid_at(port: int) -> int:
    """Of the scripted server there, by its command line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and (folder / "cmdline").exists():
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"scripted_server.py" in b" ".join(words) and str(port).encode() in words:
                return int(folder.name)
    return 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_killed_servers_come_back_and_all_end_with_it(how: signal.Signals, tmp_path: Path) -> None:
    port = two_free_ports()
    urls = [f"http://127.0.0.1:{p}" for p in (port, port + 1)]
    process = started(port, tmp_path)
    said: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda out: said.extend(out), args=(process.stdout,), daemon=True)
    reader.start()
    try:
        until(lambda: any("all are ready" in line for line in said), "never ready")
        assert f"--servers {','.join(urls)}" in next(line for line in said if "all are ready" in line)
        first = pid_at(port + 1)
        os.kill(first, signal.SIGKILL)
        until(lambda: pid_at(port + 1) not in (0, first) and answers(urls[1]), "not started again")
        assert answers(urls[0])
    finally:
        process.send_signal(how)
        process.wait(20)
        reader.join()
        process.stdout.close()
    assert any(f"{urls[1]} died: signal 9; again in 1 s" in line for line in said)
    assert not any(answers(url) for url in urls)


def test_a_server_that_never_was_ready_ends_it(tmp_path: Path) -> None:
    port = two_free_ports()
    process = started(port, tmp_path, "fails")
    out, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "ended before it was ready: ValueError: no such model (exit 1)" in out
    assert not answers(f"http://127.0.0.1:{port}")


LOGS = {
    "nothing": ("", "it said nothing"),
    "no error": ("one\ntwo\n\n", "two"),
    "plain": ("INFO start\nValueError: no such model\n", "ValueError: no such model"),
    "an engine in another process": (
        "(EngineCore pid=7) ERROR 11-23 [core.py:1]     raise ValueError(\n"
        "(EngineCore pid=7) ERROR 11-23 [core.py:1] ValueError: 0.5 GiB KV cache is needed\n(EngineCore pid=7) Traceback:\n"
        "(APIServer pid=6)     raise RuntimeError(\n"
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
        "ValueError: 0.5 GiB KV cache is needed",
    ),
    "pydantic": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (9) is greater [type=value_error]\n    For further information visit\n",
        "Value error, User-specified max_model_len (9) is greater [type=value_error]",
    ),
    "argparse": ("usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --x\n", "error: unrecognized arguments: --x"),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_reason_in_a_log(name: str, tmp_path: Path) -> None:
    log, reason = LOGS[name]
    server = serve.Server("http://a", [], {}, tmp_path / "log")
    assert server.complaint() == "it said nothing"
    server.log.write_text(log)
    assert server.complaint() == reason


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refusal(lambda: serve.check(Serving(model="m", port=taken.getsockname()[1], logs=tmp_path), needs_vllm=False))
    assert "--port names the first of them" in said


def test_commands_and_cores() -> None:
    serving = Serving(model="folder", replicas=2, port=9000, extra=["--quantization", "fp8"])
    line = " ".join(serve.command_of(serving, 1))
    assert "--model folder" in line
    assert "--port 9001" in line
    assert "--logprobs-mode processed_logprobs" in line
    assert "--generation-config vllm" in line
    assert line.endswith("--quantization fp8")
    bound = [serve.environment_of(serving, i)["VLLM_CPU_OMP_THREADS_BIND"] for i in range(2)]
    cores = sorted(os.sched_getaffinity(0))
    assert set(",".join(bound).split(",")) == set(map(str, cores))
    on_gpus = Serving(model="folder", replicas=2, device="cuda", tensor_parallel=2)
    assert "--tensor-parallel-size 2" in " ".join(serve.command_of(on_gpus, 0))


def test_the_device_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --device the servers take what is there, and a GPU too few is refused as with --device cuda."""
    for is_there, name in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert [machine.device_of(given) for given in ("auto", "cpu", "cuda")] == [name, "cpu", "cuda"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    said = refusal(lambda: serve.check(Serving(model="m", replicas=2, port=two_free_ports()), needs_vllm=False))
    assert "CUDA_VISIBLE_DEVICES=4 for 2 x 1 GPUs" in said


# What is inherited, and what each of two servers with two GPUs gets of it; a text: what is said instead.
MIG = ("MIG-GPU-8f/1/0", "MIG-9a", "GPU-8f", "GPU-9a")
GPUS: dict[str | None, list[str] | str] = {
    None: ["0,1", "2,3"],
    "4,5,6,7": ["4,5", "6,7"],
    " 7, 6 ,1,0,3 ": ["7,6", "1,0"],
    ",".join(MIG): [",".join(MIG[:2]), ",".join(MIG[2:])],
    "4,5": "CUDA_VISIBLE_DEVICES=4,5 for 2 x 2 GPUs; 4 different ones; lower --replicas or --tensor-parallel",
    "4,5,4,5": "4 different ones",
    "0,1,2,-1,3": "4 different ones",  # CUDA reads up to the first that names none
    "": "CUDA_VISIBLE_DEVICES= for 2 x 2 GPUs; 4 different ones",
    "none": "4 different ones",
}


@pytest.mark.parametrize("inherited", GPUS)
def test_inherited_gpus_are_dealt_out(inherited: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    serving, expected = Serving(model="m", replicas=2, port=two_free_ports(), device="cuda", tensor_parallel=2), GPUS[inherited]
    if isinstance(expected, str):
        assert expected in refusal(lambda: serve.check(serving, needs_vllm=False))
        return
    serve.check(serving, needs_vllm=False)
    assert [serve.environment_of(serving, i)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == expected


LOOPBACK, REACHABLE = ("127.0.0.1", "127.0.0.2", "localhost"), ("0.0.0.0", "", "::", "10.0.0.5", "example.org", "127.0.0.1.example.org")


@pytest.mark.parametrize("host", [*LOOPBACK, *REACHABLE])
def test_only_this_machine_is_served_unless_it_is_said_aloud(host: str) -> None:
    def check(expose: bool = False) -> None:
        serve._check_host(Serving(model="m", host=host, expose=expose))

    if host in REACHABLE:
        assert "can load weights and run code, with no key; 127.0.0.1; --expose allows it" in refusal(check)
        check(expose=True)
    else:
        check()


@pytest.mark.parametrize("words", [["--host", "0.0.0.0"], ["--hos=0.0.0.0"], ["--port=1"], ["--uds", "/x"]])
def test_the_host_cannot_be_changed_behind_its_back(words: list[str]) -> None:
    for expose in (False, True):
        said = refusal(lambda expose=expose: serve.check(Serving(model="m", extra=words, expose=expose), needs_vllm=False))
        assert said == f"serve: {words[0].split('=')[0]} among the arguments for vLLM; --host and --port of serve itself"


NUMBERS = {
    "port": (0, -1, 65536, 10**30),
    "replicas": (0, -1, 1025),
    "max_model_len": (0, 1, 10**30),
    "max_num_seqs": (0, 65537),
    "tensor_parallel": (0, -2, 10**30),
    "memory_fraction": (0.0, -0.5, 1.5, math.nan, math.inf),
    "kv_cache_mb": (0, -1, 10**30),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name: str) -> None:
    for value in NUMBERS[name]:
        said = refusal(lambda value=value: serve.check(Serving(model="m", **{name: value}), needs_vllm=False))
        assert said.startswith(f"serve: {name} = {value}; ")
    assert set(NUMBERS) == {f.name for f in dataclasses.fields(Serving) if type(f.default) in (int, float)}


def test_the_last_port_is_one() -> None:
    said = refusal(lambda: serve.check(Serving(model="m", port=65535, replicas=2), needs_vllm=False))
    assert said == "serve: 2 replicas from port 65535 on; a last port of at most 65535"


def test_ipv6() -> None:
    assert Serving(model="m", host="::1").url(1) == "http://[::1]:8001"


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "smollm2", "--vllm-args", "'"]) == 2
    assert "arguments as a shell takes them" in capsys.readouterr().err
