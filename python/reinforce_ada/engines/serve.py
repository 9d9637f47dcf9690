"""`reinforce-ada serve`: start vLLM servers on this machine with the settings that `--engine openai` needs, and restart those that die."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from reinforce_ada import machine
from reinforce_ada.config.serving import PORTS, Serving
from reinforce_ada.config.values import check_fields
from reinforce_ada.engines.fleet import FIRST_BACKOFF_S, LONGEST_BACKOFF_S
from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import one_line

_LOOK_EVERY_S, _LOOK_S = 0.5, 5.0
_END_S = 15.0  # the time that a server has to end by itself


def command_of(serving: Serving, i: int) -> list[str]:
    """Return the command of replica `i`, with logprobs of the sampling distribution and the interface that loads weights."""
    dtype = machine.native_dtype(serving.device) if serving.dtype == "auto" else serving.dtype
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", serving.model),
        *("--host", serving.host, "--port", str(serving.port + i), "--dtype", dtype, "--seed", "0"),
        *("--max-model-len", str(serving.max_model_len), "--max-num-seqs", str(serving.max_num_seqs)),
        *("--max-num-batched-tokens", str(max(8192, serving.max_model_len)), "--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm"),  # otherwise it samples with the top_k and the penalties of the model's folder
        "--enable-prompt-tokens-details",  # reports how many tokens came from the prefix cache
    ]
    if serving.device == "cuda":
        command += ["--gpu-memory-utilization", str(serving.memory_fraction), "--tensor-parallel-size", str(serving.tensor_parallel)]
    else:  # the reasons are in VllmEngine
        command += ["--kv-cache-memory-bytes", str(serving.kv_cache_mb << 20), "--block-size", "32", "--enforce-eager"]
        command += ["--no-enable-chunked-prefill"]
    return command + list(serving.extra)


def environment_of(serving: Serving, i: int) -> dict[str, str]:
    """Return the environment of replica `i`: development mode (/collective_rpc, /reset_prefix_cache), and GPUs or cores of its own."""
    changes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if Path(serving.model).exists():
        changes["HF_HUB_OFFLINE"] = "1"
    if serving.device == "cuda":
        first, last = i * serving.tensor_parallel, (i + 1) * serving.tensor_parallel
        visible = _visible_gpus()
        changes["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, last)) if visible is None else visible[first:last])
    elif serving.replicas > 1:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[i * len(cores) // serving.replicas : (i + 1) * len(cores) // serving.replicas] or [cores[i % len(cores)]]
        changes["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own))
    return {**os.environ, **changes}


def _visible_gpus() -> list[str] | None:
    """Return the entries of CUDA_VISIBLE_DEVICES (numbers, GPU- and MIG-UUIDs) up to the first invalid one, as CUDA does; None: all."""
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is None:
        return None
    entries = [entry.strip() for entry in inherited.split(",")]
    named = [bool(re.fullmatch(r"\d+|(GPU|MIG)-\S+", entry)) for entry in entries]
    return entries[: named.index(False)] if False in named else entries


# "Value error, ..": what pydantic prints below its own error, which only counts the mistakes.
_REASON = re.compile(r"(\b[A-Z]\w*(Error|Exception):|\berror:|\bValue error,) .*")
_NO_REASON = "See root cause above"


class Server:
    """One server process, and the time of its next start."""

    def __init__(self, url: str, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.url, self._command, self._environment, self.log = url, command, environment, log
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.was_ready = False
        self.started = self.next_start = 0.0
        self.num_failures = 0
        self._log_begins = 0

    def start(self) -> None:
        """Start the process in its own session, so that its children can be ended with it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
        self.ready, self.started = False, time.monotonic()

    def answers(self) -> bool:
        """Return whether /health answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=_LOOK_S) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def complaint(self) -> str:
        """Return why it ended: the last line of its log since its start that names an error, from the error's name on."""
        text = self.log.read_bytes()[self._log_begins :] if self.log.exists() else b""
        lines = text.decode(errors="replace").splitlines()
        reasons = [found[0] for line in lines if (found := _REASON.search(line)) and _NO_REASON not in line]
        said = reasons or [line for line in lines if line.strip()]
        return one_line(said[-1]) if said else "it said nothing"

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process and its children."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, how)


