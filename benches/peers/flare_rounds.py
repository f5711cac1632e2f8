"""Whole rounds of NVIDIA FLARE: its simulator, with a process for each client and FedAvg for the server.

flare_rounds.py BYTES CLIENTS ROUNDS THREADS OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from flare_timer import RoundTimer
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.utils.constants import FrameworkType
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner


def main() -> None:
    """Runs the rounds and writes what the server saw."""
    size_bytes, clients, rounds, _threads = map(int, sys.argv[1:5])
    out = Path(sys.argv[5])
    first_model, seen = Path("first.npy").resolve(), Path("rounds.jsonl").resolve()
    np.save(first_model, np.zeros(size_bytes // 4, np.float32))
    job = FedJob(name="peers")
    job.to_server(NPModelPersistor(source_ckpt_file_full_name=str(first_model)), id="persistor")
    job.to_server(FedAvg(num_clients=clients, num_rounds=rounds, persistor_id="persistor"))
    job.to_server(RoundTimer(str(seen)), id="round_timer")
    job.to_clients(
        ScriptRunner(
            script="flare_client.py", framework=FrameworkType.NUMPY, server_expected_format=ExchangeFormat.NUMPY
        )
    )
    code = job.simulator_run(str(Path("workspace").resolve()), n_clients=clients, threads=clients)
    if code:
        raise SystemExit(f"FLARE's simulator ended with code {code}")
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    for number, line in enumerate(lines, start=1):
        if line["size"] != size_bytes // 4 or line["low"] != line["high"]:
            raise SystemExit(f"the new model of round {number} is not what it should be: {line}")
    out.write_text(
        json.dumps({"rounds": [line["seconds"] for line in lines], "means": [line["low"] for line in lines]})
    )


if __name__ == "__main__":
    main()
