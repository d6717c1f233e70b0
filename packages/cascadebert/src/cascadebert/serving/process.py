"""The process that serves: its options, its socket, its start and its end."""

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from octavo.errors import ConfigError

from cascadebert.cascade import Cascade
from cascadebert.config import ServeConfig
from cascadebert.policy import Policy
from cascadebert.serving.routes import Gate, Service, make_app

log = logging.getLogger(__name__)

#: Seconds that answers get to reach callers who are slow to read them when the process ends.
FLUSH = 5

#: Seconds after the last answer in which new connections, then open ones, are still refused politely.
LINGER = 0.5


def check_serve(config: ServeConfig) -> str:
    """Refuse options that cannot be, and read the key.

    Returns:
        What callers must send; empty where no key is asked for.

    Raises:
        ConfigError: an option is out of range, the key cannot be read, or the extra is missing.
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(name)]
    if missing:
        raise ConfigError(
            f'{", ".join(missing)} not installed; run pip install "cascadebert[serve]"'
        )
    bounds = {
        "port": (0, 65535), "max_wait": (0, 60_000), "max_queue": (1, math.inf),
        "max_items": (1, config.max_queue), "max_body": (1, math.inf), "deadline": (1e-3, 86_400),
        "shed_at": (0, math.inf), "shed_floor": (1e-6, 1 - 1e-6), "drain": (0, 86_400),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if not least <= value <= most:
            reach = f"from {least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be {reach}")
    names = [path.stem for path in config.policy]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"--policy: two files are named {name}; operating points need two names"
            )
    if config.api_key_file is None:
        return ""
    try:
        key = config.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"--api-key-file {config.api_key_file}: {why}") from None
    if not key:
        raise ConfigError(f"--api-key-file {config.api_key_file}: is empty")
    return key


def load_policies(cascade: Cascade, paths: Sequence[Path]) -> dict[str, Policy]:
    """Policies by the stems of their files' names, each checked against the cascade.

    Raises:
        ConfigError: one is missing, broken, or made for others.
    """
    return {path.stem: Policy.load(path, cascade.hashes, cascade.backend) for path in paths}


def run_service(
    load: Callable[[], Cascade], policies: Sequence[Path], config: ServeConfig, threads: int = 0
) -> None:
    """Listen until SIGTERM or SIGINT, then finish what was taken.

    Args:
        load: makes the cascade; it runs while the process already answers /healthz.
        policies: files of the operating points, the default first.
        config: how it listens, batches and sheds load.
        threads: of a stage's computing; by default the stages share PyTorch's number among them.

    Raises:
        ConfigError: an option or a policy is wrong, or the address is taken.
    """
    key = check_serve(config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        where = f"--host {config.host} --port {config.port}"
        raise ConfigError(f"{where}: {error.strerror or error}; choose another") from None
    if config.host not in ("127.0.0.1", "::1", "localhost") and not key:
        log.warning("anyone who reaches %s may call: no --api-key-file", config.host)

    def prepare() -> tuple[Cascade, dict[str, Policy]]:
        cascade = load()
        chosen = load_policies(cascade, policies)
        if not threads:  # the stages compute at the same time, and would fight for all cores each
            torch.set_num_threads(max(1, torch.get_num_threads() // len(cascade.stages)))
        return cascade, chosen

    asyncio.run(_serve(listener, prepare, Service(config, key)))


async def _serve(
    listener: socket.socket,
    prepare: Callable[[], tuple[Cascade, dict[str, Policy]]],
    service: Service,
) -> None:
    import uvicorn

    gate = Gate(make_app(service), service)
    options = uvicorn.Config(
        gate, log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        timeout_graceful_shutdown=FLUSH,
    )  # fmt: skip
    server = uvicorn.Server(options)
    # Its own handlers would refuse callers while calls are finished, and then die of the signal.
    setattr(server, "capture_signals", nullcontext)  # noqa: B010
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled(*_: Any) -> None:
        loop.call_soon_threadsafe(hurry.set if stop.is_set() else stop.set)

    previous = {sign: signal.signal(sign, signalled) for sign in (signal.SIGTERM, signal.SIGINT)}
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await service.open(*await asyncio.to_thread(prepare))
        log.info("ready")
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping; calls that were taken get %g seconds", service.config.drain)
        await service.close(hurry)
        # Who comes at the last moment is told why too; a closed door would cut the call short.
        with suppress(TimeoutError):
            await asyncio.wait_for(hurry.wait(), LINGER)
        for listening in getattr(server, "servers", []):
            listening.close()
        end = loop.time() + LINGER
        while server.server_state.connections and loop.time() < end and not hurry.is_set():
            await asyncio.sleep(0.01)
    finally:
        server.should_exit = True
        await serving
        for sign, handler in previous.items():
            signal.signal(sign, handler)
