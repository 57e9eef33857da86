"""Sentences and tables of a report, of runs whose numbers are written by hand."""

import csv
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from made_runs import IMAGES, Made, write_json
from matplotlib import pyplot
from scipy import stats

from t2i.errors import UserError
from t2i.report.sections.images import PUBLISHED
from t2i.report.sections.registry import check_sections, make_section
from t2i.study.spec import SectionSpec


@pytest.fixture
def section(tmp_path):
    """Make one section of a study; figures are closed."""

    def make(made, kind, **arguments):
        found = make_section(SectionSpec(kind, arguments=arguments), study=made.study, out=made.out)
        pyplot.close("all")
        return found

    return make


def column(found, head):
    """Read one column of a section's table, by what its head begins with."""
    (place,) = [place for place, name in enumerate(found.table[0]) if name.startswith(head)]
    return [row[place] for row in found.table[1:]]


def held_out(*values):
    return [{"image_loss": value} for value in values]


def test_curves_end_where_their_average_does(tmp_path, section):
    made = Made(tmp_path, fast=[0, 1])
    losses = [[5.0, 4.0, 2.0], [6.0, 4.0, 1.0]]
    for seed, values in enumerate(losses):
        made.run("fast", seed, train=[{"loss": value} for value in values], heldout=held_out(9.0, 8.0 - seed))
    found = section(made, "curves", arms=["fast"], values=["loss", "image_loss"])
    weights = np.array([0.95**2, 0.95, 1])
    ends = [float(weights @ values / weights.sum()) for values in losses]
    assert f"{np.mean(ends):.3f} (fast)" in found.found
    assert column(found, "held-out image_loss") == ["7.5000 (7.0000 to 8.0000)"]


def test_curves_without_a_finished_run_say_so_and_other_codes_have_other_baselines(tmp_path, section):
    made = Made(tmp_path, fast=[0], slow=[0])
    empty = section(made, "curves", arms=["fast", "slow"], values=["image_loss"])
    assert empty.found == "No run of fast, slow with image_loss is finished." and empty.figure is None
    assert column(section(made, "ends", arms=["fast"]), "ended") == ["not begun"]
    for arm, floor in (("fast", 4.0), ("slow", 4.5)):
        made.run(
            arm, 0, train=[{"image_loss": 5.0}], manifest={"floors_nats": {"heldout": {"unigram": floor}}}
        )
    found = section(made, "curves", arms=["fast", "slow"], values=["image_loss"])
    assert "in nats per token, of image_loss per code: image_loss ends at 5.000 (fast)" in found.found
    for arms, has in ((["fast"], True), (["fast", "slow"], False)):
        figure = section(made, "curves", arms=arms, values=["image_loss"]).figure
        assert ("unigram" in {text.get_text() for text in figure.axes[0].texts}) == has


def test_a_rise_is_said_of_an_arm_only_where_every_seed_rose(tmp_path, section):
    made = Made(tmp_path, fast=[0, 1], slow=[0, 1])
    for seed, (fast, slow) in enumerate([((5, 3, 4), (6, 3, 4)), ((5, 3.5, 3.4), (6, 3.6, 4.2))]):
        made.run("fast", seed, heldout=held_out(*fast))
        made.run("slow", seed, heldout=held_out(*slow))
    found = section(made, "comparison", arms=["fast", "slow"], value="image_loss").found
    assert "slow was lowest at 400 tokens, 3.300, and rose to 4.100" in found
    assert "fast was lowest" not in found
    assert "fast - slow is -0.4000 nats" in found


def test_comparisons_are_corrected_for_their_number(tmp_path, section):
    made = Made(tmp_path, base=[0, 1, 2, 3], sure=[0, 1, 2, 3], maybe=[0, 1, 2, 3], worse=[0, 1, 2, 3])
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    gaps = {"sure": -0.5 + noise, "maybe": -0.03 + noise, "worse": 0.01 + 3 * noise}
    for seed in range(4):
        made.run("base", seed, heldout=held_out(3.0))
        for arm, gap in gaps.items():
            made.run(arm, seed, heldout=held_out(3.0 + gap[seed]))
    found = section(made, "overview", pairs={arm: [arm, "base"] for arm in gaps})
    plain = [stats.ttest_1samp(gap, 0).pvalue for gap in gaps.values()]
    corrected = [3 * plain[0], 2 * plain[1], plain[2]]
    assert plain[0] < plain[1] < 0.05 < corrected[1] < corrected[2]  # so that the correction decides
    assert [float(cell) for cell in column(found, "p, corrected")] == pytest.approx(corrected, rel=1e-2)
    (place,) = [place for place, head in enumerate(found.table[0]) if head == "p"]
    assert [float(row[place]) for row in found.table[1:]] == pytest.approx(plain, rel=1e-2)
    assert "3 in all (2 differences of arms below zero)" in found.found
    assert "is seen in 1: sure." in found.found


