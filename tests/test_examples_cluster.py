"""The examples for clusters: they parse, their training commands are ours, and the Slurm script does what it says."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from longread.cli import build_parser
from tests.test_train import make_data, rows_of, weights_of, without_timing

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
SLURM = CLUSTER / "slurm.sh"
MANIFESTS = sorted(CLUSTER.glob("*.yaml"))
FAKES = {
    "srun": r"""#!/bin/bash
printf '%s\n' "$@" > "$LOG/srun"
trap 'echo TERM >> "$LOG/signals"; sleep 0.3; exit "$THEN"' TERM
echo > "$LOG/started"
[ -z "$AT_ONCE" ] || exit "$AT_ONCE"
while true; do sleep 0.02; done
""",
    "scontrol": r"""#!/bin/bash
if [ "$1" = show ]; then printf '%s\n' "${NODES:-node7}" node8; else echo "$@" >> "$LOG/scontrol"; fi
""",
}
TORCHRUN = '#!/bin/bash\nexec "$PYTHON" -m torch.distributed.run "$@"\n'


def understood(words: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What torchrun and longread understand of a command line."""
    assert words[0] == "torchrun"
    launch = get_args_parser().parse_args(words[1:])
    assert (launch.module, launch.training_script) == (True, "longread")
    return launch, build_parser().parse_args(launch.training_script_args)


