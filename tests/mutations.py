"""Would the tests notice? Break one line at a time, and run the tests nearest to it.

    python tests/mutations.py                 all of them, about a quarter of an hour on one core (make mutations)
    python tests/mutations.py --list          what there is
    python tests/mutations.py --only NAME     those whose name holds NAME

Each mutation is a mistake that a person could make: an index that is off by one, two arguments swapped, a wrong
normaliser. It is made in a copy of the package in a temporary folder, never in the checkout. Then the test files that
it names, which are of the same package, run until the first failure. A mutation is noticed if one fails. At least 38
of 40 must be, or the exit status is 1. It is 2 if a mutation does not apply, whose old text must stand once in its
file, or if a test fails without any mutation.

Who changes mathematics or a measure adds a line here, and sees it noticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import processes

ROOT = Path(__file__).parents[1]
COPIED = ("t2i", "tests", "launchers", "eval", "ds_configs", "docs", "pyproject.toml", "README.md", "LICENSE")
"""What tests read of a checkout."""
LEAST_NOTICED = 38 / 40
TIMEOUT_SECONDS = 900
FAILED = 1
"""pytest's exit status where tests failed; others say that it could not run them."""


@dataclass(frozen=True)
class Mutation:
    """One line of the package, changed to what a mistake would have made of it."""

    name: str
    file: str
    old: str
    """Of the code alone; it stands once in the file."""
    new: str
    wrong: str
    """What goes wrong."""
    tests: tuple[str, ...]
    """Files, of which at least one must fail."""


TOKENS_VOCAB = ("tests/tokens/test_vocab.py",)
TOKENS_SEQUENCE = ("tests/tokens/test_sequence.py",)
TOKENS_IMAGE = ("tests/tokens/test_image.py",)
TOKENS_TEXT = ("tests/tokens/test_text.py", "tests/tokens/test_kinds.py")
LOSS = ("tests/model/test_loss.py",)
LEARN = ("tests/model/test_trainable.py",)
CODES = ("tests/model/test_code_embeddings.py",)
OPEN_LM = ("tests/model/test_open_lm.py",)
SAMPLING = ("tests/model/test_sampling.py", "tests/model/test_open_lm.py")
ANY_CLASS = ("tests/model/test_decoding_any.py",)
GPU = ("tests/train/test_before_a_gpu.py",)
WINDOW = ("tests/model/test_window.py",)
DATA = ("tests/data/test_loader.py", "tests/data/test_shards.py")
HELDOUT = ("tests/measure/test_heldout.py",)
SENSITIVITY = ("tests/measure/test_caption_sensitivity.py",)
FORGETTING = ("tests/measure/test_text_cost.py", "tests/measure/test_forgetting.py")
GRADIENTS = ("tests/measure/test_gradients.py",)
PERPLEXITY = ("tests/measure/test_perplexity.py",)
NEAREST = ("tests/measure/test_embeddings.py",)
FRECHET = ("tests/measure/test_distances.py",)
MEASURES = ("tests/measure/test_measures.py",)
PLAY = ("tests/play/test_drawing.py", "tests/play/test_measuring.py")
BEST_OF = ("tests/generate/test_best_of.py",)
JUDGE = ("tests/measure/test_judge.py",)
SCORE = ("tests/measure/test_score.py", "tests/measure/test_coco.py")
RECONSTRUCTION = ("tests/measure/test_reconstruction.py",)
SHUFFLED = ("tests/measure/test_shuffled.py",)
ICONS = ("tests/data/test_icons.py",)
TUNING = ("tests/study/test_tuning.py",)
ALIGNED_CODES = ("tests/image_tokenizer/test_alignment.py",)
STATISTICS = ("tests/study/test_statistics.py",)
ARMS = ("tests/study/test_arms.py",)
SECTIONS = ("tests/study/test_sections.py",)
CHECKPOINTS = ("tests/runs/test_checkpoint_store.py",)
DRAW = ("tests/generate/test_draw.py",)

