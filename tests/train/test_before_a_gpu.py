"""What a GPU needs, as far as a CPU can show it: the order of calls, what is freed, what is waited for."""

import gc
import os
import sys
import weakref
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.utils.cpp_extension
from conftest import ROOT, config_of
from deepspeed.runtime.engine import DeepSpeedEngine
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from t2i.config import ASSETS, TokenizerConfig, TrainConfig, bucket_elements
from t2i.cost.devices import warn_of_slow_bf16
from t2i.distributed import launch, rendezvous
from t2i.env import cuda_compiler_problem, operators_needed
from t2i.errors import UserError, run_command
from t2i.generate import sample
from t2i.image_tokenizer.adversary import Discriminator
from t2i.image_tokenizer.codebook import Codebook
from t2i.image_tokenizer.train import _step_loss, build_vq_model
from t2i.model.backbone import load_model
from t2i.model.loss import _chunks
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.model.resize import on_cpu
from t2i.runs.loading import dtype_of, open_model
from t2i.tokens.image import ImageTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train import main
from t2i.train.deepspeed_internals import measure_in_parts
from t2i.train.ds_config import read_ds_config
from t2i.train.engine import Learner, whole_ds_config
from t2i.train.new_embeddings import has_room_for
from t2i.train.periodic import on_device_of

ZERO2 = read_ds_config(ROOT / "ds_configs" / "zero2.json")


@pytest.fixture
def calls(monkeypatch):
    """Pretend that two GPUs are visible to local rank 1, and record what is called in which order."""
    found = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("set_device", device)))
    monkeypatch.setattr(launch, "prepare_environment", lambda: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: found.append(("init", given)))
    return found


def test_the_own_gpu_is_current_before_ranks_meet(calls):
    launch.start_processes()
    assert [name for name, _ in calls] == ["set_device", "init"]
    assert calls[0][1] == 1


def test_a_rank_without_a_gpu_is_one_sentence_before_ranks_meet(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"LOCAL_RANK is 1, .* 1 GPUs; expected a GPU per process"):
        launch.start_processes()
    assert calls == []


def test_a_collective_waits_longer_than_any_watchdog(calls):
    launch.start_processes()
    # DeepSpeed's own ten minutes would end a rank that waits for another's save.
    assert calls[-1][1]["timeout"] == launch.PATIENCE > timedelta(hours=10)


@pytest.mark.parametrize("place", [rendezvous.OWN, rendezvous.ANY])
def test_ranks_that_never_start_are_waited_for_by_minutes(place, monkeypatch):
    seen = []

    def store(*_, timeout=None, **__):
        seen.append(timeout)
        raise ConnectionError

    monkeypatch.setattr(dist, "TCPStore", store)
    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "TCPStore", store)
    monkeypatch.setattr(rendezvous, "_listen", lambda port: os.fdopen(os.open(os.devnull, os.O_RDONLY)))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ConnectionError):
        next(iter(dist.rendezvous(place, timeout=launch.PATIENCE)))
    assert seen == [rendezvous.MEETING]


def alive():
    gc.collect()
    return sum(isinstance(found, DeepSpeedEngine) for found in gc.get_objects())


@pytest.mark.parametrize("ends_by", ["its last step", "an error"])
def test_a_run_leaves_no_engine_behind(ends_by, shards, tmp_path, monkeypatch):
    made, watched = [], []
    real, arm = main.make_engine, main.Watchdog.arm
    monkeypatch.setattr(
        main.Watchdog, "arm", lambda self, what, **rest: (watched.append(what), arm(self, what, **rest))
    )

    def make(*arguments, **settings):
        assert watched == ["start"]  # what hangs before the first step is ended too
        engine = real(*arguments, **settings)
        made.extend(map(weakref.ref, [engine, *engine.module.parameters()]))
        return engine

    monkeypatch.setattr(main, "make_engine", make)
    if ends_by == "an error":
        monkeypatch.setattr(main, "periodic_work", lambda *_, **__: 1 / 0)
    before = alive()
    try:
        main.train(
            config_of(shards, tmp_path / "run", max_steps=1, eval_every=0),
            ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json",
        )
    except ZeroDivisionError as error:
        assert ends_by == "an error"
        error.__traceback__ = None
    assert made
    assert alive() <= before
    assert [ref for ref in made if ref() is not None] == []


def test_the_gpus_json_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")
    assert cuda_compiler_problem(operators_needed(ZERO2)) == ""
    plain = {key: value for key, value in ZERO2.items() if key != "optimizer"}
    assert "torch_adam" in cuda_compiler_problem(operators_needed(plain))
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    assert cuda_compiler_problem(operators_needed(plain)) == ""


