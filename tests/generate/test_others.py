"""Janus, Emu3 and Chameleon, randomly initialised and tiny: drawn as transformers' own classes draw them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig
from transformers.models.janus.configuration_janus import JanusVisionConfig, JanusVQVAEConfig

from t2i.config import ASSETS, SampleConfig
from t2i.errors import UserError
from t2i.generate.others.drawing import choose, draw_codes, draw_others_folder
from t2i.generate.others.kinds import kind_of, open_others

FIRST, BEGIN, PAD = 2_050, 2_051, 2_052
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GREEDY = SampleConfig(temperature=0, guidance_scale=1)
CAPTIONS = ["a red cup", "a very large blue cup on a table"]


def save(model, folder):
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "text_tokenizer" / "tokenizer.json")).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=2_056, bos_token_id=FIRST, pad_token_id=PAD, **SIZES)
    vision = JanusVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_image_tokens=16,
        projection_dim=32,
    )
    vq = JanusVQVAEConfig(
        num_embeddings=64,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
        projection_dim=32,
        image_token_embed_dim=32,
    )
    model = JanusForConditionalGeneration(
        JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=2_053)
    ).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=FIRST, pad_token_id=PAD, generation_kwargs={"boi_token_id": BEGIN}
    )
    return save(model, tmp_path_factory.mktemp("models") / "janus")


@pytest.fixture(scope="module")
def emu3(tmp_path_factory):
    torch.manual_seed(0)
    names = {"<image>": 2_053, "<|image start|>": BEGIN, "<|image token|>": 2_054, "<|extra_200|>": 2_055}
    names |= {f"<|visual token {code:06d}|>": 2_060 + code for code in range(64)}
    vq = Emu3VQVAEConfig(
        codebook_size=64,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        hidden_size=32,
    )
    text = Emu3TextConfig(vocab_size=2_130, bos_token_id=FIRST, pad_token_id=PAD, eos_token_id=2_129, **SIZES)
    model = Emu3ForConditionalGeneration(
        Emu3Config(vq_config=vq, text_config=text, vocabulary_map=names)
    ).eval()
    return save(model, tmp_path_factory.mktemp("models") / "emu3")


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory):
    torch.manual_seed(0)
    letters = ["".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) for code in range(1_024)]
    names = {f"IMGIMG{letter}Z": 2_060 + code for code, letter in enumerate(letters)}
    names |= {"<image>": 2_053, "<racm3:break>": BEGIN}
    vq = ChameleonVQVAEConfig(
        embed_dim=32,
        num_embeddings=1_024,
        latent_channels=32,
        resolution=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=1,
    )
    config = ChameleonConfig(
        vocab_size=3_090, bos_token_id=FIRST, vq_config=vq.to_dict(), vocabulary_map=names, **SIZES
    )
    model = ChameleonForConditionalGeneration(config).eval()
    folder = save(model, tmp_path_factory.mktemp("models") / "chameleon")
    shutil.copytree(ASSETS / "image_tokenizer", folder / "image_tokenizer")
    return folder


@pytest.fixture(params=["janus", "emu3", "chameleon"])
def opened(request):
    folder = request.getfixturevalue(request.param)
    return open_others(folder, image_size=8 if request.param == "emu3" else None)


@pytest.mark.parametrize("guidance_scale", [2, 5])
def test_janus_draws_what_transformers_generate_draws(janus, guidance_scale):
    opened = open_others(janus)
    settings = SampleConfig(temperature=0, guidance_scale=guidance_scale)
    found = draw_codes(opened, CAPTIONS, seeds=[0, 1], settings=settings)
    for caption, codes in zip(CAPTIONS, found, strict=True):
        ids = torch.tensor([opened.family.prompt(caption)])
        wanted = opened.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=False,
            guidance_scale=guidance_scale,
        )
        assert codes.tolist() == wanted[0].tolist()


def test_emu3_draws_what_transformers_generate_draws(emu3):
    """generate() with the rule that Emu3's page gives: codes, and the end of a line after each row."""
    opened = open_others(emu3, image_size=8)
    (found,) = draw_codes(opened, CAPTIONS[1:], seeds=[0], settings=GREEDY)
    names, prompt = opened.model.config.vocabulary_map, opened.family.prompt(CAPTIONS[1])
    codes = opened.model.model.vocabulary_mapping.image_tokens

    def allowed(_, ids):
        return [names["<|extra_200|>"]] if (len(ids) - len(prompt) + 1) % 5 == 0 else codes

    ids = torch.tensor([prompt])
    drawn = opened.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=20,
        prefix_allowed_tokens_fn=allowed,
    )[0, len(prompt) :]
    lines = drawn.reshape(4, 5)
    assert (lines[:, 4] == names["<|extra_200|>"]).all()
    assert found.tolist() == (lines[:, :4].flatten() - codes[0]).tolist()


@torch.inference_mode()
def test_chameleon_draws_code_by_code_without_a_cache(chameleon):
    opened = open_others(chameleon)
    (found,) = draw_codes(opened, CAPTIONS[:1], seeds=[0], settings=GREEDY)
    ids = opened.family.prompt(CAPTIONS[0])
    for code in found.tolist():
        hidden = opened.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        logits = opened.model.lm_head(hidden)[2_060 : 2_060 + 1_024]
        assert logits.argmax().item() == code
        ids.append(2_060 + code)


