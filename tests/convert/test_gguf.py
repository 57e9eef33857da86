"""GGUF files, written here by llama.cpp's own package from tiny models, become folders for model.init."""

import json
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from t2i.convert.gguf import _byte_level, convert_gguf
from t2i.errors import CheckpointError, UserError
from t2i.files import sha256_of
from t2i.model.backbone import load_model
from t2i.tokens.text import TextTokenizer

END, TURN, PAD = "<|endoftext|>", "<|im_end|>", "<pad>"
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 5e4,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def vocabulary():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<|im_start|>", TURN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a red block and a green block, 1234 blocks"] * 4, trainer)
    return made


@pytest.fixture
def written(vocabulary, tmp_path):
    """Write a tiny model of a class as a GGUF file, and return both."""

    def write(kind="llama", *, changes=(), quantised=False, words=()):
        torch.manual_seed(0)
        num_rows = vocabulary.get_vocab_size() + 5
        # transformers' reader knows no other width of Qwen3's heads.
        heads = {"head_dim": 128} if kind == "qwen3" else {}
        config = AutoConfig.for_model(
            kind, **SIZES, **heads, vocab_size=num_rows, tie_word_embeddings=kind != "qwen3"
        )
        model = AutoModelForCausalLM.from_config(config)
        for name, value in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(value, 0.5, 0.2)
        path = tmp_path / f"{kind}.gguf"
        writer = gguf.GGUFWriter(path, kind)
        metadata(writer, config)
        if words:
            pieces(writer, words, num_rows)
        else:
            tokens(writer, vocabulary, num_rows)
        for change in changes:
            change(writer)
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stored, data = stored_as(name, value.numpy(), kind)
            if quantised and data.ndim == 2:
                q8 = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(stored, gguf.quants.quantize(data, q8), raw_dtype=q8)
            else:
                writer.add_tensor(stored, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model.eval(), path

    return write


def metadata(writer, config):
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(SIZES["rope_theta"])
    if config.model_type == "qwen3":
        writer.add_key_length(config.head_dim)


def pieces(writer, words, num_rows):
    """Write Llama 2's kind of tokenizer: pieces with scores, and a byte for what no piece holds."""
    unused = [f"[unused{number}]" for number in range(num_rows - 259 - len(words))]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *unused]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([0.0] * 259 + [-float(number) for number in range(len(texts) - 259)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words), *[5] * len(unused)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def tokens(writer, vocabulary, num_rows, rule="smollm"):
    by_id = sorted(vocabulary.get_vocab(), key=vocabulary.token_to_id)
    # Rows that no token uses, as in files whose number of rows is rounded up.
    by_id += [f"[unused{number}]" for number in range(num_rows - len(by_id))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(by_id)
    writer.add_token_types([3] * 4 + [1] * (len(by_id) - 4))
    state = json.loads(vocabulary.to_str())
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)


def stored_as(name, value, kind):
    """Name a tensor as GGUF does; llama's files keep the two halves of a head's pairs side by side."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight", value
    if name == "lm_head.weight":
        return "output.weight", value
    if name == "model.norm.weight":
        return "output_norm.weight", value
    _, _, layer, *parts, end = name.split(".")  # model.layers.0.self_attn.q_proj.weight
    part = ".".join(parts)
    if kind == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = SIZES["num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"]
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return f"blk.{layer}.{NAMES[part]}.{end}", np.ascontiguousarray(value)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_file_becomes_a_folder_with_the_logits_of_the_model_that_it_was_written_from(
    written, tmp_path, kind
):
    model, path = written(kind)
    said = []
    convert_gguf(path, end_token=END, text_tokenizer=None, out=tmp_path / "made", tell=said.append)
    made = load_model(tmp_path / "made", dtype=torch.float32).eval()
    ids = torch.arange(3, 60, 5)[None]
    with torch.inference_mode():
        torch.testing.assert_close(made(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert "GB of memory" in said[0] and f"SHA-256 {sha256_of(path)}" in said[1]
    assert "tiny" in said[2] and "checked" in said[3] and "checked" in said[4]


def test_a_quantised_file_becomes_the_numbers_that_it_holds(written, tmp_path):
    model, path = written(quantised=True)
    convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)
    made = load_model(tmp_path / "made", dtype=torch.float32)
    for (name, found), (_, value) in zip(made.named_parameters(), model.named_parameters(), strict=True):
        # Q8_0 keeps 8 bits of each number: half a step of the largest of its 32, which is under 5 deviations.
        assert (found - value).abs().max() <= 5 * value.std() / 254 + 1e-6, name


def test_a_folder_in_bfloat16_holds_the_rounded_weights(written, tmp_path):
    model, path = written()
    convert_gguf(
        path, end_token=None, text_tokenizer=None, dtype="bfloat16", out=tmp_path / "made", tell=print
    )
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    for (name, found), (_, value) in zip(made.named_parameters(), model.named_parameters(), strict=True):
        assert found.dtype == torch.bfloat16 and torch.equal(found, value.bfloat16()), name


def test_the_tokenizer_ends_documents_where_asked_and_splits_digits_as_the_file_says(written, tmp_path):
    _, path = written()
    convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "chat", tell=print)
    convert_gguf(path, end_token=END, text_tokenizer=None, out=tmp_path / "text", tell=print)
    chat, text = (TextTokenizer.load(tmp_path / name) for name in ("chat", "text"))
    assert (chat.end_id, text.end_id) == (2, 0)
    assert chat.tokenizer.bos_token == "<|im_start|>" and text.tokenizer.pad_token == PAD
    assert [text.decode(number[None]) for number in text.encode("block 1234")][-4:] == list("1234")
    # A space belongs to the word after it, but never to a digit.
    assert text.decode(text.encode("block 1234")[-5][None]) == " "
    model = load_model(tmp_path / "text")
    # Padding in config.json would freeze that id's embedding.
    assert model.config.pad_token_id is None and model.config.eos_token_id == 0
    ends = model.generation_config
    assert ends.eos_token_id == [0, 2] and len(ends.suppress_tokens or []) == 0


@pytest.mark.parametrize(
    ("rule", "stated", "begins"),
    [("llama-bpe", None, True), ("smollm", None, False), ("smollm", True, True), ("llama-bpe", False, False)],
)
def test_texts_begin_with_the_start_token_where_file_or_rule_say_so(rule, stated, begins):
    tokens = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    known = {"tokens": tokens, "merges": []}
    values = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.token_type": [3] + [1] * 256}
    values |= {} if stated is None else {"tokenizer.ggml.add_bos_token": stated}
    file = SimpleNamespace(values=values, of_tokenizer=known.__getitem__)
    made = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(file, rule=rule), bos_token="<s>", eos_token="<s>"
    )
    assert made("ab").input_ids == [0] * begins + [tokens.index("a"), tokens.index("b")]
    assert TextTokenizer(made, name="made").start_ids == [0] * begins


@pytest.mark.parametrize("kind", ["missing", "no gguf", "cut"])
def test_what_is_no_whole_gguf_file_is_refused(written, tmp_path, kind):
    _, path = written()
    content = path.read_bytes()
    other = tmp_path / "other.gguf"
    if kind != "missing":
        other.write_bytes(b"PK\3\4" * 100 if kind == "no gguf" else content[: len(content) // 2])
    with pytest.raises((UserError, CheckpointError), match=r"other\.gguf"):
        convert_gguf(other, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rotary"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rotary"),
    ],
)
def test_scaled_positions_are_refused(written, tmp_path, change, said):
    _, path = written(changes=[change])
    with pytest.raises(UserError, match=said):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)


def test_a_sentencepiece_tokenizer_is_made_of_its_pieces_and_scores(written, tmp_path):
    words = ["▁a", "re", "▁red", "▁", *"abcdelpr", "pp", "ed", "▁r", "app", "▁app", "le", "▁apple"]
    # The better of two ways to merge is the one whose piece stands first.
    _, path = written(words=words)
    convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)
    made = TextTokenizer.load(tmp_path / "made")
    by_id = made.tokenizer.convert_ids_to_tokens
    assert by_id(made.encode("a red apple é").tolist()) == [
        "▁a",
        "▁",
        "re",
        "d",
        "▁apple",
        "▁",
        "<0xC3>",
        "<0xA9>",
    ]
    assert (made.start_ids, made.end_id, made.num_tokens) == ([1], 2, 285)
    assert made.decode(made.encode(" red  </s>")) == " red  </s>" and 2 not in made.encode("</s>")
    assert load_model(tmp_path / "made").config.eos_token_id == 2


def test_a_file_without_merges_and_more_ids_than_embeddings_are_refused(written, tmp_path):
    _, path = written(changes=[lambda writer: writer.kv_data[0].pop("tokenizer.ggml.merges")])
    with pytest.raises(CheckpointError, match="has no tokenizer.ggml.merges, which a llama model needs"):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)
    _, path = written(words=[f"▁{number}" for number in range(100)])
    with pytest.raises(
        UserError, match="llama.gguf lists 359 tokens and has 285 embeddings; expected as many"
    ):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)


def stating(name, value):
    """Change what a file states, or leave it out."""

    def change(writer):
        stated = writer.kv_data[0]
        if value is None:
            del stated[name]
        else:
            stated[name].value = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (stating("llama.block_count", 1), "states 1 blocks and has tensors of 2"),
        (stating("llama.block_count", 4_000_000_000), "states 4000000000 blocks and has tensors of 2"),
        (stating("llama.attention.head_count", 0), "cannot be read as llama"),
        (stating("llama.attention.head_count_kv", 0), "cannot be read as llama"),
        (stating("tokenizer.ggml.eos_token_id", 99_999), "a broken text tokenizer"),
        (stating("tokenizer.ggml.merges", ["a b", "ab"]), "a broken text tokenizer"),
        (stating("tokenizer.ggml.merges", ["zz qq"]), "a broken text tokenizer.*zz"),
        (stating("tokenizer.ggml.token_type", [3, 3]), "a broken text tokenizer"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(written, tmp_path, change, said):
    """With fewer blocks than there are, model and reference would both leave the last ones out."""
    _, path = written(changes=[change])
    with pytest.raises(CheckpointError, match=said):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bos_token_id", 99_999, "a broken text tokenizer"),
        ("scores", [0.0, 1.0], "285 pieces, 2 scores and 285 kinds"),
        ("token_type", [1] * 285, "none of its pieces is for what no piece holds"),
    ],
)
def test_pieces_that_contradict_themselves_are_refused(written, tmp_path, name, value, said):
    _, path = written(words=["▁", "a"], changes=[stating(f"tokenizer.ggml.{name}", value)])
    with pytest.raises(CheckpointError, match=said):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)


def test_a_mixture_of_experts_is_refused_by_its_tensors(written, tmp_path):
    experts = np.ones((8, 64, 96), np.float32)
    _, path = written(changes=[lambda writer: writer.add_tensor("blk.0.ffn_up_exps.weight", experts)])
    with pytest.raises(UserError, match="blk.0.ffn_up_exps.weight, which no plain llama model has"):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)


def test_an_unknown_quantisation_is_refused_by_name(written, tmp_path, monkeypatch):
    _, path = written(quantised=True)

    def cannot(*_, **__):
        raise NotImplementedError("no dequantisation")

    monkeypatch.setattr("gguf.quants.dequantize", cannot)
    monkeypatch.setattr("t2i.convert.gguf_file.AutoModelForCausalLM.from_pretrained", cannot)
    with pytest.raises(UserError, match="is quantised as F32, Q8_0, which cannot be undone here"):
        convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)


def test_another_class_and_an_unknown_end_token_are_refused_by_name(written, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="class mamba; expected one of llama, qwen2, qwen3"):
        convert_gguf(
            tmp_path / "other.gguf", end_token=None, text_tokenizer=None, out=tmp_path / "a", tell=print
        )
    _, path = written()
    with pytest.raises(UserError, match="--end-token </s>"):
        convert_gguf(path, end_token="</s>", text_tokenizer=None, out=tmp_path / "a", tell=print)


def test_what_else_lies_beside_a_file_is_neither_run_nor_loaded(written, tmp_path):
    _, path = written("llama")
    code = path.parent / "custom_generate" / "generate.py"
    code.parent.mkdir()
    code.write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    convert_gguf(path, out=tmp_path / "made", end_token=END, text_tokenizer=None, tell=print)
    assert not (tmp_path / "ran").exists()
    (path.parent / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/other"}')
    with pytest.raises(UserError, match="holds adapters of 'somebody/other'"):
        convert_gguf(path, out=tmp_path / "again", end_token=END, text_tokenizer=None, tell=print)


def test_a_tokenizer_of_another_model_is_refused_though_its_ids_fit(written, vocabulary, tmp_path):
    _, path = written()
    convert_gguf(path, end_token=None, text_tokenizer=None, out=tmp_path / "made", tell=print)
    given = {"end_token": None, "text_tokenizer": str(tmp_path / "made"), "tell": print}
    convert_gguf(path, out=tmp_path / "same", **given)
    with pytest.raises(UserError, match="--end-token </s> is not in the vocabulary of .*made"):
        convert_gguf(path, out=tmp_path / "other", **(given | {"end_token": "</s>"}))
    file = tmp_path / "made" / "tokenizer.json"
    words = json.loads(file.read_text())
    ids = words["model"]["vocab"]
    plain = sorted(ids, key=ids.get)[4:]
    words["model"]["vocab"] |= dict(zip(plain, (ids[token] for token in reversed(plain)), strict=True))
    file.write_text(json.dumps(words))
    with pytest.raises(
        UserError, match="is not that of .*llama.gguf: [0-9]+ of its [0-9]+ ids are other tokens"
    ):
        convert_gguf(path, out=tmp_path / "other", **given)
