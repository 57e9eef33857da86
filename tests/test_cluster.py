"""Cluster files: valid in their own languages, right in every flag, and run here as far as one machine can."""

import importlib
import logging
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
import tyro
import yaml
from streaming.base.world import World

from t2i.cli import flags_of
from t2i.cost.description import describe
from t2i.cost.plan import make_plan
from t2i.distributed.launch import prepare_environment
from t2i.errors import UserError
from t2i.runs.metrics_log import read_metrics
from t2i.train.ds_config import read_ds_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "launchers" / "cluster"
SBATCH = CLUSTER / "slurm.sbatch"
LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def parsed(words, *, launcher="train", command="TrainCommand"):
    """Parse the words after a launcher's name as it would; --config is read too."""
    module = importlib.import_module(f"t2i.commands.{launcher}")
    file = words[words.index("--config") + 1] if "--config" in words else None
    return tyro.cli(getattr(module, command), args=[*(flags_of(ROOT / file) if file else []), *words])


def documents():
    return list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))


def words_after(script, line):
    return [word for word in shlex.split(line.split(script, 1)[1], comments=True) if word != "$@"]


def commands(script):
    """The words after a script's name in every indented command of the documentation."""
    pages = [CLUSTER / "README.md", ROOT / "README.md", ROOT / "docs" / "scaling.md"]
    lines = [line for page in pages for line in page.read_text().splitlines() if line.startswith("    ")]
    return [words_after(script, line) for line in lines if script in line]


