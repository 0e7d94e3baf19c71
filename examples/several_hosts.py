"""Answers prompts with a model that is split over the devices of several hosts: each host runs this program.

    python examples/several_hosts.py MODEL STORE < prompts.jsonl

The launcher says how the processes find each other: under SLURM (`several_hosts.sbatch`) JAX asks SLURM, under
Kubernetes (`several_hosts.yaml`) the environment has COORDINATOR, PROCESSES and PROCESS. A line of input is
{"prefix": …, "chunks": […], "suffix": …}; every process reads the same lines, and the first one prints the answers.
"""

from __future__ import annotations

import json
import os
import sys

import jax


def connect() -> None:
    """Connects the processes: the library never does."""
    if "COORDINATOR" in os.environ:
        processes, process = int(os.environ["PROCESSES"]), int(os.environ["PROCESS"])
        jax.distributed.initialize(os.environ["COORDINATOR"], processes, process)
    else:
        jax.distributed.initialize()


def main(model_path: str, store_path: str) -> None:
    """Answers the prompts of the input; every process runs the same."""
    import cacheblend_jax as cb  # after `connect`: some imports look at the devices

    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=automatic)
    model = cb.load_model(model_path, mesh=mesh)
    with cb.ChunkStore(store_path) as store, cb.Engine(model, store) as engine:
        for line in sys.stdin:
            answer = engine.generate(cb.Prompt(**json.loads(line)), max_new_tokens=128)
            if jax.process_index() == 0:
                print(answer.text, flush=True)


if __name__ == "__main__":
    connect()
    main(*sys.argv[1:])
