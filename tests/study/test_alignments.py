"""Alignments compared image by image, of hits that are written by hand."""

import pytest
from made_runs import Made, write_json
from matplotlib import pyplot
from scipy import stats

from t2i.report.sections.registry import make_section
from t2i.study.hits import compare_hits
from t2i.study.spec import SectionSpec

ONES = {"image_to_text": 0.2, "text_to_image": 0.2, "chance": 0.1, "num_pairs": 40, "temperature": 0.07}


def written(folder, hits, *, share, keys=None):
    write_json(folder / "align.json", {"input": {**ONES, "image_to_text": share}, "settings": {}})
    write_json(folder / "metrics.jsonl", {"rows": "input", "step": 1, "loss": 1.0, "temperature": 0.07})
    keys = keys or [f"image-{place}" for place in range(len(hits))]
    write_json(folder / "hits.json", {"keys": keys, "spaces": {"input": {"image_to_text": hits}}})


def section(made, folder):
    found = make_section(
        SectionSpec("alignment", arguments={"folder": folder}), study=made.study, out=made.out
    )
    pyplot.close("all")
    return found


def test_two_alignments_are_compared_image_by_image(tmp_path):
    made = Made(tmp_path, fast=[0])
    plain, aligned = [1.0] * 8 + [0.0] * 32, [0.0] * 2 + [1.0] * 18 + [0.0] * 20
    written(tmp_path / "plain", plain, share=0.2)
    written(tmp_path / "aligned", aligned, share=0.45)
    found = section(made, {"plain": "{out}/plain", "aligned": "{out}/aligned"})
    assert [row[0] for row in found.table[1:]] == ["plain (input)", "aligned (input)"]
    assert "2.0 times as often as by chance (plain), 4.5 times as often as by chance (aligned)" in found.found
    p = stats.binomtest(12, 14).pvalue
    assert "By aligned (input), an image finds its caption 2.25 (95%: " in found.found
    assert f"12 are found better and 2 worse, McNemar's p = {p:.3g}" in found.found
    # Of other images, or of none, nothing is compared.
    written(tmp_path / "aligned", aligned, share=0.45, keys=[f"other-{place}" for place in range(40)])
    assert (
        "aligned and plain are not compared image by image"
        in section(made, {"plain": "{out}/plain", "aligned": "{out}/aligned"}).found
    )
    (tmp_path / "plain" / "hits.json").unlink()
    assert "are not compared" in section(made, {"plain": "{out}/plain", "aligned": "{out}/aligned"}).found
    alone = section(made, "{out}/aligned").found
    said = "Among held-out pairs, an image retrieves its caption at most 4.5 times as often as by chance"
    assert alone == f"{said}, each among those of its own style (4 styles)."
    # Two rules, of which the second is that of a source without styles.
    written(tmp_path / "other", aligned, share=0.45)
    write_json(tmp_path / "other" / "align.json", {"input": {**ONES, "chance": 1 / 40}})
    both = section(made, {"aligned": "{out}/aligned", "other": "{out}/other"}).found
    assert "(1 or 4 styles)" in both and "other and aligned are not compared image by image" in both
    # Forty pairs of one style, or of a source without styles.
    write_json(
        tmp_path / "one" / "align.json", {"input": {**ONES, "chance": 1 / 40, "image_to_text": 0.1125}}
    )
    write_json(
        tmp_path / "one" / "metrics.jsonl", {"rows": "input", "step": 1, "loss": 1.0, "temperature": 0.07}
    )
    assert section(made, "{out}/one").found == f"{said}."
    assert "none holds no finished alignment" in section(made, "{out}/none").found


def test_a_ratio_of_hits_has_the_interval_of_images_drawn_again():
    first = {str(place): float(place < 400) for place in range(1_000)}
    second = {str(place): float(place % 5 < 4) for place in range(1_000)}
    found = compare_hits(first, second)
    assert found.ratio == 2.0
    # The delta method, of independent hits at 0.4 and 0.8, in logarithms.
    error = (0.6 / 0.4 / 1_000 + 0.2 / 0.8 / 1_000) ** 0.5
    assert found.low == pytest.approx(2 * 2.718 ** (-1.96 * error), rel=0.02)
    assert found.high == pytest.approx(2 * 2.718 ** (1.96 * error), rel=0.02)
    nothing = compare_hits(dict.fromkeys(first, 0.0), second)
    assert nothing.ratio != nothing.ratio and nothing.p_value < 1e-9
    assert compare_hits(first, first).p_value == 1