def test_a_difference_is_compared_with_that_of_another_pair(tmp_path, section):
    made = Made(tmp_path, known=[0, 1, 2], plain=[0, 1, 2], aligned=[1, 2, 3], strange=[1, 2, 3])
    gaps = {0: (-0.1, None), 1: (-0.2, -0.5), 2: (-0.1, -0.3), 3: (None, -9.0)}
    for seed, pair in gaps.items():
        for (first, second), gap in zip((("known", "plain"), ("aligned", "strange")), pair, strict=True):
            if gap is not None:
                made.run(first, seed, heldout=held_out(3.0 + gap))
                made.run(second, seed, heldout=held_out(3.0))
    pairs = {"plain codes": ["known", "plain"], "aligned codes": ["aligned", "strange"]}
    found = section(made, "overview", pairs=pairs, against="plain codes")
    # Of the seeds that both pairs have.
    wanted = stats.ttest_1samp([-0.3, -0.2], 0).pvalue
    plain = [stats.ttest_1samp(gaps, 0).pvalue for gaps in ([-0.1, -0.2, -0.1], [-0.5, -0.3, -9.0])]
    assert "The difference of aligned codes minus plain codes is -0.2500 nats" in found.found
    assert column(found, "comparison")[2] == "aligned codes minus plain codes"
    # One family with the tests of the pairs.
    corrected = sorted([*plain, wanted]).index(wanted)
    assert corrected == 1
    assert f"paired over 2 seeds: p = {wanted:.3g}, corrected {2 * wanted:.3g}" in found.found
    assert "do not compare" not in found.found
    assert "minus" not in section(made, "overview", pairs=pairs).found
    with pytest.raises(UserError, match="against is plain; expected one of plain codes, aligned codes"):
        section(made, "overview", pairs=pairs, against="plain")


def codes_of(name, unigram):
    """Say in a manifest which image tokenizer made the codes, and what they cost by their frequencies."""
    maker = {"name": name, "fingerprint": name}
    return {"image_tokenizer": maker, "floors_nats": {"heldout": {"unigram": unigram}}}


def test_differences_on_two_image_tokenizers_compare_as_shares_of_what_was_learned(tmp_path, section):
    made = Made(tmp_path, known=[0, 1], plain=[0, 1], knows=[0, 1], aligned=[0, 1])
    # Beyond 6 nats the random arm learns 2 and 4, beyond 3 nats half a nat and one; the gaps are the same in nats.
    for seed, (plain, aligned) in enumerate([(4.0, 2.5), (2.0, 2.0)]):
        for arm, end, manifest in (
            ("known", plain - 0.25, codes_of("plain", 6.0)),
            ("plain", plain, codes_of("plain", 6.0)),
            ("knows", aligned - 0.25, codes_of("aligned", 3.0)),
            ("aligned", aligned, codes_of("aligned", 3.0)),
        ):
            made.run(arm, seed, heldout=held_out(9.0, end), manifest=manifest)
    pairs = {"plain codes": ["known", "plain"], "aligned codes": ["knows", "aligned"]}
    arguments = {"pairs": pairs, "against": "plain codes"}
    found = section(made, "overview", **arguments, relative_to="unigram")
    shares = column(found, "difference, share of what was learned beyond unigram")
    assert [one.split()[0] for one in shares] == ["-0.0938", "-0.3750", "-0.2812"]
    assert column(found, "learned by the second arm") == [
        "3.0000 (2.0000 to 4.0000)",
        "0.7500 (0.5000 to 1.0000)",
        "",
    ]
    test = stats.ttest_rel([-0.5, -0.25], [-0.125, -0.0625])
    assert "aligned codes minus plain codes is -0.2812 (95%:" in found.found
    assert f"paired over 2 seeds: p = {test.pvalue:.3g}" in found.found
    assert "nats" not in found.figure.axes[0].get_xlabel()
    in_nats = section(made, "overview", **arguments)
    assert "minus plain codes is +0.0000 nats" in in_nats.found
    assert "losses per code do not compare" in in_nats.found
    assert "image loss, nats per code" in in_nats.figure.axes[0].get_xlabel()
    with pytest.raises(UserError, match="relative_to is unigam; perhaps unigram was meant"):
        section(made, "overview", **arguments, relative_to="unigam")
    with pytest.raises(UserError, match="value text_loss; expected image_loss"):
        section(made, "overview", **arguments, relative_to="unigram", value="text_loss")


@pytest.mark.parametrize(("random", "said"), [((3.0, 2.0), "before the first"), ((9.0, 8.0), "not reached")])
def test_a_loss_that_no_token_count_is_known_for_is_said_as_the_table_says_it(
    tmp_path, section, random, said
):
    made = Made(tmp_path, pretrained=[0, 1], random=[0, 1])
    for seed in (0, 1):
        made.run("pretrained", seed, heldout=held_out(5.0, 4.0))
        made.run("random", seed, heldout=held_out(*random))
    found = section(made, "comparison", arms=["pretrained", "random"], value="image_loss")
    (text,) = found.figure.axes[2].texts
    assert said in text.get_text()
    assert all(said in cell for cell in column(found, "extra tokens"))


