"""The language model: pre-training, completions, forgetting, captions against text, text's share of training."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from t2i.report.figures import COLOURS, LABELS, draw_baselines, draw_mean_and_range, finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, files_in, in_folder, last
from t2i.study.measured import read_each, read_forgetting, read_gradients
from t2i.study.results import Curve, curve, data_manifest, paired, read_run, runs_of, text_baselines
from t2i.study.spec import Study


def pretraining(study: Study, out: Path, *, folder: str) -> Section:
    """Draw the held-out loss of the study's own language model, and name the text that it was trained on.

    Args:
        folder: of its run, `{out}` being the study's.
    """
    run = read_run(in_folder(folder, out), seed=0)
    found = curve([run], value="text_loss", split="heldout")
    manifest = data_manifest(run)
    if found is None or manifest is None or manifest.documents is None:
        return Section("The language model", f"{run.folder} has no held-out loss on documents.")
    baselines = manifest.floors_nats["heldout"]
    end = float(found.values[0, -1])
    digest = (manifest.gathered_sha256 or "")[:16]
    sentence = (
        f"Pre-trained on {manifest.documents['train']:,} documents of {manifest.source} (SHA-256"
        f" {digest}), {found.tokens[-1]:,} tokens, to {end:.3f} nats per held-out token, a"
        f" perplexity of {math.exp(end):.1f}; count-based baselines have {math.exp(baselines['unigram']):.0f}"
        f" (unigram) and {math.exp(baselines['bigram']):.0f} (bigram)."
    )
    return Section("The language model", sentence, _draw_pretraining(found, baselines=baselines))


def completions(study: Study, out: Path, *, files: dict[str, str]) -> Section:
    """Tabulate completions of the same prompts by several checkpoints (Table 1), from forgetting.json files."""
    found = read_each(files_in(files, out), read_forgetting)
    table = [["prompt", "model", "completion", "text perplexity, text vocabulary"]]
    for name, one in found.items():
        for which, model in one.models.items():
            label = name if which == "model" else f"{name}: {which}"
            for prompt, text in zip(one.prompts, model.completions, strict=True):
                table.append([prompt, label, text, f"{model.costs['text'].perplexity_text_rows:.2f}"])
    # By prompt, so that completions of one prompt stand below each other; the models keep their order.
    table[1:] = sorted(table[1:], key=lambda row: row[0])
    return Section(
        "Completions",
        f"{len(found)} models completed the same prompts, greedily, among text tokens.",
        table=table,
    )


def forgetting(study: Study, out: Path, *, arms: list[str]) -> Section:
    """Draw held-out text loss and leaked probability during training, and text loss against image loss."""
    panels: dict[str, dict[str, Curve]] = {"text_loss_text_rows": {}, "leaked": {}}
    table = [["arm", "text before", "text after", "leaked after", "held-out image loss"]]
    paths: dict[str, tuple[Curve, Curve]] = {}
    baselines: dict[str, float] = {}
    sentences = []
    for arm in arms:
        runs = runs_of(study, arm=arm, out=out)
        baselines = baselines or text_baselines(runs)
        for value, panel in panels.items():
            found = curve(runs, value=value, split="text")
            if found is not None:
                panel[arm] = found
        image_curve = curve(runs, value="image_loss", split="heldout")
        path = paired(image_curve, panels["text_loss_text_rows"].get(arm))
        if path is not None:
            paths[arm] = path
        if arm in panels["leaked"]:
            text, leaked = panels["text_loss_text_rows"][arm], panels["leaked"][arm]
            before, after = text.values[:, 0].mean(), text.values[:, -1].mean()
            image = last(image_curve)
            table.append([arm, f"{before:.3f}", f"{after:.3f}", f"{leaked.values[:, -1].mean():.2%}", image])
            sentences.append(f"{arm} from {before:.2f} to {after:.2f}")
    measured = "; ".join(sentences) or "not measured"
    sentence = f"Held-out text loss over the text vocabulary, in nats per token: {measured}."
    return Section("Forgetting", sentence, _draw_forgetting(panels, paths, baselines=baselines), table)


def captions(study: Study, out: Path, *, files: dict[str, str]) -> Section:
    """Tabulate the perplexity of captions and ordinary text, from forgetting.json files measured on both."""
    table = [
        ["model", "text", "text, text vocabulary", "captions", "captions, text vocabulary", "tokens of each"]
    ]
    sentences = []
    for name, one in read_each(files_in(files, out), read_forgetting).items():
        for which, model in one.models.items():
            # Only files that measured both texts can compare them.
            if set(model.costs) != {"text", "captions"}:
                continue
            label = name if which == "model" else f"{name}: {which}"
            costs = [model.costs[kind] for kind in ("text", "captions")]
            cells = [
                f"{value:.2f}" for cost in costs for value in (cost.perplexity, cost.perplexity_text_rows)
            ]
            table.append([label, *cells, " and ".join(str(cost.num_tokens) for cost in model.costs.values())])
            ratio = costs[1].perplexity_text_rows / costs[0].perplexity_text_rows
            sentences.append(f"{ratio:.2f} times that of text ({label})")
    sentence = (
        f"The perplexity of captions, over the text vocabulary, is {'; '.join(sentences) or 'not measured'}."
    )
    return Section("Captions against ordinary text", sentence, table=table)


def shares(study: Study, out: Path, *, files: dict[str, str]) -> Section:
    """Tabulate the share of text in tokens, loss and gradient norm, from gradients.json files (sec. 2.2)."""
    table = [["model", "kind", "of tokens", "of the loss", "of the norms", "norm", "norm without embeddings"]]
    sentences = []
    for name, one in read_each(files_in(files, out), read_gradients).items():
        for kind, part in one.by_kind().items():
            cells = [f"{share:.2%}" for share in (part.token_share, part.loss_share, part.norm_share)]
            table.append([name, kind, *cells, f"{part.norm:.4g}", f"{part.norm_layers:.4g}"])
        image, text = one.image, one.text
        if not text.norm:  # sequences of images alone
            sentences.append(f"{name}: no text token, so all of the gradient is of images and markers")
            continue
        cosine = "unknown" if one.cosine_text_image is None else f"{one.cosine_text_image:+.2f}"
        sentences.append(
            f"{name}: {image.tokens / text.tokens:.1f} image tokens per text token, gradient norms of image to text"
            f" {image.norm / text.norm:.2f}, cosine of the two {cosine}"
        )
    return Section("The share of text", f"{'; '.join(sentences) or 'Not measured'}.", table=table)


def _draw_pretraining(one: Curve, *, baselines: dict[str, float]) -> Figure:
    """Draw held-out text loss against tokens, with count-based baselines."""
    figure, (axis,) = panels(1)
    axis.plot(one.tokens, one.values[0], color=COLOURS[0], marker="o", markersize=3)
    draw_baselines(axis, baselines)
    axis.set(xlabel="tokens trained on", ylabel="held-out text loss, nats per token")
    finish(axis, tokens="x")
    return figure


def _draw_forgetting(
    values: dict[str, dict[str, Curve]],
    paths: dict[str, tuple[Curve, Curve]],
    *,
    baselines: dict[str, float],
) -> Figure:
    """Draw held-out text loss and leaked probability during training, and text loss against image loss.

    Args:
        values: value -> arm -> curve, with the range of seeds.
        paths: arm -> held-out image loss and text loss at the same steps.
        baselines: of held-out text, in nats per token.
    """
    figure, axes = panels(len(values) + 1)
    for axis, (value, arms) in zip(axes[:-1], values.items(), strict=True):
        for (arm, one), (colour, dash) in zip(arms.items(), styles(), strict=False):
            name = arm if axis is axes[0] else None  # one legend for all: many arms leave no room for three
            draw_mean_and_range(axis, one, colour=colour, dash=dash, label=name, marker="o")
        if value == "text_loss_text_rows":
            draw_baselines(axis, baselines)
        axis.set(xlabel="tokens trained on", ylabel=LABELS[value])
        finish(axis, tokens="x")
    for (image, text), (colour, dash) in zip(paths.values(), styles(), strict=False):
        axes[-1].plot(
            image.values.mean(0), text.values.mean(0), color=colour, linestyle=dash, marker="o", markersize=3
        )
    axes[-1].set(
        xlabel="held-out image loss, nats per code\n(better to the right)",
        ylabel=LABELS["text_loss_text_rows"],
    )
    axes[-1].invert_xaxis()  # both arrows of time then point to the right, as in the other panels
    finish(axes[-1])
    return figure


SECTIONS = (
    SectionKind("pretraining", reads="metrics.jsonl and data_manifest.json of one run", make=pretraining),
    SectionKind("completions", reads="forgetting.json", make=completions),
    SectionKind("forgetting", reads="metrics.jsonl of runs with train.eval_text", make=forgetting),
    SectionKind("captions", reads="forgetting.json measured with --captions", make=captions),
    SectionKind("shares", reads="gradients.json", make=shares),
)