def test_codes_of_a_caption_do_not_depend_on_its_batch(opened):
    settings = SampleConfig(guidance_scale=3, top_k=20, seed=3)
    together = draw_codes(opened, CAPTIONS, seeds=[3, 4], settings=settings)
    alone = draw_codes(opened, CAPTIONS[1:], seeds=[4], settings=settings)
    assert together[1].tolist() == alone[0].tolist()
    other = draw_codes(opened, CAPTIONS[1:], seeds=[5], settings=settings)
    assert other[0].tolist() != alone[0].tolist()
    assert together.shape == (2, 16)


def test_images_go_through_its_own_tokenizer_and_back(opened):
    side = opened.image_size()
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side))).float()
    tokenizer = opened.needed_image_tokenizer()
    codes = tokenizer.encode(pixels)
    assert codes.shape == (2, 16) and tokenizer.decode(codes).shape == (2, 3, side, side)


def test_images_are_drawn_into_a_folder_that_is_resumed(opened, tmp_path):
    captions = {f"{place}": caption for place, caption in enumerate([*CAPTIONS, "a cup"])}
    draw = {"out": tmp_path, "config": SampleConfig(seed=7), "batch_size": 2}
    paths = draw_others_folder(opened, captions, **draw)
    first = [path.read_bytes() for path in paths]
    paths[2].unlink()
    assert [path.read_bytes() for path in draw_others_folder(opened, captions, **draw)] == first
    with pytest.raises(UserError, match="other weights|seed"):
        draw_others_folder(opened, captions, **{**draw, "config": SampleConfig(seed=8)})
    with pytest.raises(UserError, match="--best-of"):
        draw_others_folder(opened, captions, **{**draw, "config": SampleConfig(best_of=2)})
    with pytest.raises(UserError, match="--window"):
        draw_others_folder(opened, captions, **{**draw, "config": SampleConfig(window=8)})
    with pytest.raises(UserError, match="--best-by"):
        draw_others_folder(opened, captions, **{**draw, "config": SampleConfig(best_of=2, best_by="judge")})
    # Another size of an Emu3, or another image tokenizer beside a Chameleon.
    tokenizer = replace(opened.family.tokenizer, name="another")
    for other in (
        replace(opened, pixels_per_side=2 * opened.pixels_per_side),
        replace(opened, family=replace(opened.family, tokenizer=tokenizer)),
    ):
        with pytest.raises(UserError, match="image_size|another image tokenizer"):
            draw_others_folder(other, captions, **draw)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(400, 1)

    def drawn(**settings):
        generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
        return set(choose(logits, generators, settings=SampleConfig(**settings)).tolist())

    assert drawn(temperature=1, top_k=0) == {0, 1, 2, 3}
    assert drawn(temperature=1, top_k=2) == {1, 3}
    # Their shares are 0.64, 0.24, 0.09, 0.03.
    assert drawn(temperature=1, top_k=0, top_p=0.5) == {1}
    assert drawn(temperature=1, top_k=0, top_p=0.7) == {1, 3}
    assert drawn(temperature=0) == {1}


def test_other_folders_are_refused(janus, chameleon, model_folder, tmp_path):
    assert (kind_of(janus), kind_of(model_folder), kind_of(tmp_path)) == ("janus", None, None)
    with pytest.raises(UserError, match="a janus draws one size"):
        open_others(janus, image_size=8)
    assert [open_others(janus, dtype=dtype).dtype for dtype in ("auto", "bfloat16")] == [
        "float32",
        "bfloat16",
    ]
    copy = shutil.copytree(chameleon, tmp_path / "copy", ignore=shutil.ignore_patterns("image_tokenizer"))
    with pytest.raises(UserError, match="cannot decode images"):
        open_others(copy)


def test_each_is_scored_by_the_protocol_of_all_models(opened, shards, call, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, side = tmp_path / "out", opened.image_size()
    words = ["eval/coco_fid.py", opened.folder, "--num-samples", 10, "--out", out, "--bootstrap", 0]
    words += ["--image-size", side] if opened.kind == "emu3" else []
    assert call(*words) == 2  # it has no held-out images of its own
    assert call(*words, "--heldout-shards", shards) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores["rows"]) == {"real", "reconstructions", "model"}
    assert (scores["image_size"], scores["n"], scores["checkpoint"]) == (side, 10, str(opened.folder))
    assert "captions_heard" not in scores and scores["features"] == "efficientnet_lite0"
    assert {Image.open(path).size for path in (out / "model").glob("*.png")} == {(side, side)}


def test_a_model_folder_that_cannot_be_written_wants_another_out(janus, shards, call, tmp_path, capsys):
    # A file where the folder of the scores would be: even an administrator cannot write below it.
    folder = shutil.copytree(janus, tmp_path / "janus")
    (folder / "eval").write_text("")
    words = ["eval/coco_fid.py", folder, "--num-samples", 10, "--heldout-shards", shards]
    assert call(*words) == 2
    assert (
        f"{folder / 'eval'} cannot be written: Not a directory. Name another place with --out."
        in capsys.readouterr().err
    )