def test_one_rank_has_nothing_to_overlap(one_process):
    assert ZERO2["zero_optimization"]["overlap_comm"]
    whole = whole_ds_config(ZERO2, config=TrainConfig(), per_rank=8)
    assert whole["zero_optimization"] == {**ZERO2["zero_optimization"], "overlap_comm": False}


def test_a_bucket_holds_the_largest_tensor_where_reducing_overlaps_with_the_backward_pass(monkeypatch):
    monkeypatch.setattr("t2i.train.engine.rank_and_size", lambda: (0, 16))
    monkeypatch.setattr(deepspeed, "DeepSpeedConfig", lambda whole: None)  # it asks for the ranks itself

    def bucket(zero, largest):
        json = {**ZERO2, "zero_optimization": {**ZERO2["zero_optimization"], **zero}}
        whole = whole_ds_config(json, config=TrainConfig(), per_rank=8, largest=largest)
        return whole["zero_optimization"]["reduce_bucket_size"]

    assert bucket({}, largest=136_900_000) == 136_900_000
    assert bucket({}, largest=1_000) == ZERO2["zero_optimization"]["reduce_bucket_size"]
    assert bucket({"overlap_comm": False}, largest=136_900_000) == 50_000_000
    sizes = ({"overlap_comm": True}, {"overlap_comm": True, "reduce_bucket_size": 10})
    assert [bucket_elements(zero, largest=600_000_000, num_ranks=2) for zero in sizes] == [600_000_000] * 2


def test_a_model_is_lent_to_a_gpu_that_has_room(monkeypatch):
    model = torch.nn.Linear(250, 1_000, bias=False)  # 1 MB
    assert not has_room_for(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, has_room in ((1_999_999, False), (2_000_000, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**10))
        assert has_room_for(model) == has_room


def test_a_gpu_without_bf16_of_its_own_is_warned_of(monkeypatch, caplog, one_process):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for is_emulated in (False, True):
        caplog.clear()
        has_bf16 = lambda including_emulation, own=not is_emulated: own or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
        warn_of_slow_bf16(torch.nn.Linear(4, 4), ZERO2, tokens=10)
        assert ("Tesla T4 has no bf16 of its own" in caplog.text) == is_emulated


def test_a_gpu_without_memory_left_ends_with_advice(capsys):
    def allocate():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nTraceback of C++")

    with pytest.raises(SystemExit) as ended:
        run_command(allocate)
    said = capsys.readouterr().err
    assert said.startswith(
        "CUDA out of memory. Tried to allocate 20.00 MiB. To train, a smaller train_micro_batch"
    )
    assert ended.value.code == 1 and "C++" not in said


def test_a_gpu_walks_memory_in_few_large_parts():
    seen = []
    optimizer = SimpleNamespace(
        get_grad_norm_direct=lambda parts, _: seen.append([len(part) for part in parts])
    )
    measure_in_parts(optimizer)
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            optimizer.get_grad_norm_direct([torch.empty(2**27 + 1, device=device)], [object()])
        places = torch.empty(9 * 1_152, dtype=torch.long, device="cuda")
        chunks = [len(chunk) for chunk in _chunks(places, num_ids=66_824)]
    assert (len(seen[0]), seen[1]) == (2**7 + 1, [2**27, 1])
    # Three of one size, a gigabyte of logits each; nine of 1,152 before.
    assert chunks == [3_456] * 3 and 3_456 * 66_824 <= 2**28


class Waits(TorchDispatchMode):
    """Collect operators whose result a host must wait for: a number, or a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "bincount")

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        name = operator.overloadpacket.__name__
        places = arguments[1] if name in ("index", "index_put", "index_put_") else ()
        # By a mask, an operator looks for the places first, as nonzero does.
        is_masked = any(place is not None and place.dtype == torch.bool for place in places)
        if name in self.NAMES or is_masked:
            self.found.append(name)
        return operator(*arguments, **(keywords or {}))


class Moves(TorchFunctionMode):
    """Collect what makes a tensor out of the host's numbers, or may move one: a CPU hides it from dispatch."""

    NAMES = ("tensor", "as_tensor", "from_numpy", "cpu", "cuda", "numpy", "to")

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name, where = getattr(function, "__name__", ""), [*arguments[1:], *(keywords or {}).values()]
        is_cast = name == "to" and all(isinstance(each, torch.dtype) for each in where)  # stays where it is
        if name in self.NAMES and not is_cast:
            self.found.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("is_image_only", "waits"), [(False, ["nonzero"]), (True, ["nonzero", "nonzero"])])