def test_worth_is_set_against_how_like_text_codes_are_seed_by_seed(tmp_path, section):
    kinds = {"plain": (1.5, 6.5, 6.0), "some": (2.0, 6.25, 5.5), "much": (4.0, 6.0, 4.5)}
    arms = {arm: [0, 1, 2] for name in kinds for arm in (f"{name}-known", f"{name}-random")}
    made = Made(tmp_path, **arms)
    worths = {"plain": [0.1, 0.2, 0.15], "some": [0.12, 0.26, 0.17], "much": [0.3, 0.5, 0.4]}
    for name, (retrieval, unigram, bigram) in kinds.items():
        floors = {"heldout": {"uniform": 7.0, "unigram": unigram, "bigram": bigram}}
        manifest = codes_of(name, unigram) | {"floors_nats": floors}
        for seed, worth in enumerate(worths[name]):
            # The random arm has learned two nats beyond 7, of which a share is the pre-trained one's worth.
            made.run(f"{name}-random", seed, heldout=held_out(9.0, 5.0), manifest=manifest)
            made.run(f"{name}-known", seed, heldout=held_out(9.0, 5.0 - 2 * worth), manifest=manifest)
        side = {"image_to_text": retrieval / 64, "text_to_image": 0.5, "chance": 1 / 64, "num_pairs": 64}
        write_json(tmp_path / name / "align.json", {"input": side | {"temperature": 0.1}})
    pairs = {name: [f"{name}-known", f"{name}-random"] for name in kinds}
    alignments = {name: f"{{out}}/{name}" for name in kinds}
    found = section(made, "slope", pairs=pairs, alignments=alignments)
    for place, name in enumerate(
        ("retrieval, times chance", "entropy, nats", "saved by the code before, nats")
    ):
        amounts = [
            (retrieval, unigram, unigram - bigram)[place] for retrieval, unigram, bigram in kinds.values()
        ]
        slopes = [
            stats.linregress(amounts, [worths[kind][seed] for kind in kinds]).slope for seed in range(3)
        ]
        test = stats.ttest_1samp(slopes, 0)
        assert (
            f"per unit of {name} {np.mean(slopes):+.4f} (95%: {test.confidence_interval().low:+.4f}"
            in found.found
        )
        assert f"p = {test.pvalue:.3g}, corrected" in found.found
        assert column(found, name) == [f"{amount:.3f}" for amount in amounts]
    assert column(found, "worth, share")[2] == "+0.4000 (+0.3000 to +0.5000)"
    # Whatever the image tokenizers are called, panels keep their width.
    found.figure.tight_layout()
    edges = [axis.get_window_extent() for axis in found.figure.axes]
    legend = found.figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(kinds)
    assert legend.get_window_extent().y0 >= edges[0].y1 and edges[0].width > 0.25 * found.figure.bbox.width
    (tmp_path / "much" / "align.json").unlink()
    left = section(made, "slope", pairs=pairs, alignments=alignments)
    assert left.found == (
        "2 image tokenizers have finished runs that learned something beyond the uniform cost, and an alignment; a line"
        " takes 3."
    )
    with pytest.raises(UserError, match="alignments has no folder for much, which is in pairs"):
        section(made, "slope", pairs=pairs, alignments={name: alignments[name] for name in ("plain", "some")})
    with pytest.raises(UserError, match="slope: pairs has 2 image tokenizers; a line takes 3"):
        section(made, "slope", pairs={name: pairs[name] for name in ("plain", "some")}, alignments=alignments)
    with pytest.raises(UserError, match="slope: relative_to is unigam; perhaps unigram was meant"):
        section(made, "slope", pairs=pairs, alignments=alignments, relative_to="unigam")


def test_image_tokenizers_stand_side_by_side_with_what_tells_their_codes_apart(tmp_path, section):
    made = Made(tmp_path, fast=[0])
    for name, psnr, unigram in (("plain", 24.5, 6.5), ("aligned", 22.0, 6.25)):
        folder = tmp_path / name
        write_json(folder / "manifest.json", IMAGES | codes_of(name, unigram))
        pyplot.imsave(folder / "reconstructions.png", np.zeros((4, 8)))
        (folder / "image_tokenizer").mkdir()
        row = f"| {psnr:.2f} dB | 0.9000 | 87.5% | 9.00 |"
        (folder / "image_tokenizer" / "README.md").write_text(f"# Image tokenizer\n\n| PSNR |\n{row}\n")
    both = section(
        made, "reconstructions", shards={"plain": "{out}/plain", "aligned": "{out}/aligned", "no": "x"}
    )
    assert both.table[1] == ["plain", "24.50", "0.9000", "87.5%", "6.5000", "16", "8"]
    assert both.table[2] == ["aligned", "22.00", "0.9000", "87.5%", "6.2500", "16", "8"]
    assert (
        "16 codes of 8 (plain) and 16 codes of 8 (aligned)" in both.found and "x has no recon" in both.found
    )
    (tmp_path / "plain" / "image_tokenizer" / "README.md").unlink()
    alone = section(made, "reconstructions", shards="{out}/plain")
    assert alone.table[1:] == [["plain", "-", "-", "-", "6.5000", "16", "8"]]
    assert "meaning" in both.found and "meaning" not in alone.found


