"""Flower's two apps, a server with FedAvg and a client that does not train; run in its simulation and as processes alike.

They take what to do from the environment, since both ways of running them hand that on: PEERS_CASE, a JSON object with
`bytes`, `clients`, `rounds` and `out`.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client_app = ClientApp()
server_app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that notes when it sends the model and when it has the next one."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.clients = clients
        self.seconds: list[float] = []
        self.means: list[float] = []

    def configure_train(self, *args: object, **kwargs: object) -> Iterable[Message]:
        """The round begins."""
        self.begun = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round ends with the new model; what it is made of is looked at after the clock."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.begun)
        good = sum(not reply.has_error() for reply in replies)
        if good != self.clients or arrays is None:
            raise RuntimeError(f"{good} of {self.clients} clients answered in round {server_round}")
        values = arrays["model"].numpy()
        if values.min() != values.max():
            raise RuntimeError(f"the model of round {server_round} is not even: {values.min()} to {values.max()}")
        self.means.append(float(values[0]))
        return arrays, metrics


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Answers the model with an update of its size."""
    index = int(context.node_config["partition-id"])
    model = message.content["arrays"]["model"].numpy()
    answer = RecordDict(
        {
            "arrays": ArrayRecord({"model": Array(np.full(model.size, index + 1, np.float32))}),
            "metrics": MetricRecord({"num-examples": 100 + index}),
        }
    )
    return Message(answer, reply_to=message)


@server_app.main()
def serve(grid: Grid, _context: Context) -> None:
    """Runs the rounds and writes what the server saw."""
    case = json.loads(os.environ["PEERS_CASE"])
    strategy = TimedFedAvg(case["clients"])
    model = ArrayRecord({"model": Array(np.zeros(case["bytes"] // 4, np.float32))})
    strategy.start(grid=grid, initial_arrays=model, num_rounds=case["rounds"])
    Path(case["out"]).write_text(json.dumps({"rounds": strategy.seconds, "means": strategy.means}))