def test_the_batch_script_is_good_bash():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n", str(SBATCH)], [str(shellcheck), str(SBATCH)]):
        done = processes.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_kubernetes_manifest_is_of_the_operators_schema():
    from kubeflow_trainer_api import models

    kinds = {
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    found = {document["kind"]: document for document in documents()}
    assert found.keys() == kinds.keys()
    for kind, document in found.items():
        # The models pass unknown keys over, so what comes back tells them.
        assert kinds[kind].from_dict(document).to_dict() == document


def test_the_kubernetes_manifest_fits_together():
    claim, runtime, job = documents()
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/mnt/t2i"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    # torchrun must not kill its ranks before Kubernetes kills torchrun.
    (patience,) = container["env"]
    assert int(patience["value"]) < pod["terminationGracePeriodSeconds"]
    trainer = job["spec"]["trainer"]
    assert str(trainer["numProcPerNode"]) == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


def test_every_flag_of_the_cluster_files_is_one_of_train_py():
    trainer = documents()[-1]["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "launchers/train.py"]
    from_yaml = parsed(trainer["args"])
    assert str(from_yaml.run_dir).startswith("/mnt/t2i/")
    assert from_yaml.data.seq_len == 1_152
    (line,) = re.findall(r"exec .*launchers/train\.py.*", SBATCH.read_text())
    assert str(parsed(words_after("launchers/train.py", line)).ds_config) == "$DS_CONFIG"
    for words in [*commands("launchers/train.py"), *commands("launchers/cluster/slurm.sbatch")]:
        parsed(words)
    assert len(commands("launchers/cluster/slurm.sbatch")) == 1


def test_the_plan_in_the_documentation_is_the_one_that_is_printed():
    plans = commands("t2i plan")
    assert len(plans) >= 2
    # The others are of models that are not here, whose sizes are then unknown.
    for words in [words for words in plans if "paper_1b" in " ".join(words)]:
        command = parsed(words, launcher="plan", command="PlanCommand")
        plan = make_plan(
            command.data,
            model=command.model,
            train=command.train,
            ds_config=read_ds_config(ROOT / command.ds_config),
            plan=command.plan,
        )
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(f"    {line}".rstrip() for line in describe(plan)) in page


def test_the_hostfile_is_eight_times_eight():
    from deepspeed.launcher.runner import fetch_hostfile

    assert list(fetch_hostfile(str(CLUSTER / "hostfile")).values()) == [8] * 8


def environment(**names):
    """This process's environment without what a launcher sets."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**kept, "OMP_NUM_THREADS": "1", **names}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        # An operator's pod of one GPU; torchrun; the deepspeed launcher.
        ({"RANK": "3", "WORLD_SIZE": "8"}, ("0", "1")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ("1", "2")),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}, ("3", "4")),
    ],
)
def test_what_launchers_leave_out_is_filled_in(names, wanted, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**names, "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    prepare_environment()
    assert (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]) == wanted
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # set by the code, not by the patch


def test_streaming_tells_machines_apart_though_it_is_imported_first(monkeypatch):
    """Under the deepspeed launcher, which names the processes of a machine LOCAL_SIZE alone."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    job = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    for name, value in {**job, "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    logger = logging.getLogger("t2i")
    before = logger.level
    prepare_environment()
    logger.setLevel(before)  # later tests look at what the first rank says
    world = World.detect()
    assert (world.num_nodes, world.ranks_per_node, world.node, world.rank_of_node) == (2, 2, 1, 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # set by the code, not by the patch


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"RANK": "1"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK 3, LOCAL_WORLD_SIZE 1 and WORLD_SIZE 8 contradict each other"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is the number of processes per node"),
    ],
)
def test_a_launch_that_does_not_fit_together_is_a_sentence(names, sentence, monkeypatch):
    whole = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in (names if "RANK" in names else {**whole, **names}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        prepare_environment()


@pytest.fixture
def slurm(tmp_path):
    """A PATH on which scontrol writes down what it is asked; srun is left to the test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    asked = tmp_path / "requeued"
    write_command(
        folder / "scontrol",
        f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {asked}; fi',
    )
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "RUN": str(tmp_path / "run"),
        "DS_CONFIG": "ds_configs/zero2_fp32.json",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    (tmp_path / "run").mkdir()
    return folder, asked, environment(**variables)


def write_command(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("ending", "is_requeued"),
    [
        ("exit 0", False),
        ("exit 75", True),
        ("exit 2", False),
        ("exit 4", False),
        ("exit 137", False),
        ("echo checkpoints/step_000500 > $RUN/latest; exit 137", True),
    ],
)
def test_a_job_is_queued_again_when_that_can_help(slurm, ending, is_requeued):
    folder, asked, variables = slurm
    write_command(folder / "srun", ending)
    done = processes.run(
        ["bash", str(SBATCH)], env=variables, cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == int(ending.rpartition(" ")[2])
    assert asked.exists() == is_requeued
    if is_requeued:
        assert asked.read_text().split() == ["requeue", variables["SLURM_JOB_ID"]]


HOST = """
# Starts two tasks, each on a "host" of its own, with a /dev/shm and a folder for temporary files that the other does
# not see, or streaming would take the two for one machine.
while [ "$1" != bash ]; do shift; done
tasks=()
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=0 unshare --mount --ipc sh -c '
    mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs "$TMPDIR" && exec "$@"' host "$@" &
  tasks+=($!)
  echo $! > "$RUN.task$task"
done
worst=0
for task in "${tasks[@]}"; do
  wait "$task"
  code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


def can_make_hosts():
    command = ["unshare", "--mount", "--ipc", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return processes.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_two_hosts_stop_together_saved_and_queued_again(slurm, shards, tmp_path):
    if not can_make_hosts():
        pytest.skip("hosts are made of namespaces, which takes root")
    folder, asked, variables = slurm
    write_command(folder / "srun", HOST)
    (tmp_path / "tmp").mkdir()
    variables["TMPDIR"] = str(tmp_path / "tmp")
    run_dir = Path(variables["RUN"])
    flags = (
        f"--data.shards {shards} --data.seq-len 90 --model.hidden-size 32 --model.num-layers 2 --model.num-heads 2"
        " --train.global-batch-tokens 720 --train.max-steps 5000 --train.save-every 5000 --train.eval-every 0"
    )
    command = ["bash", str(SBATCH), *flags.split()]
    with (tmp_path / "log").open("w") as log:
        job = processes.start(command, env=variables, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_for(lambda: len(read_metrics(run_dir)) >= 3, job, tmp_path / "log")
        # Slurm asks every task; one of another host is enough, since ranks decide together.
        os.kill(int(Path(f"{run_dir}.task1").read_text()), signal.SIGTERM)
        assert job.wait(timeout=120) == 75, (tmp_path / "log").read_text()[-3000:]
    finally:
        processes.end(job)
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["image_tokens"] == 8 * 64  # eight sequences, four from each host
    assert (run_dir / "latest").read_text().strip() == f"checkpoints/step_{len(rows):06d}"
    assert asked.read_text().split()[0] == "requeue"


def wait_for(condition, job, log):
    end = time.monotonic() + 300
    while not condition():
        assert job.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)
