"""Whole rounds of Flower as it is deployed: a SuperLink and a SuperNode for each client, as processes that speak HTTP.

flower_deployed_rounds.py BYTES CLIENTS ROUNDS THREADS OUT.json
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_SECONDS = 60
APP = """\
[project]
name = "rounds"
version = "1.0.0"
description = "Rounds without training"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "peers"

[tool.flwr.app.components]
serverapp = "flower_apps:server_app"
clientapp = "flower_apps:client_app"
"""
CONFIG = """\
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until the SuperLink answers."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"flower-superlink ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"flower-superlink did not answer at {url} within {START_SECONDS} s")


def main() -> None:
    """Runs the rounds; the server app writes the result."""
    size_bytes, clients, rounds, _threads = map(int, sys.argv[1:5])
    out = Path(sys.argv[5])
    os.environ["PEERS_CASE"] = json.dumps({"bytes": size_bytes, "clients": clients, "rounds": rounds, "out": str(out)})
    programs = Path(sys.executable).parent
    # Flower starts its own programs by name.
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    app = Path("app")
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    shutil.copy(Path(__file__).parent / "flower_apps.py", app)
    link_port, *node_ports = free_ports(clients + 1)
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(CONFIG.format(port=link_port))

    link = subprocess.Popen(
        [
            programs / "flower-superlink",
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(link_port),
            "--disable-runtime-dependency-installation",
        ]
    )
    started = [link]
    try:
        wait_for(f"http://127.0.0.1:{link_port}/health", link)
        for index, port in enumerate(node_ports):
            started.append(
                subprocess.Popen(
                    [
                        programs / "flower-supernode",
                        "--insecure",
                        "--superlink",
                        f"127.0.0.1:{link_port}",
                        "--host",
                        "127.0.0.1",
                        "--port",
                        str(port),
                        "--node-config",
                        f"partition-id={index}",
                    ]
                )
            )
        # With --stream it stays until the run is over.
        follow = subprocess.Popen([programs / "flwr", "run", str(app), "here", "--stream"])
        while follow.poll() is None and not out.exists():
            for process in started:
                if process.poll() is not None:
                    raise SystemExit(f"one of Flower's processes ended with code {process.returncode}: {process.args}")
            time.sleep(0.2)
        if not out.exists():
            raise SystemExit(f"`flwr run` ended with code {follow.returncode} and the run left no result")
    finally:
        for process in started:
            process.terminate()


if __name__ == "__main__":
    main()
