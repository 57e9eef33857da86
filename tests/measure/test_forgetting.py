import json
import math
from functools import partial

import pytest
import torch
from made_shards import make_text_shards
from transformers import AutoConfig, AutoModelForCausalLM

from t2i.config import ASSETS
from t2i.errors import DataError, UserError
from t2i.measure.forgetting import (
    PROMPTS,
    complete,
    measure_forgetting,
    text_cost,
    text_sequences,
)
from t2i.model.backbone import learned_positions
from t2i.runs.loading import open_model
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout


def shards_of_text(folder, documents, tokenizer):
    return make_text_shards(
        documents,
        file=folder / "text.txt",
        out=folder / "shards",
        text_tokenizer=tokenizer,
        seq_len=16,
        heldout_share=0.5,
    )


@pytest.fixture(scope="module")
def model(finished):
    return open_model(str(finished.run_dir), needs_images=False)


def test_costs_equal_a_twin_with_whole_distributions(model):
    ids = torch.randint(model.layout.num_text_tokens, (3, 9), generator=torch.Generator().manual_seed(0))
    cost = text_cost(model.model, ids, layout=model.layout, batch_size=2)
    loss, among_text, leaked = [], [], []
    with torch.no_grad():
        for row in ids:
            probabilities = model.model(row[None]).logits[0].double().softmax(-1)
            for place in range(8):
                text = probabilities[place, : model.layout.num_text_tokens]
                loss.append(-math.log(probabilities[place, row[place + 1]]))
                among_text.append(-math.log(text[row[place + 1]] / text.sum()))
                leaked.append(1 - float(text.sum()))
    assert cost.num_tokens == 24
    # fp32 logits against double probabilities
    assert cost.loss == pytest.approx(sum(loss) / 24, abs=1e-5)
    assert cost.loss_text_rows == pytest.approx(sum(among_text) / 24, abs=1e-5)
    assert cost.leaked == pytest.approx(sum(leaked) / 24, abs=1e-5)
    assert cost.leaked > 0.1


def test_completions_are_the_likeliest_text_step_by_step(model):
    found = complete(
        model.model, ["picture"], tokenizer=model.text_tokenizer, layout=model.layout, max_new_tokens=5
    )
    ids = model.text_tokenizer.encode("picture")
    made = []
    for _ in range(5):
        with torch.no_grad():
            logits = model.model(torch.cat([ids, torch.tensor(made, dtype=torch.long)])[None]).logits[0, -1]
        made.append(int(logits[: model.layout.num_text_tokens].argmax()))
        if made[-1] == model.text_tokenizer.end_id:
            made.pop()
            break
    assert found == [model.text_tokenizer.decode(torch.tensor(made, dtype=torch.long))]
    with pytest.raises(UserError, match="--prompts holds an empty prompt"):
        complete(model.model, [""], tokenizer=model.text_tokenizer, layout=model.layout)


def test_completions_do_not_depend_on_a_folders_own_penalties():
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    count = tokenizer.num_tokens
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=count, **sizes)).eval()
    ask = partial(complete, model, ["a"], tokenizer=tokenizer, layout=VocabLayout(count, count, 0))
    (found,) = ask(max_new_tokens=8)
    assert found[-4:-2] == found[-2:]  # it repeats itself, which both penalties forbid
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1
    assert ask(max_new_tokens=8) == [found]


@pytest.mark.parametrize("kind", ["tokenizer", "positions", "chat"])
def test_what_a_reference_refuses_is_said_before_the_first_model_is_read(
    kind, finished, tmp_path, monkeypatch
):
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    config = AutoConfig.for_model("gpt2", vocab_size=tokenizer.num_tokens, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "reference")
    tokenizer.tokenizer.save_pretrained(tmp_path / "reference")
    text = str(finished.data.shards)
    if kind == "tokenizer":
        text = str(shards_of_text(tmp_path, (f"Text {n} is a number." for n in range(90)), tokenizer))
        file = tmp_path / "reference" / "tokenizer.json"
        values = json.loads(file.read_text())
        values["pre_tokenizer"] = {"type": "Whitespace"}
        file.write_text(json.dumps(values))
    monkeypatch.setattr("t2i.measure.forgetting.open_model", lambda *_, **__: pytest.fail("it was read"))
    sentence = {
        "tokenizer": "was made with the text tokenizer",
        "positions": "more than the model's 24 positions",
        "chat": "has no chat template",
    }[kind]
    with pytest.raises(UserError, match=sentence):
        measure_forgetting(
            {"model": str(finished.run_dir), "reference": str(tmp_path / "reference")}
            if kind != "chat"
            else {"reference": str(tmp_path / "reference")},
            texts={"text": text},
            prompts=["a"],
            seq_len=16,
            num_sequences=2,
            max_new_tokens=30 if kind == "positions" else 1,
            is_chat=kind == "chat",
        )


