"""The metric modules, loaded by evaluate as another project's script would."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image

from t2i.errors import DataError
from t2i.measure.distances import frechet_distance, statistics
from t2i.measure.features import extract, load_features
from t2i.measure.metrics.perplexity.perplexity import _nats
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.text import TextTokenizer

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
import evaluate
request = json.load(open(sys.argv[1]))
frechet = evaluate.load("t2i/measure/metrics/frechet_distance")
perplexity = evaluate.load("t2i/measure/metrics/perplexity")
given = frechet.compute(predictions=request["rows"], reference=request["reference_rows"])
for file in request["files"]:
    frechet.add(prediction=file)
pictures = frechet.compute(reference=request["reference_files"], features="efficientnet_lite0")
texts = perplexity.compute(predictions=request["texts"], model_id=request["model"], device="cpu")
paths = frechet.compute(
    predictions=list(map(Path, request["files"])), reference=list(map(Path, request["reference_files"]))
)
said = []
for metric, others in ((frechet, {"reference": []}), (perplexity, {"model_id": "none"})):
    try:
        metric.compute(predictions=[], **others)
    except ValueError as error:
        said.append(str(error))
print(json.dumps([given, pictures, texts, paths, said]))
"""


@pytest.fixture(scope="module")
def request_and_answer(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    rng = np.random.default_rng(0)
    files = [folder / f"{index}.png" for index in range(7)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(file)
    request = {
        "rows": rng.normal(size=(20, 5)).tolist(),
        "reference_rows": rng.normal(size=(31, 5)).tolist(),
        "files": list(map(str, files[:3])),
        "reference_files": list(map(str, files[3:])),
        "texts": ["a short text", "a long text " * 40],
        "model": str(model_folder),
    }
    (folder / "request.json").write_text(json.dumps(request))
    (folder / "script.py").write_text(SCRIPT)
    caches = {name: str(folder / "cache") for name in ("HF_HOME", "HF_MODULES_CACHE", "HF_METRICS_CACHE")}
    done = processes.run(
        [sys.executable, folder / "script.py", folder / "request.json"],
        cwd=ROOT,
        env={**os.environ, **caches, "PYTHONPATH": str(ROOT), "HF_EVALUATE_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return request, json.loads(done.stdout.splitlines()[-1])


def test_frechet_distance_of_rows_is_ours_for_sets_of_different_size(request_and_answer):
    request, (given, *_) = request_and_answer
    wanted = frechet_distance(
        statistics(np.array(request["rows"])), statistics(np.array(request["reference_rows"]))
    )
    assert given["frechet_distance"] == pytest.approx(wanted, rel=1e-12)  # float64 all the way
    assert (given["n"], given["n_reference"]) == (20, 31)
    assert "biased upwards" in given["note"]


def test_frechet_distance_of_files_names_its_features(request_and_answer):
    request, (_, pictures, _, paths, _) = request_and_answer
    extractor = load_features("efficientnet_lite0")
    made, real = (
        statistics(extract(map(Path, request[name]), extractor, batch_size=32))
        for name in ("files", "reference_files")
    )
    # float32 features of another process, whose number of threads may differ
    assert pictures["fd_efficientnet_lite0"] == pytest.approx(frechet_distance(made, real), rel=1e-4)
    assert "fid" not in pictures
    assert paths == pictures  # files may be given as paths


def test_without_predictions_there_is_a_sentence(request_and_answer):
    assert request_and_answer[1][4] == [
        "frechet_distance has no predictions; expected image files or rows of features.",
        "perplexity has no predictions; expected texts.",
    ]


def test_perplexity_is_that_of_the_logits(request_and_answer):
    request, (_, _, texts, *_) = request_and_answer
    tokenizer = TextTokenizer.load(Path(request["model"]))
    model = OpenLMForCausalLM.from_pretrained(request["model"]).eval()
    nats, perplexities = [], []
    for text in request["texts"]:
        losses = []
        ids = tokenizer.encode(text).tolist()
        for start in range(0, len(ids), 64):  # the model's positions
            piece = ids[start : start + 64]
            for place in range(1, len(piece)):
                with torch.inference_mode():
                    logits = model(torch.tensor([piece[:place]])).logits[0, -1]
                losses.append(-logits.double().log_softmax(-1)[piece[place]].item())
        nats += losses
        perplexities.append(math.exp(np.mean(losses)))
    assert len(ids) > 64  # so that cutting is seen
    # float32 logits, one position at a time against all at once
    assert texts["perplexities"] == pytest.approx(perplexities, rel=1e-4)
    assert texts["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert texts["num_tokens"] == len(nats)


def test_a_tokenizers_start_token_stands_before_each_piece_and_is_not_counted(model_folder, monkeypatch):
    """As in text that is prepared, and as `t2i forgetting` measures it."""
    tokenizer = TextTokenizer.load(model_folder)
    model = OpenLMForCausalLM.from_pretrained(model_folder).eval()
    ids = tokenizer.encode("a long text " * 40)
    assert len(ids) > 64  # the model's positions
    for start in ([7], [7, 9]):
        monkeypatch.setattr(TextTokenizer, "start_ids", start)
        losses = []
        for piece in ids.split(64 - len(start)):
            with torch.inference_mode():
                logits = model(torch.tensor([[*start, *piece.tolist()]])).logits[0, len(start) - 1 : -1]
            losses += torch.nn.functional.cross_entropy(logits.double(), piece, reduction="none").tolist()
        nats, count = _nats("a long text " * 40, model, tokenizer)
        assert (count, nats) == (len(ids), pytest.approx(sum(losses), rel=1e-5))
        assert _nats("a", model, tokenizer)[1] == len(tokenizer.encode("a"))  # one token is enough
    monkeypatch.setattr(TextTokenizer, "start_ids", [])
    with pytest.raises(DataError, match="'' has 0 tokens; perplexity needs at least 2"):
        _nats("", model, tokenizer)
    # A class without a number of positions is cut nowhere.
    model.config.max_position_embeddings, model.config.sequence_length = None, 64
    assert _nats("a long text " * 40, model, tokenizer)[1] == len(ids) - 1