def serve(serving: Serving, say: Callable[[str], None], *, command: Callable[[int], Sequence[str]] | None = None) -> None:
    """Start the servers, print when they are ready, and restart those that die. When interrupted, end all of them.

    Args:
        command: the command of replica i, instead of vLLM's.
    Raises: InputError when a port is taken, vLLM is not installed, or a server ends before it was ever ready.
    """
    check(serving, needs_vllm=command is None)
    serving = replace(serving, device=machine.device_of(serving.device))  # type: ignore[arg-type]
    command = command or partial(command_of, serving)
    servers = [
        Server(serving.url(i), command(i), environment_of(serving, i), serving.logs / f"{serving.port + i}.log")
        for i in range(serving.replicas)
    ]
    # Both signals: a shell without job control starts background processes with SIGINT ignored.
    before = {how: signal.signal(how, signal.default_int_handler) for how in (signal.SIGINT, signal.SIGTERM)}
    try:
        say(f"serve: starting {len(servers)} of {serving.model} on {serving.device}; logs in {serving.logs}/")
        if not _is_loopback(serving.host):
            say(f"serve: WARNING: whoever reaches {serving.host} can load weights and run code here; VLLM_API_KEY does not guard that")
        for server in servers:
            server.start()
        told = False
        while True:
            for server in servers:
                _look_after(server, say)
            if not told and all(s.ready for s in servers):
                told = True
                say(f"serve: all are ready: reinforce-ada train --engine openai --servers {','.join(s.url for s in servers)}")
            time.sleep(_LOOK_EVERY_S)
    finally:
        for how, handler in before.items():
            signal.signal(how, handler)
        _end_all(servers)


def check(serving: Serving, *, needs_vllm: bool = True) -> None:
    """Raise InputError for anything that cannot be served here."""
    check_fields("serve", serving)
    if serving.port + serving.replicas - 1 not in PORTS:
        raise InputError("serve", f"{serving.replicas} replicas from port {serving.port} on", f"a last port of at most {PORTS.most}")
    _check_host(serving)
    if needs_vllm:
        needs("serve", "vllm")
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    for port in range(serving.port, serving.port + serving.replicas):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((serving.host, port))
            except (OSError, OverflowError) as e:
                raise InputError("serve", f"port {port} on {serving.host}: {e}", "a free one", "--port names the first of them") from e
    _check_gpus(serving)


def _check_host(serving: Serving) -> None:
    """Refuse a host that others reach, unless `expose`: they can load weights and run methods of vLLM, as the key guards /v1 only."""
    for word in serving.extra:
        flag = word.split("=")[0].replace("_", "-")
        if len(flag) > 3 and any(name.startswith(flag) for name in ("--host", "--port", "--uds")):
            raise InputError("serve", f"{one_line(flag)} among the arguments for vLLM", "--host and --port of serve itself")
    if not (serving.expose or _is_loopback(serving.host)):
        raise InputError(
            "serve", f"host {serving.host}: whoever reaches it can load weights and run code, with no key", "127.0.0.1",
            "--expose allows it on a network where everyone is trusted; an ssh tunnel needs no such trust",
        )  # fmt: skip


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_gpus(serving: Serving) -> None:
    visible = _visible_gpus()
    needed = serving.replicas * serving.tensor_parallel
    if machine.device_of(serving.device) == "cuda" and visible is not None and len(set(visible)) < needed:
        given = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} for {serving.replicas} x {serving.tensor_parallel} GPUs"
        raise InputError("serve", given, f"{needed} different ones", "lower --replicas or --tensor-parallel")


def _look_after(server: Server, say: Callable[[str], None]) -> None:
    now = time.monotonic()
    if server.process is None:
        if now >= server.next_start:
            server.start()
            say(f"serve: {server.url} starts again")
        return
    code = server.process.poll()
    if code is None:
        if not server.ready and server.answers():
            server.ready = server.was_ready = True
            server.num_failures = 0
            say(f"serve: {server.url} is ready after {now - server.started:.0f} s")
        return
    reason = f"signal {-code}" if code < 0 else f"{server.complaint()} (exit {code})"
    server.end(signal.SIGKILL)  # the children that it has left
    if not server.was_ready:
        raise InputError(
            "serve", f"{server.url} ended before it was ready: {reason}", "a model and settings it can serve", f"see {server.log}"
        )
    pause = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**server.num_failures)
    server.process, server.ready = None, False
    server.num_failures += 1
    server.next_start = now + pause
    say(f"serve: {server.url} died: {reason}; again in {pause:.0f} s")


def _end_all(servers: Sequence[Server]) -> None:
    for how, wait_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
        running = [s for s in servers if s.process is not None and s.process.poll() is None]
        for server in running:
            server.end(how)
        deadline = time.monotonic() + wait_s
        for server in running:
            assert server.process is not None
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(max(0.0, deadline - time.monotonic()))
    for server in servers:
        server.end(signal.SIGKILL)  # children that outlived their parent


def split_arguments(text: str) -> list[str]:
    """Split the value of --vllm-args as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as e:
        raise InputError("serve", f"--vllm-args {text!r}: {e}", "arguments as a shell takes them") from e