def test_an_arm_that_learned_nothing_has_no_share(tmp_path, section):
    made = Made(tmp_path, known=[0, 1], plain=[0, 1])
    for seed, end in enumerate((2.0, 3.5)):
        made.run("known", seed, heldout=held_out(2.0), manifest=codes_of("plain", 3.0))
        made.run("plain", seed, heldout=held_out(end), manifest=codes_of("plain", 3.0))
    found = section(made, "overview", pairs={"codes": ["known", "plain"]}, relative_to="unigram")
    assert "Without a share: codes." in found.found and not found.table


def test_what_a_caption_is_worth_is_told_apart_for_none_and_a_strangers(tmp_path, section):
    made = Made(tmp_path, fast=[0, 1])
    for seed in (0, 1):
        row = {
            "image_loss": 2.0 + seed,
            "image_loss_empty_caption": 2.5 + seed,
            "image_loss_wrong_caption": 2.75 + seed,
        }
        made.run("fast", seed, heldout=[row], manifest={"codes_per_image": 16})
    found = section(made, "conditioning", arms=["fast"])
    assert "fast: 8.0 nats per image" in found.found
    assert [cell.split()[0] for cell in found.table[1][1:]] == [
        "2.5000",
        "3.0000",
        "3.2500",
        "8.0000",
        "12.0000",
    ]


def test_losses_by_place_are_compared_place_by_place(tmp_path, section):
    made = Made(tmp_path, fast=[0], slow=[0])
    grids = {"fast": [1.0, 2.0, 3.0, 9.0], "slow": [2.0, 3.0, 4.0, 5.0]}
    for arm, codes in grids.items():
        folder = made.run(arm, 0, heldout=held_out(3.0))
        nats = {kind: {"nats": 1.0} for kind in ("text", "image", "special", "total")}
        split = {**nats, "image_loss_by_code": codes, "bits_per_pixel": 0.5}
        write_json(folder / "perplexity.json", {"splits": {"heldout": split}})
    found = section(made, "places", arms=["fast", "slow"]).found
    assert "fast: first row 1.500, last row 6.000" in found
    assert "fast costs less than slow at 75% of the positions" in found
    split["image_loss_by_code"] = [3.0] * 9
    write_json(made.folder("slow", 0) / "perplexity.json", {"splits": {"heldout": split}})
    other = section(made, "places", arms=["fast", "slow"])  # nine codes beside four
    assert "first row 3.000" in other.found and "costs less" not in other.found
    split["image_loss_by_code"] = [3.0] * 6
    for arm in grids:
        write_json(made.folder(arm, 0) / "perplexity.json", {"splits": {"heldout": split}})
    bare = section(made, "places", arms=["fast", "slow"])
    assert "with a square grid" in bare.found and len(bare.table) == 3


def test_distances_are_those_of_the_newest_checkpoint(tmp_path, section):
    made = Made(tmp_path, fast=[0, 1, 2])
    for seed, (first, last) in enumerate([(9.0, 1.0), (8.0, 2.0), (7.0, 3.0)]):
        folder = made.run("fast", seed, heldout=held_out(5.0, 2.0 + seed))
        for step, distance in ((2, first), (4, last)):
            scores = {"fd": distance, "n": 20, "features": "some"}
            write_json(folder / "eval" / f"step_{step:06d}" / "scores.json", scores)
    found = section(made, "agreement", arms=["fast"], measure="fd")
    assert column(found, "fd") == ["1", "2", "3"]
    assert "+1.00 over 3 runs" in found.found  # both orders alike; the first distances fall
    for file in tmp_path.rglob("scores.json"):  # distances that are all one have no order
        write_json(file, {"fd": 1.0, "n": 20, "features": "some"})
    assert "unknown over 3 runs" in section(made, "agreement", arms=["fast"], measure="fd").found


def test_forgetting_goes_from_the_first_to_the_last_measure(tmp_path, section):
    made = Made(tmp_path, fast=[0])
    text = [
        {"text_loss_text_rows": loss, "leaked": leak} for loss, leak in ((2.0, 0.0), (3.0, 0.25), (4.5, 0.5))
    ]
    settings = {"train": {"eval_text": str(tmp_path / "none")}}
    made.run("fast", 0, heldout=held_out(9.0, 8.0, 7.0), text=text, settings=settings)
    found = section(made, "forgetting", arms=["fast"])
    assert "fast from 2.00 to 4.50" in found.found
    assert found.table[1] == ["fast", "2.000", "4.500", "50.00%", "7.0000"]


def test_captions_cost_so_many_times_what_text_does(tmp_path, section):
    made = Made(tmp_path, fast=[0])
    costs = {
        "text": {"perplexity": 12.0, "perplexity_text_rows": 10.0, "num_tokens": 90},
        "captions": {"perplexity": 60.0, "perplexity_text_rows": 40.0, "num_tokens": 30},
    }
    model = {"ckpt": "x", "costs": costs, "completions": ["and so on"]}
    write_json(tmp_path / "forgetting.json", {"prompts": ["Once"], "models": {"model": model}})
    found = section(made, "captions", files={"fast": "{out}/forgetting.json"})
    assert "4.00 times that of text (fast)" in found.found
    assert found.table[1][1:5] == ["12.00", "10.00", "60.00", "40.00"]
    completions = section(made, "completions", files={"fast": "{out}/forgetting.json"})
    assert completions.table[1:] == [["Once", "fast", "and so on", "10.00"]]


