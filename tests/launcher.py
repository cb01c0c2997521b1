"""Launches of several processes that are forked from one, which imports torch, transformers and hf_lowrank once.

This module is also what that one runs: it reads a launch a line from its standard input, forks its processes with the
environment that torchrun gives them, and answers with their exit codes.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parent
# how long the other processes of a launch may take to notice that one has failed
PATIENCE = 5


class Launcher:
    """Starts what processes are forked from when the first launch is asked for."""

    def __init__(self):
        self.server = None

    def __call__(self, worker, *words, processes=None):
        """Run `main` of a module of tests/ with `words` as its command line; fail if one of its processes does.

        With a number of processes they have torchrun's environment; without one it is a process like any other.
        """
        codes, printed = self.run(worker, *words, processes=processes)
        assert not any(codes), (worker, words, codes, printed[-4000:])

    def run(self, worker, *words, processes=None):
        """The exit codes of the processes, and what they printed."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
                text=True,
            )
        log = Path(os.environ["HF_HOME"]) / f"launch-{os.getpid()}.log"
        launch = {"worker": worker, "words": [str(word) for word in words], "processes": processes, "log": str(log)}
        self.server.stdin.write(json.dumps(launch) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline()), log.read_text()

    def close(self):
        """Let the server go."""
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server.stdout.close()


def child(launch, rank, port):
    """What a process of a launch does, to its end."""
    try:
        log = os.open(launch["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if world := launch["processes"]:
            os.environ.update({name: str(rank) for name in ("RANK", "LOCAL_RANK")})
            os.environ.update({name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [launch["worker"], *launch["words"]]
        importlib.import_module(launch["worker"]).main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def serve():
    """Fork the processes of every launch that standard input names, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers

    import hf_lowrank as lr

    # what is imported lazily, at its first use
    _ = lr.prepare, transformers.Trainer, transformers.LlamaForCausalLM
    torch.set_num_threads(1)
    for line in sys.stdin:
        launch = json.loads(line)
        importlib.import_module(launch["worker"])
        Path(launch["log"]).write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = {}
        for rank in range(launch["processes"] or 1):
            pid = os.fork()
            if pid == 0:
                child(launch, rank, port)
            ranks[pid] = rank
        codes = [0] * len(ranks)
        signal.signal(signal.SIGALRM, lambda *_, pids=ranks: [os.kill(pid, signal.SIGKILL) for pid in pids])
        while ranks:
            pid, status = os.wait()
            codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            if any(codes):
                signal.alarm(PATIENCE)
        signal.alarm(0)
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