MUTATIONS = (
    # Tokens: what a number means.
    Mutation(
        "codes-begin-at-pad",
        "t2i/tokens/vocab.py",
        "return self.pad_id + 1",
        "return self.pad_id",
        "code 0 is <pad>, and every code is off by one",
        TOKENS_VOCAB,
    ),
    Mutation(
        "image-rows-begin-at-pad",
        "t2i/tokens/vocab.py",
        "return range(self.first_image_id, self.first_image_id + self.codebook_size)",
        "return range(self.pad_id, self.pad_id + self.codebook_size)",
        "every drawn code is off by one, and <pad> can be drawn",
        TOKENS_VOCAB,
    ),
    Mutation(
        "last-code-without-row",
        "t2i/tokens/vocab.py",
        "used = self.first_image_id + self.codebook_size",
        "used = self.pad_id + self.codebook_size",
        "where the vocabulary is a multiple already, the last code has no row",
        TOKENS_VOCAB,
    ),
    Mutation(
        "unused-row-may-be-generated",
        "t2i/tokens/vocab.py",
        "range(self.num_text_tokens, self.num_text_rows)",
        "range(self.num_text_tokens + 1, self.num_text_rows)",
        "generate() may choose the first row that no token uses",
        (*TOKENS_VOCAB, *TOKENS_TEXT),
    ),
    Mutation(
        "codebook-size-is-a-code",
        "t2i/tokens/vocab.py",
        "values.max() >= end",
        "values.max() > end",
        "a code of one too many is taken",
        TOKENS_VOCAB,
    ),
    Mutation(
        "caption-takes-a-markers-place",
        "t2i/tokens/sequence.py",
        "room = seq_len - markers - codes",
        "room = seq_len - markers - codes + 1",
        "a long caption pushes </doc> out of the sequence",
        TOKENS_SEQUENCE,
    ),
    Mutation(
        "padding-is-a-target",
        "t2i/tokens/sequence.py",
        "masked_fill(labels == layout.pad_id",
        "masked_fill(input_ids == layout.pad_id",
        "the model learns to write <pad> after the end",
        TOKENS_SEQUENCE,
    ),
    Mutation(
        "image-only-prompt-has-a-caption",
        "t2i/tokens/sequence.py",
        'text = [] if mode == "image-only"',
        'text = [] if mode == "text-only"',
        "a model of images alone is prompted by what it never saw",
        TOKENS_SEQUENCE,
    ),
    Mutation(
        "pixels-are-cut-not-rounded",
        "t2i/tokens/image.py",
        "((pixels + 1) * 127.5).round()",
        "((pixels + 1) * 127.5)",
        "decoded images are darker by half a level",
        TOKENS_IMAGE,
    ),
    Mutation(
        "shift-swaps-its-axes",
        "t2i/tokens/image.py",
        "top, left = reach - down, reach - right",
        "top, left = reach - right, reach - down",
        "views are moved along the wrong axis",
        TOKENS_IMAGE,
    ),
    Mutation(
        "round-trip-accepts-strangers",
        "t2i/tokens/image.py",
        "if agreement < SAME_TOKENIZER",
        "if 1 - agreement > SAME_TOKENIZER",
        "a tokenizer that gives half of the codes otherwise passes for the one that made the shards",
        TOKENS_IMAGE,
    ),
    Mutation(
        "captions-spell-special-tokens",
        "t2i/tokens/text.py",
        "split_special_tokens=True",
        "split_special_tokens=False",
        "a caption that spells <|endoftext|> ends the text",
        TOKENS_TEXT,
    ),
    Mutation(
        "completions-lose-their-first-space",
        "t2i/tokens/text.py",
        "return whole.removeprefix(before) if whole.startswith(before) else self.decode(ids)",
        "return self.decode(ids)",
        "SentencePiece takes the space between a prompt and its completion for one that it added itself",
        TOKENS_TEXT,
    ),
    Mutation(
        "worst-pieces-are-merged-first",
        "t2i/tokens/pieces.py",
        "(-score, ids[text[:cut]]",
        "(score, ids[text[:cut]]",
        "a SentencePiece model gives other ids than the language model was trained on",
        TOKENS_TEXT,
    ),
    Mutation(
        "captions-of-all-images-count",
        "t2i/model/code_embeddings.py",
        "means[is_known] -= means[is_known].mean(0)",
        "means[is_known] -= 0 * means[is_known].mean(0)",
        "all codes begin at what all captions say",
        CODES,
    ),
    Mutation(
        "common-words-count-most",
        "t2i/model/code_embeddings.py",
        "weights = (len(captions) / frequency).log()",
        "weights = frequency.log()",
        "a code begins at the words that every caption has",
        CODES,
    ),
    # The loss.
    Mutation(
        "code-zero-is-special",
        "t2i/model/loss.py",
        "is_image = labels >= first_image_id",
        "is_image = labels > first_image_id",
        "code 0 is counted as a special token",
        LOSS,
    ),
    Mutation(
        "z-loss-gradient-is-halved",
        "t2i/model/loss.py",
        "(1 + 2 * z_loss * found.partitions[:, None])",
        "(1 + z_loss * found.partitions[:, None])",
        "the z-loss pulls half as much as it says",
        LOSS,
    ),
    Mutation(
        "online-softmax-forgets-to-shrink",
        "t2i/model/softmax.py",
        "sums = sums * shrink + powers.sum(-1, keepdim=True)",
        "sums = sums + powers.sum(-1, keepdim=True)",
        "partitions are too large wherever a later tile has the largest logit",
        LOSS,
    ),
    Mutation(
        "a-cap-has-no-slope",
        "t2i/model/softmax.py",
        "return 1 - (logits / self.cap).square()",
        "return torch.ones_like(logits)",
        "the gradient of capped logits is that of logits without a cap",
        LOSS,
    ),
    Mutation(
        "markers-are-told-from-text-alone",
        "t2i/model/loss.py",
        "(others, range(num_rows))]",
        "(others, range(image_rows.start))]",
        "with image rows alone, a text token never learns that no code follows",
        LOSS,
    ),
    Mutation(
        "norms-freezes-positions",
        "t2i/model/trainable.py",
        "module is not model.get_input_embeddings()",
        "module is model.get_input_embeddings()",
        "learned position embeddings stay frozen, against the paper's level 2",
        LEARN,
    ),
    Mutation(
        "a-loaded-model-is-trained-as-it-is-opened",
        "t2i/train/build.py",
        "return model.train(), layout",
        "return model, layout",
        "gradient checkpointing and dropout of a loaded model are off, whatever the settings say",
        ("tests/train/test_combinations.py",),
    ),
    # The sampler.
    Mutation(
        "guidance-has-the-wrong-sign",
        "t2i/model/open_lm/race_open_lm.py",
        "how.guidance_scale * (conditional - unconditional)",
        "how.guidance_scale * (unconditional - conditional)",
        "guidance leads away from the caption",
        SAMPLING,
    ),
    Mutation(
        "capped-logits-are-mixed-before-the-cap",
        "t2i/model/open_lm/sampling_open_lm.py",
        "mixes_logits=not form.is_linear",
        "mixes_logits=False",
        "guidance of a class with capped logits draws other codes",
        ("tests/model/test_drawing_from_any_class.py",),
    ),
    Mutation(
        "temperature-is-inverted",
        "t2i/model/open_lm/race_open_lm.py",
        "(kept / temperature)",
        "(kept * temperature)",
        "a lower temperature gives wilder images",
        SAMPLING,
    ),
    Mutation(
        "top-k-keeps-one-more",
        "t2i/model/open_lm/race_open_lm.py",
        "count = min(top_k, codebook) if top_k",
        "count = min(top_k + 1, codebook) if top_k",
        "the code after the last that may be drawn is drawn",
        SAMPLING,
    ),
    Mutation(
        "top-p-keeps-one-less",
        "t2i/model/open_lm/race_open_lm.py",
        "before = probabilities.cumsum(-1) - probabilities",
        "before = probabilities.cumsum(-1)",
        "the code that completes the probability is left out",
        SAMPLING,
    ),
    Mutation(
        "codes-share-a-key",
        "t2i/model/open_lm/sampling_open_lm.py",
        "keys.T.contiguous()[len(codes) :]",
        "keys.T.contiguous()[len(codes) - 1 : -1]",
        "the first two codes are drawn by the same random numbers",
        SAMPLING,
    ),
    Mutation(
        "images-share-a-seed",
        "t2i/model/open_lm/sampling_open_lm.py",
        "seeds=[seed + index for index in range(len(captions))]",
        "seeds=[seed for index in range(len(captions))]",
        "the same caption gives the same image each time",
        SAMPLING,
    ),
    Mutation(
        "exported-draw-is-off-by-one",
        "t2i/model/open_lm/sampling_open_lm.py",
        "first = rows + len(MARKERS) + 1",
        "first = rows + len(MARKERS)",
        "an exported model's codes are off by one",
        SAMPLING,
    ),
    Mutation(
        "exported-draw-has-too-much-room",
        "t2i/model/open_lm/sampling_open_lm.py",
        "room = length - config.codes_per_image - len(MARKERS)",
        "room = length - config.codes_per_image",
        "a long caption is longer than any in training",
        SAMPLING,
    ),
    Mutation(
        "positions-begin-at-one",
        "t2i/model/open_lm/reading_open_lm.py",
        "(mask.cumsum(-1) - 1)",
        "mask.cumsum(-1)",
        "models with learned positions draw from shifted ones",
        SAMPLING,
    ),
    Mutation(
        "another-class-hides-its-first-id",
        "t2i/model/open_lm/decoding_any_open_lm.py",
        "hiding(places < padding[:, None], self.dtype)",
        "hiding(places <= padding[:, None], self.dtype)",
        "padded rows of Llama's class never see <doc>",
        ANY_CLASS,
    ),
    Mutation(
        "another-class-counts-from-one",
        "t2i/model/open_lm/decoding_any_open_lm.py",
        "self.positions = (places - padding[:, None]).clamp(min=0)",
        "self.positions = (places - padding[:, None] + 1).clamp(min=0)",
        "codes of classes with learned positions are drawn from shifted ones",
        ANY_CLASS,
    ),
    Mutation(
        "another-class-misses-its-newest-id",
        "t2i/model/open_lm/decoding_any_open_lm.py",
        "is_hidden = (places > self.at) |",
        "is_hidden = (places >= self.at) |",
        "a compiled step of Llama's class does not see the code before it",
        ANY_CLASS,
    ),
    Mutation(
        "another-class-counts-padding",
        "t2i/model/open_lm/decoding_any_open_lm.py",
        "position_ids=(self.at - self.padding)[:, None]",
        "position_ids=self.at.expand_as(self.padding)[:, None]",
        "a compiled step's positions depend on the longest prompt",
        ANY_CLASS,
    ),
    Mutation(
        "a-window-keeps-a-wrong-guess",
        "t2i/model/open_lm/window_open_lm.py",
        "first + num_right + 1 - known",
        "first + (num_right + 2).clamp(max=window) - known",
        "a code that was drawn after a wrong guess is kept",
        WINDOW,
    ),
    Mutation(
        "a-window-sees-what-was-guessed-before",
        "t2i/model/open_lm/decoding_open_lm.py",
        "(places > at[..., None]) |",
        "(places > at[:, -1:, None]) |",
        "a code attends to the guesses behind it",
        WINDOW,
    ),
    Mutation(
        "decoding-hides-the-first-token",
        "t2i/model/open_lm/decoding_open_lm.py",
        "hidden.where(places < padding[:, None], 0)",
        "hidden.where(places <= padding[:, None], 0)",
        "a shorter prompt loses <doc> where prompts differ in length",
        OPEN_LM,
    ),
    Mutation(
        "batches-repeat-their-seeds",
        "t2i/generate/sample.py",
        "first_seed=settings.seed + start + turn",
        "first_seed=settings.seed + turn",
        "image i of every batch is drawn by the same seed",
        DRAW,
    ),
    Mutation(
        "drawing-leaves-the-last-batch",
        "t2i/generate/image_files.py",
        "for start in range(0, len(names), batch_size)[rank::world_size]",
        "for start in range(0, len(names) - batch_size + 1, batch_size)[rank::world_size]",
        "the last captions, which fill no batch, are never drawn",
        DRAW,
    ),
    # The loader.
    Mutation(
        "captions-are-never-dropped",
        "t2i/data/dataset.py",
        'return hash_uniform("caption dropout", seed, epoch, key) < share',
        "return False",
        "the model never sees an empty caption, and guidance has nothing to lead away from",
        DATA,
    ),
    Mutation(
        "same-captions-dropped-each-epoch",
        "t2i/data/dataset.py",
        'hash_uniform("caption dropout", seed, epoch, key)',
        'hash_uniform("caption dropout", seed, key)',
        "some captions are never read",
        DATA,
    ),
    Mutation(
        "an-empty-caption-has-a-token",
        "t2i/data/dataset.py",
        'ids[:0] if sample.get("caption") == "" else ids',
        "ids",
        "the id that stands for an empty caption in a shard is read as one",
        DATA,
    ),
    Mutation(
        "position-stays-open",
        "t2i/data/dataset.py",
        "partial(kept, auto_cleanup=False)",
        "partial(kept, auto_cleanup=True)",
        "a resumed run leaves files open at every step, until there are too many",
        ("tests/data/test_loader.py",),
    ),
    Mutation(
        "every-epoch-loses-a-step",
        "t2i/data/loader.py",
        "epoch_size=num_samples // a_step * a_step",
        "epoch_size=(num_samples // a_step - 1) * a_step",
        "a step's samples of each epoch are never read",
        DATA,
    ),
    Mutation(
        "kept-samples-are-rounded-down",
        "t2i/data/loader.py",
        'return -(-manifest.counts.get("train", 0) // subsample_every)',
        'return manifest.counts.get("train", 0) // subsample_every',
        "a report says one sample too few, and a step that fits is refused",
        DATA,
    ),
    Mutation(
        "training-reads-held-out",
        "t2i/data/dataset.py",
        'split: str = "train"',
        'split: str = "heldout"',
        "the model is trained on what measures it",
        DATA,
    ),
    Mutation(
        "held-out-is-not-spread",
        "t2i/data/shards/reader.py",
        "[items[index * len(items) // count] for index in range(count)]",
        "list(items[:count])",
        "a part of a split is its beginning, of one kind perhaps",
        DATA,
    ),
    Mutation(
        "shards-may-hold-one-code-too-many",
        "t2i/data/shards/reader.py",
        "if len(values) and values.max() >= end",
        "if len(values) and values.max() > end",
        "a code outside the codebook is trained on",
        DATA,
    ),
    Mutation(
        "place-baseline-on-the-wrong-axis",
        "t2i/data/shards/baselines.py",
        "places = np.tile(np.arange(num_codes), len(train))",
        "places = np.repeat(np.arange(num_codes), len(train))",
        "the baseline by place counts codes of other places",
        DATA,
    ),
    Mutation(
        "bigram-baseline-shifted",
        "t2i/data/shards/baselines.py",
        "others = table.cost(rows[:, :-1].ravel(), rows[:, 1:].ravel())",
        "others = table.cost(rows[:, 1:].ravel(), rows[:, :-1].ravel())",
        "the bigram baseline predicts backwards",
        DATA,
    ),
    # Measures.
    Mutation(
        "shuffled-caption-is-the-own",
        "t2i/measure/shuffled.py",
        "all(map(operator.ne, item, items[at]))",
        "True",
        "captions look useless: the shuffled one may be the image's own",
        SHUFFLED,
    ),
    Mutation(
        "one-image-is-its-own-shuffled-caption",
        "t2i/measure/heldout.py",
        'kinds = [kind for kind in CAPTIONS if kind != "wrong" or others]',
        "kinds = list(CAPTIONS)",
        "a split of one image reports its matched loss as the shuffled one",
        SENSITIVITY,
    ),
    Mutation(
        "older-words-are-another-protocol",
        "t2i/measure/compare.py",
        "differing_entries(_in_todays_words(a.entries), _in_todays_words(b.entries), keys=keys)",
        "differing_entries(a.entries, b.entries, keys=keys)",
        "scores of version 0.1 compare with no later one",
        SENSITIVITY,
    ),
    Mutation(
        "held-out-loss-of-training-images",
        "t2i/measure/heldout.py",
        "read_split(config.shards, split, num_samples=num_pictures",
        'read_split(config.shards, "train", num_samples=num_pictures',
        "the held-out loss is that of images that were trained on",
        HELDOUT,
    ),
    Mutation(
        "measuring-leaves-training-mode",
        "t2i/measure/reduce.py",
        "model.train(was_training)",
        "model.train()",
        "a model that is only measured drops units out from then on",
        HELDOUT,
    ),
    Mutation(
        "unused-rows-count-as-text",
        "t2i/measure/forgetting.py",
        "logits[:, : layout.num_text_tokens]",
        "logits[:, : layout.num_text_rows]",
        "probability of rows that no token uses is counted as text's",
        FORGETTING,
    ),
    Mutation(
        "completions-choose-unused-rows",
        "t2i/measure/forgetting.py",
        "barred = list(range(layout.num_text_tokens, num_ids(model)))",
        "barred = list(range(layout.num_text_rows, num_ids(model)))",
        "a completion holds ids that the tokenizer cannot read",
        FORGETTING,
    ),
    Mutation(
        "text-cost-is-not-shifted",
        "t2i/measure/forgetting.py",
        "labels = input_ids[:, 1:].flatten()",
        "labels = input_ids[:, :-1].flatten()",
        "the cost of repeating a token is measured, not that of the next one",
        FORGETTING,
    ),
    Mutation(
        "layers-norm-has-the-rows",
        "t2i/measure/gradients.py",
        "for name, value in part.gradient.items() if name not in vocabulary",
        "for name, value in part.gradient.items() if name in vocabulary",
        "the norm without embeddings is that of the embeddings",
        GRADIENTS,
    ),
    Mutation(
        "loss-share-is-the-token-share",
        "t2i/measure/gradients.py",
        "loss_share=part.nats / all_nats",
        "loss_share=part.tokens / total",
        "text seems to cost no more than its tokens",
        GRADIENTS,
    ),
    Mutation(
        "grid-is-turned",
        "t2i/measure/perplexity.py",
        "image_loss_by_row=grid.mean(1).tolist()",
        "image_loss_by_row=grid.mean(0).tolist()",
        "rows of the code grid are its columns",
        PERPLEXITY,
    ),
    Mutation(
        "noise-has-one-deviation",
        "t2i/measure/embeddings.py",
        "noise * image_rows.std(0)",
        "noise * image_rows.std()",
        "the random rows that image rows are compared with are of another shape",
        NEAREST,
    ),
    Mutation(
        "unused-rows-are-neighbours",
        "t2i/measure/embeddings.py",
        "weight.detach()[: layout.num_text_tokens]",
        "weight.detach()[: layout.num_text_rows]",
        "the nearest text token may be a row that no token uses",
        NEAREST,
    ),
    Mutation(
        "cka-is-not-centred",
        "t2i/measure/embeddings.py",
        "rows.double() - rows.double().mean(0)",
        "rows.double()",
        "a common offset makes strangers look alike",
        NEAREST,
    ),
    Mutation(
        "frechet-counts-the-overlap-once",
        "t2i/measure/distances.py",
        "np.trace(b.cov) - 2 * overlap",
        "np.trace(b.cov) - overlap",
        "equal sets are far apart",
        FRECHET,
    ),
    Mutation(
        "best-of-keeps-the-worst",
        "t2i/generate/best_of.py",
        "is_better = scores > highest",
        "is_better = scores < highest",
        "of several images the one that fits least is kept",
        BEST_OF,
    ),
    Mutation(
        "best-of-names-the-first-candidate",
        "t2i/generate/best_of.py",
        "best.candidates.masked_fill(is_better.cpu(), turn)",
        "best.candidates",
        "an image that was kept cannot be drawn again from what its file says",
        BEST_OF,
    ),
    Mutation(
        "likelihood-of-the-code-before",
        "t2i/generate/best_of.py",
        "[len(row) - 1 for row in rows]",
        "[len(row) for row in rows]",
        "codes are scored at the position after them",
        BEST_OF,
    ),
    Mutation(
        "worth-of-a-caption-is-its-cost",
        "t2i/play/worth.py",
        "matched - null",
        "null - matched",
        "places are red where the caption makes them less likely",
        PLAY,
    ),
    Mutation(
        "images-of-a-page-share-a-seed",
        "t2i/play/asked.py",
        "Asked(self.prompt, self.seed + index)",
        "Asked(self.prompt, self.seed)",
        "all images of a drawing on the page are one",
        PLAY,
    ),
    Mutation(
        "mind-without-sorting",
        "t2i/measure/sliced.py",
        "order = np.argsort(projected, axis=1)",
        "order = np.argsort(np.zeros_like(projected), axis=1)",
        "points on a line are paired by chance",
        MEASURES,
    ),
    Mutation(
        "mind-scaled-by-the-width-alone",
        "t2i/measure/sliced.py",
        "SCALE_PER_DIMENSION = 3",
        "SCALE_PER_DIMENSION = 1",
        "MIND is a third of the paper's",
        MEASURES,
    ),
    Mutation(
        "an-image-drawn-twice-is-a-pair",
        "t2i/measure/mmd.py",
        "start + np.arange(len(rows))] = 0",
        "start + np.arange(len(rows))] = 1",
        "resamplings see a model that repeats itself",
        MEASURES,
    ),
    Mutation(
        "interval-of-one-deviation",
        "t2i/measure/measures.py",
        "NORMAL_95 = 1.96",
        "NORMAL_95 = 1.0",
        "intervals hold two thirds instead of 95%",
        MEASURES,
    ),
    Mutation(
        "mismatched-images-keep-their-captions",
        "t2i/measure/pairing.py",
        'Row("real", others[:num_real])',
        'Row("real", everything[:num_real])',
        "the judge's yardstick of other captions is that of matched ones",
        SCORE,
    ),
    Mutation(
        "judge-counts-what-no-caption-states",
        "t2i/measure/verdict.py",
        "float(values[place] == said[name]) if name in said else np.nan",
        "float(values[place] == said.get(name))",
        "an image is wrong where its caption says nothing",
        JUDGE,
    ),
    Mutation(
        "redrawn-row-is-the-models",
        "t2i/measure/score.py",
        "drawing.config.seed + len(task.captions) * drawing.config.best_of",
        "drawing.config.seed + 0",
        "the control row is drawn by the model's own seeds",
        SCORE,
    ),
    Mutation(
        "other-captions-are-the-own",
        "t2i/measure/pairing.py",
        'Row("model", others)',
        'Row("model", everything)',
        "CLIP's score under other captions is that under the own ones",
        SCORE,
    ),
    Mutation(
        "real-images-stay-in-their-reference",
        "t2i/measure/rows.py",
        "with_statistics(np.delete(features, taken, axis=0))",
        "with_statistics(features)",
        "the yardstick of real images is compared with itself",
        SCORE,
    ),
    Mutation(
        "psnr-of-amplitudes",
        "t2i/image_tokenizer/quality.py",
        "10 * (255**2 / error).log10()",
        "20 * (255**2 / error).log10()",
        "reconstructions look twice as good in decibels",
        RECONSTRUCTION,
    ),
    # Statistics and the report.
    Mutation(
        "average-is-not-corrected",
        "t2i/study/statistics.py",
        "average / (1 - decay**count)",
        "average",
        "smoothed curves begin near zero",
        STATISTICS,
    ),
    Mutation(
        "interval-of-ninety-percent",
        "t2i/study/statistics.py",
        "quantile = stats.t.ppf((1 + CONFIDENCE) / 2",
        "quantile = stats.t.ppf(CONFIDENCE",
        "a 95% interval is one of 90%",
        STATISTICS,
    ),
    Mutation(
        "deviation-over-n",
        "t2i/study/statistics.py",
        "differences.std(0, ddof=1)",
        "differences.std(0, ddof=0)",
        "intervals of few seeds are too narrow",
        STATISTICS,
    ),
    Mutation(
        "holm-is-not-monotone",
        "t2i/study/statistics.py",
        "largest = max(largest, min(1.0,",
        "largest = max(0.0, min(1.0,",
        "a larger p-value becomes a smaller corrected one",
        STATISTICS,
    ),
    Mutation(
        "seeds-are-paired-by-place",
        "t2i/study/results.py",
        "rows = [one.seeds.index(seed) for seed in seeds]",
        "rows = list(range(len(seeds)))",
        "where arms have other seeds, runs of different seeds are paired",
        ARMS,
    ),
    Mutation(
        "failed-runs-are-compared",
        "t2i/study/results.py",
        'self.state == "done"',
        'self.state != "open"',
        "a run that ended in nan is averaged with the others",
        ARMS,
    ),
    Mutation(
        "one-seed-that-rises-is-all",
        "t2i/report/sections/comparisons.py",
        "if not (one.values[:, -1] > one.values[:, lowest]).all()",
        "if not (one.values[:, -1] > one.values[:, lowest]).any()",
        "the report says of an arm what is true of one seed",
        SECTIONS,
    ),
    Mutation(
        "overview-is-not-corrected",
        "t2i/report/sections/overviews.py",
        "corrected([test.p_value for test in every.values()])",
        "[test.p_value for test in every.values()]",
        "of twenty comparisons, one is found by chance",
        SECTIONS,
    ),
    Mutation(
        "share-of-the-loss-that-is-left",
        "t2i/report/sections/overviews.py",
        "costs[seed] - second[seed]",
        "second[seed]",
        "a difference is divided by the loss, and two image tokenizers are compared by what their codes cost",
        SECTIONS,
    ),
    Mutation(
        "smoothed-curve-ends-at-its-start",
        "t2i/report/sections/curves.py",
        "ema(row.tolist(), decay=SMOOTHING)[-1]",
        "ema(row.tolist(), decay=SMOOTHING)[0]",
        "the report says that training ended where it began",
        SECTIONS,
    ),
    Mutation(
        "wrong-caption-is-the-empty-one",
        "t2i/report/sections/images.py",
        "value=keys[other]",
        'value=keys["null"]',
        "the report's shuffled caption is the empty one",
        SECTIONS,
    ),
    Mutation(
        "places-won-are-places-lost",
        "t2i/report/sections/images.py",
        "grids[names[0]] < grids[names[1]]",
        "grids[names[0]] > grids[names[1]]",
        "the report says the first arm wins where the second does",
        SECTIONS,
    ),
    Mutation(
        "scores-of-the-oldest-checkpoint",
        "t2i/study/measured.py",
        "read_optional_json(files[-1]) if files",
        "read_optional_json(files[0]) if files",
        "the last loss stands beside the first distance",
        SECTIONS,
    ),
    Mutation(
        "forgetting-runs-backwards",
        "t2i/report/sections/language.py",
        "before, after = text.values[:, 0].mean(), text.values[:, -1].mean()",
        "before, after = text.values[:, -1].mean(), text.values[:, 0].mean()",
        "the report says that text got cheaper",
        SECTIONS,
    ),
    Mutation(
        "captions-ratio-is-inverted",
        "t2i/report/sections/language.py",
        "costs[1].perplexity_text_rows / costs[0].perplexity_text_rows",
        "costs[0].perplexity_text_rows / costs[1].perplexity_text_rows",
        "the report says that captions are easier than text where they are harder",
        SECTIONS,
    ),
    Mutation(
        "gradient-ratio-is-inverted",
        "t2i/report/sections/language.py",
        "{image.norm / text.norm:.2f}",
        "{text.norm / image.norm:.2f}",
        "the report gives text the images' share of the gradient",
        SECTIONS,
    ),
    Mutation(
        "nearer-than-noise-is-inverted",
        "t2i/report/sections/embeddings.py",
        'f"{1 - near.random_nearer:.1%}"',
        'f"{near.random_nearer:.1%}"',
        "the probe says how often noise is nearer to text",
        SECTIONS,
    ),
    # Which run.
    Mutation(
        "the-oldest-checkpoint-is-opened",
        "t2i/runs/checkpoint_store.py",
        "for folder in reversed(committed(run_dir).values()):\n            try:",
        "for folder in committed(run_dir).values():\n            try:",
        "drawing and measures read the run's first checkpoint",
        CHECKPOINTS,
    ),
    # What a GPU needs, and a size between two that are known.
    Mutation(
        "every-rank-takes-the-first-gpu",
        "t2i/distributed/launch.py",
        "torch.cuda.set_device(own)",
        "torch.cuda.set_device(0)",
        "NCCL refuses the first collective of every run of several GPUs",
        GPU,
    ),
    Mutation(
        "collectives-end-after-ten-minutes",
        "t2i/distributed/launch.py",
        "verbose=False, timeout=PATIENCE,",
        "verbose=False,",
        "a rank that waits for another's save is ended",
        GPU,
    ),
    Mutation(
        "engines-are-kept",
        "t2i/train/deepspeed_internals.py",
        "    engine.destroy()",
        "    pass",
        "a process holds the memory of every engine that it made",
        GPU,
    ),
    Mutation(
        "half-precision-is-opened-in-fp32",
        "t2i/runs/loading.py",
        'else "stored"',
        "else torch.float32",
        "a GPU draws and measures without its tensor cores",
        GPU,
    ),
    Mutation(
        "cudnn-plans-each-length",
        "t2i/model/open_lm/sampling_open_lm.py",
        "sdpa_kernel([",
        "sdpa_kernel([SDPBackend.CUDNN_ATTENTION, ",
        "drawing prepares a thousand plans for each length of prompt",
        GPU,
    ),
    Mutation(
        "the-codebook-counts-on-the-cpu",
        "t2i/image_tokenizer/codebook.py",
        "weight.new_ones(len(weight))",
        "torch.ones(len(weight))",
        "an image tokenizer cannot be trained on a GPU",
        GPU,
    ),
    Mutation(
        "compiled-lengths-are-any",
        "t2i/data/batching.py",
        "math.lcm(multiple,",
        "math.lcm(1,",
        "nearly every step is compiled anew",
        ("tests/train/test_compiled.py",),
    ),
    Mutation(
        "the-dial-misses-its-ends",
        "t2i/config/size.py",
        "** _exponent(RATES, WIDTHS)",
        "** 0.5",
        "--size 24 is not the paper's run",
        ("tests/test_size.py",),
    ),
    Mutation(
        "shuffled-caption-of-another-style",
        "t2i/measure/shuffled.py",
        "alike[at] == kind",
        "alike[at] is not None",
        "a caption is worth what its style saves, whatever its other words say",
        SHUFFLED,
    ),
    Mutation(
        "concept-held-out-style-by-style",
        "t2i/data/sources/iconify.py",
        'hash_uniform("concept", concept) < share',
        'hash_uniform("concept", concept, style) < share',
        "a concept that counts as never seen was trained on in another style",
        ICONS,
    ),
    Mutation(
        "extra-tokens-by-the-others-count",
        "t2i/study/statistics.py",
        "tokens_to_reach(second_tokens,",
        "tokens_to_reach(first_tokens,",
        "what an arm with text beside its images needs is counted without its text",
        STATISTICS,
    ),
    Mutation(
        "diverged-trial-not-an-answer",
        "t2i/study/tuning.py",
        "status.code == NumericalError.exit_code",
        "status.code == 0",
        "an arm of which one rate diverges is never trained",
        TUNING,
    ),
    Mutation(
        "worst-learning-rate-chosen",
        "t2i/study/tuning.py",
        "min(finite, key=finite.__getitem__)",
        "max(finite, key=finite.__getitem__)",
        "every arm is trained with the worst of the values tried",
        TUNING,
    ),
    Mutation(
        "pre-training-for-nothing",
        "t2i/report/sections/budgets.py",
        "charge + tokens * flops_per_token",
        "tokens * flops_per_token",
        "equal total FLOPs leave out what the start cost",
        SECTIONS,
    ),
    Mutation(
        "codes-aligned-to-others-captions",
        "t2i/image_tokenizer/alignment.py",
        "self.sentences[images.to(self.sentences.device)]",
        "self.sentences[: len(images)]",
        "codes are drawn towards the captions of other images",
        ALIGNED_CODES,
    ),
)