def test_text_comes_from_files_shards_of_text_and_captions(model, finished, tmp_path):
    tokenizer = model.text_tokenizer
    shards_of_text(tmp_path, (f"Text {n} says that {n} is a number." for n in range(300)), tokenizer)
    settings = {"tokenizer": tokenizer, "seq_len": 16, "num_sequences": 5}
    from_file = text_sequences(str(tmp_path / "text.txt"), **settings)
    assert from_file.shape == (5, 16)
    assert tokenizer.decode(from_file.flatten()).startswith(
        "Text 0 says that 0 is a number.<|endoftext|>Text 1"
    )
    assert text_sequences(str(tmp_path / "shards"), **settings).shape == (5, 16)
    captions = text_sequences(str(finished.data.shards), **settings)
    assert tokenizer.decode(captions.flatten()).count("picture") > 5
    (tmp_path / "short.txt").write_text("Short.")
    with pytest.raises(DataError, match="expected at least 16, which one sequence takes"):
        text_sequences(str(tmp_path / "short.txt"), **settings)


def test_a_model_is_measured_beside_its_reference(finished, tmp_path, capsys):
    first = str(finished.run_dir / "checkpoints" / "step_000003")
    results = measure_forgetting(
        {"model": str(finished.run_dir), "reference": first},
        texts={"text": str(finished.data.shards)},
        prompts=PROMPTS,
        seq_len=16,
        num_sequences=4,
        max_new_tokens=3,
    )
    assert "reference, text: 100%" in capsys.readouterr().err
    costs = [results.models[name].costs["text"] for name in ("model", "reference")]
    assert costs[0].perplexity < costs[1].perplexity
    assert costs[0].perplexity > costs[0].perplexity_text_rows
    assert len(results.models["model"].completions) == 2
    written = json.loads(json.dumps(results.to_json()))
    assert set(written["models"]["model"]["costs"]["text"]) == {
        *("num_tokens", "loss", "loss_text_rows", "leaked", "perplexity", "perplexity_text_rows")
    }


def test_text_shards_of_another_tokenizer_are_refused(model, finished, tmp_path):
    documents = (f"Text {n} says that {n} is a number." for n in range(90))
    shards_of_text(tmp_path, documents, model.text_tokenizer)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    manifest["text_tokenizer"]["fingerprint"] = "0" * 64
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="was made with the text tokenizer"):
        text_sequences(str(tmp_path / "shards"), tokenizer=model.text_tokenizer, seq_len=16, num_sequences=2)


@pytest.mark.parametrize(("kind", "has_end"), [("gpt2", True), ("opt", True), ("llama", False)])
def test_a_prompt_that_is_longer_than_learned_positions_is_a_sentence(kind, has_end):
    tokenizer = TextTokenizer.load(ASSETS / "text_tokenizer")
    count = tokenizer.num_tokens
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}}
    usual = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
    }
    more = {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 32}, "llama": {"intermediate_size": 32}}.get(
        kind, {}
    )
    config = AutoConfig.for_model(kind, vocab_size=count, **sizes.get(kind, usual | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    ask = partial(complete, model, tokenizer=tokenizer, layout=VocabLayout(count, count, 0))
    assert len(ask(["a"], max_new_tokens=4)) == 1
    most = 24 - len(tokenizer.start_ids) - len(tokenizer.encode("a")) + 1
    assert len(ask(["a"], max_new_tokens=most)) == 1
    if has_end:
        with pytest.raises(UserError, match=f"and {most + 1} new ones are more than the model's 24"):
            ask(["a"], max_new_tokens=most + 1)
    else:
        assert len(ask(["a"], max_new_tokens=most + 1)) == 1


def test_positions_behind_a_padding_are_fewer():
    """RoBERTa's kind counts from behind its padding."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(
        "roberta", vocab_size=99, max_position_embeddings=26, is_decoder=True, **sizes
    )
    assert learned_positions(AutoModelForCausalLM.from_config(config)) == 24


def test_tokenizers_that_differ_and_sequences_that_are_too_long_are_said(
    finished, tmp_path, monkeypatch, caplog
):
    texts = {"text": str(finished.data.shards)}
    settings = {"texts": texts, "prompts": [], "seq_len": 16, "num_sequences": 2, "max_new_tokens": 1}
    prints = iter("ab")
    monkeypatch.setattr(TextTokenizer, "fingerprint", lambda self: next(prints))
    both = {"model": str(finished.run_dir), "reference": str(finished.run_dir)}
    measure_forgetting(both, **settings)
    assert "model and reference have different text tokenizers" in caplog.text
    monkeypatch.setattr("t2i.measure.forgetting.learned_positions", lambda model: 8)
    with pytest.raises(
        UserError, match="in sequences of 16 tokens; .* has 8 positions. Give a smaller --seq-len"
    ):
        measure_forgetting({"model": str(finished.run_dir)}, **settings)
