"""No test may reach the network or leave a process; arithmetic is single-threaded so that it repeats."""

import atexit
import gc
import logging
import os
import resource
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # transformers copies an export's code to a folder of the export's name, and two workers have exports of one name.
    own = tempfile.mkdtemp(prefix="t2i-modules-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["HF_MODULES_CACHE"] = own

import processes
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from made_shards import make_shards

from t2i.config import ASSETS, DataConfig, ModelConfig, RunConfig, TrainConfig

torch.set_num_threads(1)
processes.guard()
# How long an example takes depends on what else the machine does.
hypothesis_settings.register_profile("t2i", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("t2i")
# Streaming keeps the shared memory of every run that this process trains open until the process ends.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

ROOT = Path(__file__).parents[1]
LONG_FIRST = (
    "faults/test_process.py",
    "study/test_law.py",
    "test_walk.py",
    "train/test_resume.py",
    "test_cluster.py",
    "train/test_train.py",
    "measure/test_coco.py",
    "report/test_study_report.py",
    "data/test_ranks.py",
    "train/test_image_weights.py",
    "test_real_parts.py",
    "train/test_forgetting_less.py",
    "test_console.py",
    "study/test_jobs.py",
    "train/test_resume_elsewhere.py",
    "faults/test_data.py",
    "test_tutorial.py",
    "study/test_inputs.py",
    "test_stages.py",
    "image_tokenizer/test_alignment.py",
    "test_gpu_benchmark.py",
    "train/test_backbones.py",
    "faults/test_disk.py",
    "faults/test_security.py",
)
"""Files that take a minute or so, about the longest first; those that wait for processes stand beside those that
calculate."""


def pytest_collection_modifyitems(items):
    """Put long files first: one that began last would keep a single process at work (`make test` keeps this order)."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    """Keep what was imported from the collector: each training ends with a look through all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def first_rank_speaks():
    """Let later tests hear the first rank, though a test was another one, which is silent."""
    logger = logging.getLogger("t2i")
    before = logger.level
    yield
    if logger.level == logging.ERROR:
        logger.setLevel(before)


@pytest.fixture
def call(monkeypatch):
    """Run a command of the repository in this process; return its exit status."""
    for name in processes.JOB:  # an earlier test's training leaves them
        monkeypatch.delenv(name, raising=False)

    def run(command, *words):
        monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
        try:
            runpy.run_path(str(ROOT / command), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.fixture
def one_process():
    from t2i.distributed.launch import start_processes

    start_processes()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("made"), num_images=120)


def config_of(shards, run_dir, **train_settings):
    settings = {
        "max_steps": 6,
        "global_batch_tokens": 8 * 90,
        "save_every": 3,
        "eval_every": 6,
        "eval_images": 4,
    }
    return RunConfig(
        run_dir=run_dir,
        data=DataConfig(shards=shards, seq_len=90),
        model=ModelConfig(hidden_size=32, num_layers=2, num_heads=2),
        train=TrainConfig(**{**settings, "warmup_steps": 2, **train_settings}),
    )


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory):
    from t2i.train.main import train

    config = config_of(shards, tmp_path_factory.mktemp("runs") / "whole")
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    return config


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder like an exported one, of random weights, that draws 32x32 pictures in a moment."""
    from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
    from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
    from t2i.tokens.image import ImageTokenizer
    from t2i.tokens.text import TextTokenizer
    from t2i.tokens.vocab import VocabLayout

    folder = tmp_path_factory.mktemp("models") / "tiny"
    text, image = (
        TextTokenizer.load(ASSETS / "text_tokenizer"),
        ImageTokenizer.load(ASSETS / "image_tokenizer"),
    )
    layout = VocabLayout(text.num_tokens, text.num_tokens, image.codebook_size)
    torch.manual_seed(0)
    config = OpenLMConfig(
        vocab_size=layout.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        vocab_layout=layout.to_dict(),
        codes_per_image=16,
    )
    OpenLMForCausalLM(config).save_pretrained(folder)
    text.tokenizer.save_pretrained(folder)
    shutil.copytree(ASSETS / "image_tokenizer", folder / "image_tokenizer")
    return folder