def test_shares_of_gradients_are_images_to_text(tmp_path, section):
    made = Made(tmp_path, fast=[0])

    def part(tokens, norm):
        shares = {"token_share": tokens / 100, "loss_share": 0.25, "norm_share": 0.5}
        return {"tokens": tokens, "norm": norm, "norm_layers": norm / 2, **shares}

    gradients = {
        "text": part(20, 0.5),
        "image": part(70, 2.0),
        "special": part(10, 0.25),
        "cosine_text_image": 0.1,
    }
    write_json(tmp_path / "gradients.json", gradients)
    found = section(made, "shares", files={"fast": "{out}/gradients.json"})
    assert "fast: 3.5 image tokens" in found.found
    assert "gradient norms of image to text 4.00" in found.found
    assert found.table[2][2:] == ["70.00%", "25.00%", "50.00%", "2", "1"]
    write_json(tmp_path / "gradients.json", {**gradients, "text": part(0, 0.0), "cosine_text_image": None})
    found = section(made, "shares", files={"fast": "{out}/gradients.json"})
    assert "fast: no text token" in found.found and "inf" not in found.found


def nearest_file(tmp_path, **random_nearer):
    def side(share):
        return {
            **{kind: {"0.50": value} for kind, value in (("image", 0.6), ("text", 0.8), ("random", 0.3))},
            "cosines": {"image": [0.5, 0.7], "text": [0.8, 0.8], "random": [0.2, 0.4]},
            "compared": {"random_nearer": share},
            "nearest_tokens": [["a", "b"], ["c", "d"]],
            "cka": 0.75,
        }

    return write_json(tmp_path / "nearest.json", {name: side(share) for name, share in random_nearer.items()})


def test_embeddings_are_set_beside_noise(tmp_path, section):
    made = Made(tmp_path, fast=[0])
    nearest_file(tmp_path, input=0.2, output=0.4)
    summary = {
        "input": {
            "image_to_text": 0.3,
            "text_to_image": 0.2,
            "chance": 0.1,
            "num_pairs": 10,
            "temperature": 0.07,
        },
        "settings": {},
    }
    write_json(tmp_path / "aligned" / "align.json", summary)
    row = {"rows": "input", "step": 1, "loss": 1.0, "temperature": 0.07}
    write_json(tmp_path / "aligned" / "metrics.jsonl", row)
    files = {"fast": "{out}/nearest.json"}
    found = section(made, "nearest", files=files)
    assert "20% (fast)" in found.found
    assert found.table[1][:5] == ["fast", "0.600", "0.300", "0.800", "20.0%"]
    probe = section(made, "probe", folder="{out}/aligned", files=files)
    assert [row[2] for row in probe.table[1:]] == ["30.00%", "20.00%", "80.0%", "0.750", "60.0%", "0.750"]
    assert "3.0 times as often as chance" in probe.found
    assert "3.0 times as often as by chance" in section(made, "alignment", folder="{out}/aligned").found


def test_data_sizes_count_the_samples_that_were_kept(tmp_path, section):
    made = Made(tmp_path, few_fast=[0, 1], few_slow=[0, 1], fast=[0, 1], slow=[0, 1])
    for arm, every, loss in (("fast", 1, 2.0), ("slow", 1, 2.25), ("few_fast", 4, 3.0), ("few_slow", 4, 3.5)):
        for seed in (0, 1):
            settings, manifest = {"data": {"subsample_every": every}}, {"counts": {"train": 10}}
            made.run(arm, seed, heldout=held_out(loss + seed), settings=settings, manifest=manifest)
    pairs = [["few_fast", "few_slow"], ["fast", "slow"]]
    found = section(made, "sizes", pairs=pairs, names=["pre-trained", "random"])
    assert column(found, "training samples") == ["3", "10"]
    assert "-0.5000 nats with 3 samples; -0.2500 nats with 10 samples" in found.found


def test_a_language_models_perplexity_is_that_of_its_last_held_out_loss(tmp_path, section):
    made = Made(tmp_path, fast=[0])
    manifest = {
        "documents": {"train": 12},
        "sequence_tokens": 9,
        "source": "text:x",
        "gathered_sha256": "0" * 64,
        "floors_nats": {"heldout": {"uniform": 7.0, "unigram": 5.0, "bigram": 4.0}},
    }
    folder = made.run("fast", 0, heldout=[{"text_loss": 3.0}, {"text_loss": 2.0}], manifest=manifest)
    found = section(made, "pretraining", folder=str(folder)).found
    assert f"a perplexity of {math.e**2:.1f}" in found
    assert f"{math.e**5:.0f} (unigram) and {math.e**4:.0f} (bigram)" in found


