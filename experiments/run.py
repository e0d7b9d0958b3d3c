"""Runs the plan of `experiments.plan` on all GPUs of a machine, unattended, until a deadline; run again, it goes on.

    python -m experiments.run --packed packed --work work --out out --seconds 3600

Every job is a process of its own, some beside each other on each GPU. A job that fails is logged and the rest goes on;
what needs it is left out. At the deadline training runs are asked to stop: they leave a checkpoint, and the next call
resumes them. OUT receives, now and then and at the end,

    results.tar.xz      results/JOB/*.json, thinned metrics, ends of logs, state.json; of models all but the weights
    JOB.safetensors     the weights, in bfloat16, of the models named by --keep
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments.plan import BOXED, OVERHEAD, Job, Plan, jobs

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() without starting CUDA
INTERRUPTED = 75
GRACE = 15.0
"""Seconds that a run has to leave its checkpoint."""
SMALLEST_START = 25.0
"""No job is started with fewer seconds left."""
PACK_EVERY = 90.0
LOG_TAIL = 6000
METRICS_ROWS = 200
REHEARSAL = (
    *("model.width=64", "model.num_heads=1", "model.num_blocks=4", "model.mlp_hidden=128", "batch_size=2"),
    *("model.window_size=128", "model.mini_batch_size=16"),
)
REHEARSAL_UNIT = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True, help="what `experiments.corpus pack` left")
    parser.add_argument("--work", type=Path, required=True, help="where data, runs and the state lie between calls")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--seconds", type=float, required=True, help="of this call, packing included")
    parser.add_argument("--gpus", type=int, help="default: all; 0: run on the CPU")
    parser.add_argument("--per-gpu", type=int, default=7, help="room on each GPU, of which a job takes its weight")
    parser.add_argument("--first-gpu", type=int, help="room on the first one, where the first job goes")
    parser.add_argument(
        "--first-gpu-after", type=float, default=0.0, help="leave the first one to others for so many seconds"
    )
    parser.add_argument("--scale", type=float, help="of all numbers of steps (default 1)")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="jobs, and what they need, in this order"
    )
    parser.add_argument("--last", action="store_true", help="start nothing that would not finish")
    parser.add_argument("--keep", nargs="+", default=[BOXED, "e2e-s1-32", "full-s1-32"], metavar="JOB")
    parser.add_argument("--rehearse", action="store_true", help="tiny models and few steps, on a CPU")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    parser.add_argument("--commit", help="of this code, where no repository says it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runner = Runner(options)
    return runner.work_of(options.child) if options.child else runner.run()


@dataclass
class Running:
    job: Job
    pid: int
    gpu: int
    started: float


@dataclass
class Runner:
    module: ClassVar[str] = "experiments.run"
    """What a process that cannot be forked runs."""
    facts: ClassVar[tuple[str, ...]] = ("corpus.json", "tokenizer.json", "tokenizer_config.json")
    """Files of PACKED that the results take along."""
    options: argparse.Namespace
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        options = self.options
        self.work, self.out = options.work.absolute(), options.out.absolute()
        self.packed = options.packed.absolute()
        self.deadline = self.started + options.seconds - GRACE - 10
        self.state: dict[str, Any] = {"jobs": {}, "calls": []}
        with contextlib.suppress(FileNotFoundError):
            self.state = json.loads((self.work / "state.json").read_text(encoding="utf-8"))
        self.forks = True
        self.running: list[Running] = []
        self.waiting: list[Job] = []
        self.packing: int | None = None

    def run(self) -> int:
        if self.options.list:
            self.print_plan(self.planned(self.options.scale or 1.0))
            return 0
        self.work.mkdir(parents=True, exist_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        import_everything()
        from longread.record import code_commit

        self.gpus = self.options.gpus
        if self.gpus is None:
            self.gpus, self.forks = number_of_gpus()
        self.say(f"{self.gpus} GPUs" + ("" if self.forks else "; CUDA does not survive a fork here, jobs start slowly"))
        commit = self.options.commit or code_commit()
        self.state["calls"].append({"seconds": self.options.seconds, "gpus": self.gpus, "commit": commit})
        self.save_state()
        self.prepare()
        jobs_ = self.planned(self.settle_scale())
        self.schedule(jobs_)
        self.stop_all()
        self.pack()
        self.print_table(jobs_)
        return 0

    # Before the jobs

    def prepare(self) -> None:
        """Unpacks the data, in the first call."""
        if not (self.work / "data" / "ready").exists():
            status = os.waitstatus_to_exitcode(os.waitpid(self.launch("data", ""), 0)[1])
            self.say(f"data: {'done' if status == 0 else f'FAILED with {status}'}")
            if status:
                print(tail(self.work / "logs" / "data.log"))
                raise SystemExit("no data, no experiments")

    def work_of(self, name: str) -> int:
        """What the process of that name does: "data", "pack" or a job."""
        if name == "data":
            self.unpack()
            (self.work / "data" / "ready").touch()
            return 0
        if name == "pack":
            return self.pack()
        return execute(next(job for job in self.planned(float(self.state["scale"])) if job.name == name))

    def unpack(self) -> None:
        from experiments.corpus import unpack

        unpack(self.packed, self.work / "data")

    def launch(self, name: str, gpu: str) -> int:
        """Starts the process of that name with that GPU alone and its output in logs/NAME.log; returns its id."""
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            if not self.forks:
                os.execv(sys.executable, [sys.executable, "-m", self.module, *sys.argv[1:], "--child", name])  # noqa: S606
            status = self.work_of(name)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def settle_scale(self) -> float:
        """Of the first call, for all calls: what comes later must fit what was trained before."""
        default = 0.003 if self.options.rehearse else 1.0
        self.state.setdefault("scale", self.options.scale or default)
        self.save_state()
        return float(self.state["scale"])

    def all_jobs(self, scale: float) -> list[Job]:
        data = self.work / "data"
        if self.options.rehearse:
            return jobs(Plan(data, self.work, REHEARSAL_UNIT, scale, REHEARSAL, 4))
        return jobs(Plan(data, self.work, 1024, scale))

    def planned(self, scale: float) -> list[Job]:
        """Those of `--only`, in its order, and what they need."""
        found = self.all_jobs(scale)
        by_name = {job.name: job for job in found}
        rank: dict[str, int] = {}
        for i, pattern in enumerate(self.options.only):
            wanted = fnmatch.filter(by_name, pattern)
            while wanted:
                rank |= {name: i for name in wanted if name not in rank}
                wanted = [need for name in wanted for need in by_name[name].needs if need in by_name]
        return sorted((job for job in found if job.name in rank), key=lambda job: rank[job.name])

    # The jobs

    def schedule(self, jobs_: list[Job]) -> None:
        packed = time.monotonic()
        self.waiting = [job for job in jobs_ if self.status(job.name) not in ("done", "failed")]
        while (self.waiting or self.running) and time.monotonic() < self.deadline:
            self.reap()
            names = {job.name for job in jobs_}
            for job in list(self.waiting):
                if any(need not in names or self.status(need) in ("failed", "left out") for need in job.needs):
                    self.finished(job, "left out", 0, -1, 0.0)
                    self.waiting.remove(job)
                elif all(self.status(need) == "done" for need in job.needs) and self.fits(job):
                    gpu = self.free_gpu(job.weight)
                    if gpu is None:
                        break  # a lighter one behind it might fit, again and again
                    self.waiting.remove(job)
                    self.start(job, gpu)
            if time.monotonic() - packed > PACK_EVERY and self.packing is None:
                packed, self.packing = time.monotonic(), self.launch("pack", "")
            time.sleep(0.1)

    def status(self, name: str) -> str:
        return str(self.state["jobs"].get(name, {}).get("status", ""))

    def fits(self, job: Job) -> bool:
        left = self.deadline - time.monotonic()
        if left < SMALLEST_START:
            return False
        spent = float(self.state["jobs"].get(job.name, {}).get("seconds", 0.0))
        return not self.options.last or max(OVERHEAD, job.estimated_seconds - spent) * 1.3 < left

    def free_gpu(self, weight: int) -> int | None:
        """The GPU with the least work that has room for such a job; 0 without a GPU, for one job at a time."""
        if not self.gpus:
            return None if self.running else 0
        taken = [sum(r.job.weight for r in self.running if r.gpu == gpu) for gpu in range(self.gpus)]
        room = [self.options.per_gpu] * self.gpus
        room[0] = self.options.first_gpu or room[0]
        first = int(self.gpus > 1 and time.monotonic() - self.started < self.options.first_gpu_after)
        fits = [taken[gpu] + weight <= max(room[gpu], weight * (not taken[gpu])) for gpu in range(self.gpus)]
        free = [gpu for gpu in range(first, self.gpus) if fits[gpu]]
        return min(free, key=lambda gpu: (taken[gpu], room[gpu], gpu)) if free else None

    def device(self, gpu: int) -> str:
        """What CUDA calls that GPU of those that this process may see."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",")[gpu] if visible else str(gpu)

    def start(self, job: Job, gpu: int) -> None:
        pid = self.launch(job.name, self.device(gpu) if self.gpus else "")
        self.running.append(Running(job, pid, gpu, time.monotonic()))

    def reap(self) -> None:
        if self.packing is not None and os.waitpid(self.packing, os.WNOHANG)[0]:
            self.packing = None
        for running in list(self.running):
            pid, status = os.waitpid(running.pid, os.WNOHANG)
            if pid:
                self.running.remove(running)
                code = os.waitstatus_to_exitcode(status)
                word = {0: "done", INTERRUPTED: "interrupted"}.get(
                    code, "interrupted" if self.late and code < 0 else "failed"
                )
                if word == "failed" and self.once_more(running.job):
                    word = "once more"
                self.finished(running.job, word, code, running.gpu, time.monotonic() - running.started)

    def once_more(self, job: Job) -> bool:
        """Whether a job that has failed should come again: once, if only its neighbours left it no memory."""
        crowded = "out of memory" in tail(self.work / "logs" / f"{job.name}.log")
        if crowded and self.status(job.name) != "once more":
            self.waiting.append(job)
            return True
        return False

    @property
    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def finished(self, job: Job, status: str, code: int, gpu: int, seconds: float) -> None:
        before = self.state["jobs"].get(job.name, {}).get("seconds", 0.0)
        self.state["jobs"][job.name] = {
            "status": status,
            "code": code,
            "gpu": gpu,
            "seconds": round(before + seconds, 1),
            "estimated": round(job.estimated_seconds, 1),
            "experiment": job.experiment,
            "method": job.method,
            "tokens": job.tokens,
            "context": job.context,
        }
        self.save_state()
        self.say(
            f"{job.name}: {status} after {seconds:.0f} s" + (f" ({last_line(self.work, job.name)})" if code else "")
        )

    def stop_all(self) -> None:
        for running in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while self.running and time.monotonic() < until:
            self.reap()
            time.sleep(0.1)
        for running in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)
        while self.running:
            self.reap()
            time.sleep(0.1)
        if self.packing is not None:
            os.waitpid(self.packing, 0)

    # What is left

    def save_state(self) -> None:
        temporary = self.work / "state.tmp"
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        temporary.replace(self.work / "state.json")

    def pack(self) -> int:
        """Writes OUT; every file whole or not at all."""
        kept = [self.work / "state.json", *sorted((self.work / "results").rglob("*.json"))]
        for name in self.options.keep:
            source, halved = self.work / "runs" / name, self.work / "models" / name
            if (source / "model" / "config.json").is_file() and not (self.out / f"{name}.safetensors").exists():
                save_halved(source, halved)
                shutil.copyfile(halved / "model.safetensors", self.out / ".weights")
                (self.out / ".weights").replace(self.out / f"{name}.safetensors")
            kept += [halved / "config.json"] if (halved / "config.json").is_file() else []
        temporary = self.out / ".results"
        with tarfile.open(temporary, "w:xz", preset=2) as tar:
            for path in kept:
                add(tar, str(path.relative_to(self.work)), path.read_bytes())
            for name in self.facts:
                add(tar, name, (self.packed / name).read_bytes())
            for run in sorted((self.work / "runs").glob("*")):
                if (run / "metrics.jsonl").is_file():
                    add(tar, f"metrics/{run.name}.json", json.dumps(thinned(run / "metrics.jsonl")).encode())
                    add(tar, f"runs/{run.name}.json", (run / "run.json").read_bytes())
            for path in sorted((self.work / "logs").glob("*.log")):
                add(tar, f"logs/{path.name}", tail(path).encode())
        temporary.replace(self.out / "results.tar.xz")
        return 0

    def print_plan(self, jobs_: list[Job]) -> None:
        total = 0.0
        for job in jobs_:
            seconds = job.estimated_seconds
            total += seconds
            needs = f"  after {', '.join(job.needs)}" if job.needs else ""
            print(f"{job.tier} {job.name:24s} {job.tokens / 1e6:7.1f}M tokens {seconds:6.0f} s{needs}")
        print(f"{len(jobs_)} jobs, {total:.0f} GPU seconds if each had a GPU for itself")

    def print_table(self, jobs_: list[Job]) -> None:
        """What ran: seconds, speed, and the loss over the longest stretches of each kind, learning and frozen."""
        print(f"{'job':24s} {'status':12s} {'seconds':>8s} {'tok/s':>9s} {'train':>7s}  held-out losses")
        for job in jobs_:
            entry = self.state["jobs"].get(job.name)
            if entry is None:
                continue
            rows = metrics_of(self.work / "runs" / job.name / "metrics.jsonl")
            speed = sorted(row["tokens_per_second"] for row in rows)[len(rows) // 2] if rows else 0
            train = f"{rows[-1]['loss']:.3f}" if rows else ""
            found = losses(sorted((self.work / "results" / job.name).glob("*.json")))
            print(f"{job.name:24s} {entry['status']:12s} {entry['seconds']:8.0f} {speed:9.0f} {train:>7s}  {found}")
        missing = [job.name for job in jobs_ if job.name not in self.state["jobs"]]
        print(f"not started: {' '.join(missing) or 'none'}")

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f}] {text}", flush=True)


