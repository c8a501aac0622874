"""A real training script, as a user would write it: DDP on scikit-learn's digits, every rank logging.

Beside ranklog it keeps its own proof of what `log()` returned for: a line per record, written with one write(2) after
the call, in a file per rank and attempt. With KILL_RANK and KILL_STEP that rank kills itself once, on its first attempt.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

import ranklog

rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
proof = os.open(Path(sys.argv[1]) / f"{rank}.{attempt}.proof", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
steps = int(sys.argv[2])

torch.manual_seed(rank)
torch.set_num_threads(1)
# A rendezvous file for each attempt: gloo after a restart may find the addresses of the attempt before in the agent's
# store and connect to nobody, with or without ranklog.
meeting = f"file://{Path(sys.argv[1]).absolute()}.{attempt}.rendezvous"
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
digits = load_digits()
images = torch.tensor(digits.data[rank :: dist.get_world_size()] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target[rank :: dist.get_world_size()])
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

ranklog.init(project="digits", config={"lr": 0.3, "batch": 64})
for step in range(steps):
    began = time.perf_counter()
    batch = torch.randint(len(images), (64,))
    loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    took = time.perf_counter() - began
    ranklog.log({"loss": loss, "grad_norm": norm, "step_time": took}, step=step)
    os.write(proof, f"{step} {loss.item().hex()} {norm.item().hex()} {took.hex()}\n".encode())
    if attempt == 0 and os.environ.get("KILL_RANK") == str(rank) and step == int(os.environ["KILL_STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)
ranklog.finish()
dist.destroy_process_group()