def test_published_numbers_are_counted_by_kind(tmp_path, section):
    with PUBLISHED.open() as file:
        rows = list(csv.reader(file))[1:]
    used = [row for row in rows if row[3] == "yes"]
    found = section(Made(tmp_path, fast=[0]), "published")
    assert f"Of {len(rows)} published numbers, {len(used)} are of models with a pre-trained" in found.found
    assert all((row[0] in found.found) == (row in used and row[2] == "auto-regressive") for row in rows)
    assert len(found.table) == 1 + len(rows)


def test_budgets_are_equal_in_steps_tokens_and_all_that_was_spent(tmp_path, section):
    made = Made(tmp_path, pretrained=[0, 1], random=[0, 1])
    rate = [{"flops_per_second": 60.0, "tokens_per_second": 10.0}] * 4  # 6 FLOPs a token, 4,800 in a run
    for seed in (0, 1):
        made.run("pretrained", seed, train=rate, heldout=held_out(5.0, 4.0, 3.0, 2.0 + seed / 10))
        made.run("random", seed, train=rate, heldout=held_out(7.0, 5.0, 3.0, 2.4))
    found = section(made, "budgets", arms=["pretrained", "random"], charged={"pretrained": 1200.0})
    assert column(found, "at") == ["8", "800", "4,800"]
    # With 1,200 charged, 4,800 are spent after 600 tokens: the loss of the third measurement.
    assert column(found, "pretrained") == ["2.0500", "2.0500", "3.0000"]
    assert column(found, "random") == ["2.4000", "2.4000", "2.4000"]
    assert column(found, "difference")[0].startswith("-0.3500 (95%:")
    assert column(found, "difference")[2].startswith("+0.6000 (95%:")
    dear = section(made, "budgets", arms=["pretrained", "random"], charged={"pretrained": 48_000.0})
    assert column(dear, "difference")[2] == "none: no equal point"
    assert "by its first measurement pretrained had cost 10.2 times the whole run of the other" in dear.found


def test_a_loss_before_the_end_is_said_to_be_of_a_learning_rate_that_still_falls(tmp_path, section):
    for least, is_said in ((0.05, True), (1.0, False)):
        made = Made(tmp_path, pretrained=[0, 1], random=[0, 1])
        rate = [{"flops_per_second": 60.0, "tokens_per_second": 10.0}] * 4
        for arm, seed in itertools.product(("pretrained", "random"), (0, 1)):
            losses = held_out(5.0, 4.0, 3.0, 2.0 + seed / 10)
            made.run(arm, seed, train=rate, heldout=losses, settings={"train": {"min_lr_ratio": least}})
        arms = ["pretrained", "random"]
        said = "would end lower"
        assert said not in section(made, "budgets", arms=arms).found  # all three ends are equal
        charged = section(made, "budgets", arms=arms, charged={"pretrained": 1200.0}).found
        assert ("pretrained is read before its end" in charged and said in charged) == is_said
        assert (said in section(made, "comparison", arms=arms, value="image_loss").found) == is_said


def test_an_arm_that_goes_on_is_read_where_the_other_ends_and_that_is_said(tmp_path, section):
    """The random start trains longer, for what the other's pre-training cost."""
    for least, is_said in ((0.05, True), (1.0, False)):
        made = Made(tmp_path, pretrained=[0, 1], random=[0, 1])
        rate = [{"flops_per_second": 60.0, "tokens_per_second": 10.0}]
        for seed in (0, 1):
            settings = {"train": {"min_lr_ratio": least}}
            made.run("pretrained", seed, train=rate * 2, heldout=held_out(5.0, 4.0), settings=settings)
            losses = held_out(7.0, 6.0, 5.0, 4.5, 4.0, 3.5 + seed / 10)
            made.run("random", seed, train=rate * 6, heldout=losses, settings=settings)
        arms = ["pretrained", "random"]
        # 2,400 charged and 2,400 spent: what the random start has spent at its fourth measurement.
        found = section(made, "budgets", arms=arms, charged={"pretrained": 2400.0})
        assert column(found, "at") == ["4", "400", "4,800"]
        assert column(found, "pretrained") == ["4.0000"] * 3
        assert column(found, "random") == ["6.0000", "6.0000", "4.5000"]
        assert ("random is read before its end" in found.found) == is_said
        pair = section(made, "comparison", arms=arms, value="image_loss")
        assert "pretrained - random is -2.0000 nats" in pair.found
        # Five measurements, 600 tokens after the loss that the other ends with.
        assert column(pair, "extra tokens") == ["400 (95%: 400 to 400)", "600 (95%: 600 to 600)"]
        whole = section(made, "overview", pairs={"start": arms})
        for one in (pair, whole):
            assert "random is read at step 4 of 12, the last that both have" in one.found
            assert ("last that both have, where its learning rate still falls" in one.found) == is_said
            assert "pretrained is read" not in one.found