def container_of(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of the training, and its only container."""
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        template = spec["replicatedJobs"][0]["template"]["spec"]["template"]
    else:
        template = spec["pytorchReplicaSpecs"]["Worker"]["template"]
    (container,) = template["spec"]["containers"]
    return template["spec"], container


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_trains(path: Path) -> None:
    pod, container = container_of(yaml.safe_load(path.read_text()))
    launch, options = understood([*container["command"], *container["args"]])
    assert options.resume
    assert int(launch.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    (patience,) = (int(each["value"]) for each in container["env"] if each["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert patience < pod["terminationGracePeriodSeconds"]
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {f"/{options.out.split('/')[1]}", "/dev/shm"}


def test_the_numbers_of_a_jobset_agree() -> None:
    manifest = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
    _, container = container_of(manifest)
    launch, _ = understood([*container["command"], *container["args"]])
    (job,) = manifest["spec"]["replicatedJobs"]
    nodes = job["template"]["spec"]
    assert nodes["completions"] == nodes["parallelism"] == int(launch.nnodes)
    name = manifest["metadata"]["name"]
    assert launch.rdzv_endpoint.startswith(f"{name}-{job['name']}-0-0.{name}:")
    assert nodes["template"]["spec"]["restartPolicy"] == "Never"  # with a pod failure policy


def test_the_numbers_of_a_pytorchjob_agree() -> None:
    manifest = yaml.safe_load((CLUSTER / "pytorchjob.yaml").read_text())
    replicas, policy = manifest["spec"]["pytorchReplicaSpecs"], manifest["spec"]["elasticPolicy"]
    assert list(replicas) == ["Worker"]  # with a master too, the operator numbers ranks itself
    assert replicas["Worker"]["replicas"] == policy["minReplicas"] == policy["maxReplicas"]
    assert container_of(manifest)[1]["name"] == "pytorch"


def test_the_script_for_slurm_asks_for_what_it_needs() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    lines = SLURM.read_text().splitlines()
    asked = dict(re.fullmatch(r"#SBATCH --([a-z-]+)=?(\S*)", line).groups() for line in lines if "#SBATCH" in line)  # type: ignore[union-attr,misc]
    assert asked["ntasks-per-node"] == "1"
    assert "requeue" in asked
    assert re.fullmatch(r"B:TERM@\d+", asked["signal"])
    patience = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", SLURM.read_text())[1])  # type: ignore[index]
    assert patience < int(asked["signal"].partition("@")[2])
    assert lines.index("set -u") > max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))


def started(directory: Path, *arguments: str, at_once: str = "", then: str = "143") -> subprocess.Popen[str]:
    """The script on a cluster that is not one: `srun` waits for SIGTERM, and then ends with `then`."""
    for name, text in FAKES.items():
        fake = directory / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(text)
        fake.chmod(0o755)
    environment = {
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "LOG": str(directory),
        "AT_ONCE": at_once,
        "THEN": then,
        "DATA": "/shared/some books",
        "RUN": "/shared/run",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    return subprocess.Popen(["bash", SLURM, *arguments], env=environment, text=True, stderr=subprocess.PIPE)


def stopped(directory: Path, then: str) -> int:
    process = started(directory, then=then)
    while not (directory / "started").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    return process.wait(30)


def test_the_script_for_slurm_trains(tmp_path: Path) -> None:
    assert started(tmp_path, "--set", "milestone_every=5000", at_once="0").wait(30) == 0
    words = (tmp_path / "srun").read_text().splitlines()
    launch, options = understood(words[words.index("torchrun") :])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_id) == ("2", "8", "17-0")
    assert launch.rdzv_endpoint == "node7:29500"
    assert (options.data, options.out, options.resume) == ("/shared/some books", "/shared/run", True)
    assert options.set == ["milestone_every=5000"]
    assert not (tmp_path / "scontrol").exists()


def test_a_run_that_was_stopped_is_queued_again_once_it_has_saved(tmp_path: Path) -> None:
    assert stopped(tmp_path, then="143") == 0
    assert (tmp_path / "signals").read_text() == "TERM\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


def test_a_run_that_was_done_just_then_is_not(tmp_path: Path) -> None:
    assert stopped(tmp_path, then="0") == 0
    assert not (tmp_path / "scontrol").exists()


def test_a_run_that_failed_is_not_queued_again(tmp_path: Path) -> None:
    assert started(tmp_path, at_once="1").wait(30) == 1
    assert not (tmp_path / "scontrol").exists()


def test_the_script_for_slurm_wants_its_paths() -> None:
    found = subprocess.run(["bash", SLURM], env={"PATH": os.environ["PATH"]}, text=True, capture_output=True)
    assert found.returncode != 0
    assert "DATA: is what longread prepare wrote" in found.stderr


def test_the_documents_train_as_torchrun_does() -> None:
    text = (CLUSTER.parents[1] / "docs" / "scaling.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("torchrun")]
    assert len(lines) >= 2
    for line in lines:
        launch, options = understood(shlex.split(line))
        assert launch.max_restarts > 0
        assert options.resume


@pytest.mark.slow
def test_a_run_under_slurm_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """The script itself, with torchrun and two ranks: stopped, queued again, and finished as if nothing had been."""
    fields = {"model.width": 16, "model.num_blocks": 2, "model.num_heads": 2, "model.mlp_hidden": 16}
    fields |= {"model.window_size": 8, "model.mini_batch_size": 8, "model.num_suffix_blocks": 1, "context_length": 32}
    fields |= {"batch_size": 4, "steps": 300, "checkpoint_every": 50, "precision": "float64"}
    words = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    data = make_data(tmp_path / "texts").directory
    for name, text in {
        "srun": '#!/bin/bash\nexec "${@:2}"\n',
        "scontrol": FAKES["scontrol"],
        "torchrun": TORCHRUN,
    }.items():
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(text)
        fake.chmod(0o755)

    def submitted(run: Path) -> subprocess.Popen[bytes]:
        environment = dict(os.environ) | {"PYTHON": sys.executable, "LOG": str(tmp_path), "DATA": str(data)}
        environment |= {"RUN": str(run), "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "one", "SLURM_JOB_NUM_NODES": "1"}
        environment |= {"NODES": "localhost"}
        environment |= {"SLURM_GPUS_ON_NODE": "2", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        environment |= {"PYTHONPATH": str(CLUSTER.parents[1] / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(["bash", SLURM, *words, "--device", "cpu", "--quiet"], env=environment)

    assert submitted(tmp_path / "whole").wait(200) == 0
    process, rows = submitted(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    while not rows.exists() or rows.read_text().count("\n") < 5:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 0
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    assert 5 <= rows.read_text().count("\n") < 300
    assert submitted(tmp_path / "run").wait(200) == 0
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert without_timing(rows_of(tmp_path / "run")) == without_timing(rows_of(tmp_path / "whole"))
