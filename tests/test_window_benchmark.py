"""benchmarks/window.py on tiny models: passes are timed whole, and every rule of guessing gives the same codes."""

import itertools

import pytest
import torch
from conftest import ROOT

from t2i.model.open_lm.sampling_open_lm import sample_codes


@pytest.fixture
def window(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import exactness
    import window

    monkeypatch.setattr(window, "SMOLLM2", exactness.TINY)
    yield window
    torch.set_num_threads(1)


def test_a_timed_pass_draws_and_guesses_and_is_undone(window):
    model = window.random_model(window.SMOLLM2, image_ids=window.CODEBOOK, dtype=torch.float32)
    halfway, rewind = window.half_an_image(model)
    batch, half = halfway.batch, window.NUM_CODES // 2
    before = batch.codes.clone()
    with torch.inference_mode():
        kept = [halfway.several(8)]
        # Eight draws, and as many guesses behind them as codes were kept.
        changed = (batch.codes != before)[0].nonzero()[:, 0].tolist()
        assert changed[0] == half and max(changed) >= half + 8
        drawn = batch.codes[0, half].item()
        rewind()
        assert torch.equal(batch.codes, before)
        kept.append(halfway.several(8))
        rewind()
        assert halfway.single() == [1] and batch.codes[0, half] == drawn
    assert kept[0] == kept[1]


def test_passes_of_every_window_are_timed_and_profiled(window):
    passes = {f"window {count}": 100.0 for count in window.WINDOWS}
    rows, shares = window.time_passes(passes, rounds=1)
    assert len(rows) == 6 and rows[-1].target == ">= 1.5" and all(row.ratio > 0 for row in rows)
    assert list(shares) == ["1 codes", "4 codes", "8 codes", "16 codes"]


def test_bigrams_are_counted_and_no_rule_changes_a_code(window, monkeypatch):
    import guesses
    from exactness import IMAGE_IDS, NUM_CODES, TINY

    trained = torch.randint(64, (5, NUM_CODES), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(guesses, "read_split", lambda *_: [{"codes": codes.numpy()} for codes in trained])
    chances = window.bigram_chances(None, codebook_size=64)
    wanted, pairs = torch.zeros(64, 64), 5 * (NUM_CODES - 1)
    for codes in trained.tolist():
        for first, second in itertools.pairwise(codes):
            wanted[first, second] += 1
            wanted[:, second] += 1 / pairs
    assert torch.allclose(chances, wanted / wanted.sum(1, keepdim=True), atol=1e-5)
    model = window.random_model(TINY, image_ids=IMAGE_IDS, dtype=torch.float64)
    how = {"empty_prompt": [1], "image_ids": IMAGE_IDS, "num_codes": NUM_CODES, "seeds": [0, 1], "top_k": 20}
    one_by_one = sample_codes(model, [[3], [4]], window=1, **how)
    passes = {}
    for name, rule in window.rules_of(chances).items():
        with window.guessing(rule), window.counting() as rows:
            assert torch.equal(sample_codes(model, [[3], [4]], window=4, **how), one_by_one), name
        passes[name] = sum(rows)
    assert len(passes) == len(set(passes.values())) == 5  # each guesses otherwise


def test_a_code_that_differs_is_held_against_the_rounding_of_its_margin(window, monkeypatch):
    import exactness

    found = window.compare(2, dtype=torch.float64)
    assert (found["codes compared"], found["codes that differ"]) == (2 * window.NUM_CODES, 0)
    assert found["margins below their own rounding"] == "0 of 0"

    def wrong_once(*given, window, **rest):
        codes = sample_codes(*given, window=window, **rest)
        codes[1, 9] += window > 1
        return codes

    monkeypatch.setattr(exactness, "sample_codes", wrong_once)
    found = window.compare(2, dtype=torch.float32)
    assert (found["codes compared"], found["codes that differ"]) == (window.NUM_CODES + 10, 1)
    # No close race: float32 and float64 agree on it.
    assert found["margins below their own rounding"] == "0 of 1"
    ((margin, truth),) = found["margins there and in float64"]
    assert margin == pytest.approx(truth, abs=1e-3) and margin > 0.001
    close, other = exactness.Decision(3, 1e-4), exactness.Decision(4, 1e-4)
    assert close.is_below_rounding(other) and close.is_below_rounding(exactness.Decision(3, 3e-4))
    assert not close.is_below_rounding(exactness.Decision(3, 1.5e-4))