def test_a_micro_batch_waits_only_for_the_places_that_count(is_image_only, waits):
    layout = VocabLayout(40, num_text_tokens=40, codebook_size=32)
    config = OpenLMConfig(layout.vocab_size, 32, 2, 2, image_rows_only=is_image_only)
    learner = Learner(OpenLMForCausalLM(config).train(), layout=layout, z_loss=1e-4)
    ids = torch.randint(layout.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    found = []
    with Moves(found), Waits(found):
        total, _ = learner(ids, labels)
        (total / ids.numel()).backward()
    # How many labels count decides the shape of the logits: one wait for each softmax, before the first product with
    # the head and behind the queued body. Each other wait would leave a GPU without work while the host catches up.
    assert found == waits
    with Moves(found), Waits(found):
        total.detach().item(), ids[ids > 3], ids.cpu(), ids.to("cpu"), ids.float(), torch.tensor([1])
    assert found[len(waits) :] == ["_local_scalar_dense", "index", "cpu", "to", "tensor"]


def test_a_saved_tensor_with_two_names_is_moved_once():
    flat = torch.arange(12.0)  # as ZeRO keeps a group: one memory, of which weights are views
    tied, other = flat[:6].view(2, 3), flat[6:].view(2, 3)
    moved = on_cpu({"embedding": tied, "head": tied.detach(), "other": other, "turned": other.T})
    assert moved["embedding"] is moved["head"]
    assert torch.equal(moved["other"], other) and torch.equal(moved["turned"], other.T)


@pytest.fixture
def half_folder(model_folder, tmp_path):
    """The tiny model's folder as a run in bf16 saves it."""
    opened = open_model(str(model_folder), needs_images=False)
    opened.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    opened.text_tokenizer.tokenizer.save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_weights_in_half_precision_stay_so_on_a_gpu(half_folder):
    assert dtype_of("auto", device="cuda") == dtype_of("auto", device=torch.device("cuda", 1)) == "stored"
    assert dtype_of("auto", device="cpu") == dtype_of("float32", device="cuda") == torch.float32
    assert dtype_of("bfloat16", device="cpu") == torch.bfloat16
    assert load_model(half_folder, dtype="stored").dtype == torch.bfloat16
    assert open_model(str(half_folder), needs_images=False).dtype == "float32"
    assert open_model(str(half_folder), needs_images=False, dtype="bfloat16").dtype == "bfloat16"


def test_images_name_a_precision_other_than_fp32(half_folder):
    opened = [
        replace(
            open_model(str(half_folder), needs_images=False, dtype=name),
            image_tokenizer=SimpleNamespace(fingerprint=lambda: "a test"),
        )
        for name in ("float32", "bfloat16")
    ]
    found = [
        sample.drawing_settings({"0": "a"}, opened=one, config=sample.SampleConfig(), batch_size=1)
        for one in opened
    ]
    assert [one.get("dtype") for one in found] == [None, "bfloat16"]


def test_codes_are_drawn_without_an_attention_that_plans_each_length(model_folder):
    seen = []

    def record(*_):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))

    drawer = sample.drawer_of(
        open_model(str(model_folder), needs_images=True), settings=sample.SampleConfig()
    )
    drawer.model.model.register_forward_pre_hook(record)
    sample.draw_codes(drawer, ["a"])
    assert set(seen) == {(False, True, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()  # training keeps it


def test_an_image_tokenizer_trains_with_all_its_tensors_on_one_gpu():
    config = TokenizerConfig(image_size=16, channels=(32, 32), codebook_size=8, batch_size=2)
    # Fake tensors have a device and no memory; an operator that meets two devices fails as it would on a GPU.
    # (The backward pass needs a driver; autograd keeps it on the devices of the forward pass.)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = build_vq_model(config)
            pixels, discriminator = torch.zeros(2, 3, 16, 16), Discriminator((8, 8))
        codebook = Codebook(model.quantize.embedding.weight.requires_grad_(False), decay=0.99)
        trained, picks = torch.nn.ModuleDict({"model": model}), torch.zeros(2, dtype=torch.long)
        loss, latents, output = _step_loss(trained, (pixels, picks), codebook, None, config)
        assert {loss.device.type, latents.device.type, codebook.sums.device.type} == {"cuda"}
        assert {output.device.type, discriminator(output).device.type} == {"cuda"}


def test_a_grid_is_decoded_where_the_model_is_and_the_memory_given_back(monkeypatch):
    tokenizer = ImageTokenizer.load(ASSETS / "image_tokenizer")
    moves = []
    monkeypatch.setattr(type(tokenizer.model), "to", lambda self, place: moves.append(str(place)))
    drawer = SimpleNamespace(image_tokenizer=tokenizer, model=SimpleNamespace(device=torch.device("cuda", 1)))
    with pytest.raises(RuntimeError), on_device_of(drawer):
        assert moves == ["cuda:1"]
        raise RuntimeError
    assert moves == ["cuda:1", "cpu"]
