"""Whole rounds of Flower in its simulation: Ray's processes for the clients, one thread for the server.

flower_rounds.py BYTES CLIENTS ROUNDS THREADS OUT.json
"""

import json
import os
import sys

from flower_apps import client_app, server_app
from flwr.simulation import run_simulation


def main() -> None:
    """Runs the rounds; the server app writes the result."""
    size_bytes, clients, rounds, threads = map(int, sys.argv[1:5])
    os.environ["PEERS_CASE"] = json.dumps(
        {"bytes": size_bytes, "clients": clients, "rounds": rounds, "out": sys.argv[5]}
    )
    run_simulation(
        server_app,
        client_app,
        num_supernodes=clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": threads, "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main()