def mutated(mutation, *, root):
    """Read a mutation's file and return it changed.

    Raises:
        ValueError: the old text does not stand there exactly once; it says where it stands now.
    """
    path = root / mutation.file
    text = path.read_text() if path.is_file() else ""
    if (count := text.count(mutation.old)) != 1:
        elsewhere = [
            other.relative_to(root).as_posix()
            for other in sorted((root / "t2i").rglob("*.py"))
            if other != path and other.read_text().count(mutation.old) == 1
        ]
        raise ValueError(
            f"{mutation.name}: {mutation.file} has its old text {count} times; expected once:\n    {mutation.old}\n"
            f"It stands once in {', '.join(elsewhere) or 'no other file'}."
        )
    return text.replace(mutation.old, mutation.new)


def copy_checkout(folder):
    """Copy what tests need into an empty folder."""
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


def run_tests(files, *, folder):
    """Run test files in a copy of the checkout until the first failure: whether all passed, and what was said.

    Raises:
        RuntimeError: pytest could not run them.
    """
    done = processes.run(
        [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
        cwd=folder,
        env=processes.environment(PYTHONPATH=str(folder)),
        timeout=TIMEOUT_SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode not in (0, FAILED):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.returncode == 0, done.stdout


def is_noticed(mutation, *, folder):
    """Make one mistake in a copy of the checkout, run its tests, and mend it again."""
    path, text = folder / mutation.file, mutated(mutation, root=folder)
    plain = path.read_text()
    path.write_text(text)
    try:
        has_passed, _ = run_tests(mutation.tests, folder=folder)
    finally:
        path.write_text(plain)
    return not has_passed


def check_tests_pass(mutations, *, folder):
    """Run all tests of these mutations without a mistake: one that fails anyway would notice everything.

    Raises:
        RuntimeError: one fails.
    """
    has_passed, said = run_tests(sorted({file for one in mutations for file in one.tests}), folder=folder)
    if not has_passed:
        raise RuntimeError(f"The tests fail without a mistake:\n{said[-2000:]}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="those mutations alone whose name holds NAME")
    parser.add_argument("--list", action="store_true", help="list them and run nothing")
    given = parser.parse_args()
    chosen = [one for one in MUTATIONS if (given.only or "") in one.name]
    if given.list or not chosen:
        for one in chosen:
            print(f"{one.name}: {one.file}: {one.wrong}")
        return 0 if chosen else 2
    noticed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy_checkout(folder)
        try:
            for one in chosen:
                mutated(one, root=folder)
            check_tests_pass(chosen, folder=folder)
            for one in chosen:
                began = time.monotonic()
                found = is_noticed(one, folder=folder)
                noticed += found
                word = "noticed" if found else "NOT noticed"
                print(f"{word:11s} {one.name} ({time.monotonic() - began:.0f} s): {one.wrong}", flush=True)
        except (ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
    print(f"{noticed} of {len(chosen)} noticed; at least {LEAST_NOTICED:.0%} must be.")
    return 0 if noticed >= LEAST_NOTICED * len(chosen) else 1


if __name__ == "__main__":
    os.nice(5)  # a tool that runs beside other work
    sys.exit(main())