def execute(job: Job) -> int:
    """The commands of a job, one after the other, those left out whose result is there."""
    from longread.cli import main as longread

    for command in job.commands:
        if command.makes.exists():
            continue
        first, *rest = command.arguments
        if first != "train":  # a directory that a command makes must not be there
            place = command.makes.parent
            (place.parent if first in ("convert", "prepare") else place).mkdir(parents=True, exist_ok=True)
        print("python" if first == "-m" else "longread", *command.arguments, flush=True)
        started = time.monotonic()
        status = importlib.import_module(rest[0]).main(rest[1:]) if first == "-m" else longread(command.arguments)
        print(f"-> {status} after {time.monotonic() - started:.1f} s", flush=True)
        if status == 128 + signal.SIGTERM:
            return INTERRUPTED
        if status:
            return status
    return 0


def import_everything() -> None:
    """Once, before the first fork, so that no job spends its time on it. Nothing here may touch a GPU."""
    import longread.cli.evaluate
    import longread.evaluate
    import longread.session
    import longread.train  # noqa: F401


def number_of_gpus() -> tuple[int, bool]:
    """How many there are, and whether a forked process can use them. Asked of one: CUDA must not start in this one."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            import torch

            count = torch.cuda.device_count()
            os.write(writing, bytes([count]))
            torch.zeros(1, device="cuda" if count else "cpu").sum().item()
            os.write(writing, b"!")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    return (found[0] if found else 0), len(found) == 2


def save_halved(run: Path, directory: Path) -> None:
    """The finished model of a run in bfloat16."""
    import torch

    from longread.checkpoint import load_model, save_model

    loaded = load_model(run, dtype=torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = loaded.metadata
    save_model(directory, loaded.model, loaded.inner, metadata["tokenizer_fingerprint"], metadata["provenance"])


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def metrics_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def thinned(path: Path) -> list[dict[str, Any]]:
    """Some rows of a metrics file, losses averaged over those left out between."""
    rows = metrics_of(path)
    stride = max(1, len(rows) // METRICS_ROWS)
    groups = [rows[i : i + stride] for i in range(0, len(rows), stride)]
    return [group[-1] | {"loss": sum(row["loss"] for row in group) / len(group)} for group in groups]


def losses(paths: list[Path]) -> str:
    parts = []
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))["results"]
            figures = "/".join(f"{result['loss']['nats_per_token']['mean']:.3f}" for result in results)
            parts.append(f"{path.stem} {figures}")
        except (KeyError, TypeError, ValueError):
            parts.append(path.stem)
    return "  ".join(parts)


def tail(path: Path) -> str:
    try:
        return path.read_bytes()[-LOG_TAIL:].decode(errors="replace")
    except OSError:
        return ""


def last_line(work: Path, name: str) -> str:
    lines = tail(work / "logs" / f"{name}.log").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


if __name__ == "__main__":
    sys.exit(main())