def test_the_run_that_made_a_start_is_charged_as_it_says(tmp_path, section):
    made = Made(tmp_path, pretrained=[0], random=[0], before=[0])
    rate = [{"flops_per_second": 60.0, "tokens_per_second": 10.0}] * 2
    for arm in ("pretrained", "random"):
        made.run(arm, 0, train=rate, heldout=held_out(5.0, 4.0))
    made.run("before", 0, train=[{"flops_per_second": 1.0, "tokens_per_second": 10.0}])
    charged = {"pretrained": "{out}/runs/before-seed0"}
    found = section(made, "budgets", arms=["pretrained", "random"], charged=charged)
    assert "Charged: pretrained: 20 FLOPs before its first step." in found.found
    with pytest.raises(UserError, match="charged is '{out}/nothing'"):
        section(made, "budgets", arms=["pretrained", "random"], charged={"random": "{out}/nothing"})


def test_what_is_charged_is_one_of_the_arms_and_asked_for_once_there_are_runs(tmp_path, section):
    made = Made(tmp_path, pretrained=[0], random=[0])
    charged = {"pretrained": "{out}/not-yet"}
    found = section(made, "budgets", arms=["pretrained", "random"], charged=charged)
    assert "no finished runs" in found.found
    with pytest.raises(UserError, match="charged names arm pretraind; perhaps pretrained was meant"):
        section(made, "budgets", arms=["pretrained", "random"], charged={"pretraind": 1.0})


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("comparison", {"arms": ["a"], "value": "loss"}, "arms is .'a'.; expected a list of 2"),
        ("comparison", {"arms": "ab", "value": "loss"}, "arms is 'ab'; expected a list of 2"),
        ("overview", {"pairs": [["a", "b"]]}, "pairs is .*; expected names with values"),
        ("overview", {"pairs": {"x": ["a", 1]}}, r"pairs.x\[1\] is 1; expected a text"),
        ("budgets", {"arms": ["a", "b"], "charged": {"a": []}}, "charged.a is .*expected a text or a number"),
        ("curves", {"arms": [], "values": ["loss"]}, "arms is empty"),
        (
            "curves",
            {"arms": ["a"], "values": ["loss"], "perplexity": 1},
            "perplexity is 1; expected true or false",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused_before_anything_runs(tmp_path, kind, arguments, said):
    study = replace(Made(tmp_path, a=[0], b=[0]).study, report=[SectionSpec(kind, arguments=arguments)])
    with pytest.raises(UserError, match=said):
        check_sections(study)


def test_what_is_drawn_stands_by_arm_with_a_test_of_two(tmp_path, section):
    made = Made(tmp_path, known=[0, 1, 2], random=[0, 1, 2])
    judged = {"known": [0.6, 0.7, 0.65], "random": [0.5, 0.55, 0.52]}
    for arm, values in judged.items():
        for seed, judge in enumerate(values):
            folder = made.run(arm, seed, heldout=held_out(3.0))
            scores = {"judge": judge, "mind_efficientnet_lite0": 100 * judge, "n": 128, "features": "lite0"}
            write_json(folder / "eval" / "step_000002" / "scores.json", scores)
    both = ["judge", "mind_efficientnet_lite0"]
    found = section(made, "scores", arms=["known", "random"], measures=both)
    assert column(found, "judge") == ["0.65 (0.6 to 0.7)", "0.5233 (0.5 to 0.55)"]
    assert column(found, "images") == ["128", "128"] and column(found, "seeds") == ["3", "3"]
    plain = stats.ttest_rel(judged["known"], judged["random"]).pvalue
    assert "known - random, paired t-tests over 3 seeds" in found.found
    assert found.found.count(f"p = {2 * plain:.3g}") == 2  # two tests of the same order, corrected
    # A run without one of the measures is left out, of a test too.
    without = {"judge": 0.6, "n": 128, "features": "lite0"}
    write_json(made.folder("known", 0) / "eval" / "step_000002" / "scores.json", without)
    assert column(section(made, "scores", arms=["known", "random"], measures=both), "seeds") == ["2", "3"]
    assert (
        "No run has clip and judge"
        in section(made, "scores", arms=["known"], measures=["clip", "judge"]).found
    )


def test_wordings_are_worth_what_a_shuffled_caption_costs_more(tmp_path, section):
    made = Made(tmp_path, pretrained=[0, 1], random=[0, 1])
    for arm, worth in (("pretrained", 0.5), ("random", 0.2)):
        for seed in (0, 1):
            made.run(arm, seed, heldout=held_out(3.0))
            losses = {"num_pictures": 40, "own": 3.0, "wrong": 3.0 + worth + seed / 10, "empty": 3.3}
            splits = {"combinations": {"captions": losses}, "combinations-french": {"captions": losses}}
            splits["alone"] = {"captions": losses | {"wrong": None}}
            write_json(made.folder(arm, seed) / "perplexity.json", {"splits": splits})
    found = section(made, "wordings", arms=["pretrained", "random"])
    assert column(found, "held-out images") == ["combinations", "combinations-french"]
    assert found.table[1][2] == "0.5500 (0.5000 to 0.6000)"
    assert column(found, "pretrained - random")[1].startswith("+0.3000 (95%: +0.3000 to +0.3000)")
    assert "Rows are of different images, so that they do not compare" in found.found
    assert not any("training captions" in head or "usual" in head for head in found.table[0])


def test_other_wordings_cannot_tell_before_the_usual_one_is_worth_anything(tmp_path, section):
    made = Made(tmp_path, pretrained=[0, 1, 2], random=[0, 1, 2])
    worths = {"pretrained": [0.5, 0.4, 0.6], "random": [0.02, -0.01, 0.01]}
    for arm, values in worths.items():
        for seed, worth in enumerate(values):
            made.run(arm, seed, heldout=held_out(3.0))
            # What is seen by other words does not stand in for it.
            other = {"num_pictures": 30, "own": 3.0, "wrong": 3.5 + worth / 10, "empty": None}
            splits = {
                "heldout": {"captions": {"num_pictures": 40, "own": 3.0, "wrong": 3.0 + worth}},
                "heldout-french": {"captions": other, "label_captions": other},
            }
            write_json(made.folder(arm, seed) / "perplexity.json", {"splits": splits})
    found = section(made, "wordings", arms=["pretrained", "random"]).found
    low, high = stats.ttest_1samp(worths["random"], 0).confidence_interval()
    said = f"worth anything to random (heldout +0.0067 (95%: {low:+.4f} to {high:+.4f})): before"
    assert said in found
    assert "worth anything" not in section(made, "wordings", arms=["pretrained"]).found
    for seed in (1, 2):  # a single seed shows nothing, either way
        (made.folder("random", seed) / "perplexity.json").unlink()
    assert "worth anything" not in section(made, "wordings", arms=["random"]).found


def test_wordings_are_corrected_for_their_number_and_stand_beside_the_usual_captions(tmp_path, section):
    made = Made(tmp_path, pretrained=[0, 1, 2], random=[0, 1, 2])
    worths = {
        "pretrained": ([0.5, 0.4, 0.6], [0.3, 0.1, 0.35]),
        "random": ([0.2, 0.2, 0.25], [0.2, 0.1, 0.1]),
    }
    for arm, (usual, french) in worths.items():
        for seed in range(3):
            made.run(arm, seed, heldout=held_out(3.0))
            splits = {
                "heldout": {"captions": {"num_pictures": 40, "own": 3.0, "wrong": 3.0 + usual[seed]}},
                "heldout-french": {
                    "captions": {"num_pictures": 30, "own": 3.0, "wrong": 3.0 + french[seed]},
                    "label_captions": {"num_pictures": 30, "own": 3.0, "wrong": 3.5, "empty": None},
                },
            }
            write_json(made.folder(arm, seed) / "perplexity.json", {"splits": splits})
    found = section(made, "wordings", arms=["pretrained", "random"])
    plain = [stats.ttest_rel(*(worths[arm][split] for arm in worths)).pvalue for split in (0, 1)]
    assert plain[0] < plain[1]
    (place,) = [place for place, head in enumerate(found.table[0]) if head == "p, corrected"]
    corrected = [float(row[place]) for row in found.table[1:]]
    assert corrected == pytest.approx([2 * plain[0], max(2 * plain[0], plain[1])], rel=1e-2)
    assert column(found, "pretrained, the same images by their usual") == ["-", "0.5000 (0.5000 to 0.5000)"]
    assert "compares with that of the usual captions in its own row" in found.found
    assert "no room" not in found.found
    splits["heldout-french"]["cut_captions"] = 7
    write_json(made.folder("random", 2) / "perplexity.json", {"splits": splits})
    again = section(made, "wordings", arms=["pretrained", "random"]).found
    assert again == f"{found.found} Sequences had no room for the ends of some captions: 7 in heldout-french."


def test_a_wordings_words_are_looked_up_in_training_captions(tmp_path, section, monkeypatch):
    captions = {
        "train": ["Red octopus, Noto style", "a dog, Noto style"],
        "heldout-tags": ["dog puppy, noto style"],
        "heldout-french": ["chien roux"],
    }
    made = Made(tmp_path, fast=[0])
    counts = {split: len(of_split) for split, of_split in captions.items()}
    manifest = {"counts": counts, "files": {f"{split}/index.json": "0" for split in counts}}
    settings = {"data": {"shards": str(tmp_path / "shards")}}
    folder = made.run("fast", 0, heldout=held_out(3.0), manifest=manifest, settings=settings)
    losses = {"captions": {"num_pictures": 4, "own": 3.0, "wrong": 3.5}}
    write_json(folder / "perplexity.json", {"splits": {"heldout-tags": losses, "heldout-french": losses}})
    head = "its words in training captions"
    assert head not in section(made, "wordings", arms=["fast"]).table[0]  # the shards are not here
    write_json(tmp_path / "shards" / "manifest.json", IMAGES | manifest)
    read = lambda folder, split: [{"caption": one} for one in captions[split]]  # noqa: E731
    monkeypatch.setattr("t2i.study.words.read_split", read)
    assert column(section(made, "wordings", arms=["fast"]), head) == ["75.0%", "0.0%"]
    write_json(tmp_path / "shards" / "manifest.json", IMAGES | manifest | {"files": {}})
    assert head not in section(made, "wordings", arms=["fast"]).table[0]  # others lie there now
