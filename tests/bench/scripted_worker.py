"""A worker that follows a script instead of running models: real processes that start at once.

Arguments: the file of `backbones.bench.protocol` (importing the package would import torch) and a
JSON file: by model name, ``does`` (what goes wrong), ``ms`` (of a call), ``log`` (a file), and
``facts`` that differ.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

spec = importlib.util.spec_from_file_location("protocol", sys.argv[1])
protocol = importlib.util.module_from_spec(spec)
spec.loader.exec_module(protocol)
script = json.loads(Path(sys.argv[2]).read_text())

print("printed before the channel was taken")
sys.stdout.flush()
os.write(1, b"an unfinished line ")
channel = protocol.Channel()


def log(word):
    if "log" in part:
        with open(part["log"], "a") as stream:
            stream.write(f"{name} {word} {os.getpid()} {time.time()}\n")


def reply_to_turn():
    log("begins")
    print("printed by Python")
    os.write(1, b"written to the descriptor\n")
    subprocess.run([sys.executable, "-S", "-c", "print('printed by a child of the child')"])
    time.sleep(part.get("sleep", 0))
    log("ends")
    ms = part.get("ms", 1.0)
    times = {"ms": [ms, ms * 1.01, ms], "wall_s": 0.02, "cpu_s": 0.02}
    channel.send({**times, "idle_s": 1.0, "idle_cpu_s": part.get("spins", 0.0)})


request = channel.receive()
if request["do"] == "matmul":
    channel.send({"gmacs": {"fp32": 100.0}, "cores": float(request["threads"])})
    channel.receive()
    channel.send({"peak_mib": 1.0})
    sys.exit()
name = request["model"]["name"]
part = script.get(name, {})
log("starts")
does = part.get("does")
if does == "refuse":
    channel.send({"error": "this engine cannot do that", "kind": "UnsupportedError"})
    sys.exit(1)
if does == "die":
    print("the reason of its death", file=sys.stderr)
    sys.stderr.flush()
    os.abort()
if does == "hang":
    grandchild = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    log(f"spawned-{grandchild.pid}")
    time.sleep(600)
environment = {key: value for key, value in os.environ.items() if key.endswith("_THREADS")}
facts = {"engine": request["engine"], "layout": "nchw", "input_size": request["input_size"]}
facts |= {"params": 1_000_000, "macs": 2_000_000, "base_mib": 1.0, "load_s": 0.1}
facts |= {"threads": request["threads"], "cpus": 64, "warmup_ms": part.get("ms", 1.0)}
facts |= {"environment": environment, "offline": os.environ.get("HF_HUB_OFFLINE")}
channel.send({**facts, **part.get("facts", {})})
turns = 0
while (request := channel.receive()) is not None and request["do"] == "turn":
    turns += 1
    if does == "die later" and turns == 2:
        sys.exit("the reason of its later death")
    reply_to_turn()
channel.send({"peak_mib": 7.0})
