"""Image tokenizers: what they keep of an image, and what tells their codes apart besides meaning."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from t2i.data.shards.manifest import IMAGE_TOKENIZER, MANIFEST, RECONSTRUCTIONS, Manifest, read_manifest_file
from t2i.image_tokenizer.card import read_card
from t2i.report.sections.section import Section, SectionKind, files_in
from t2i.study.spec import Study


def reconstructions(study: Study, out: Path, *, shards: str | dict[str, str]) -> Section:
    """Show images and their reconstructions by the image tokenizer (Figure 2), as saved with the shards.

    Args:
        shards: a folder; or what each is called -> its folder, for several image tokenizers side by side.
    """
    folders = files_in({"": shards} if isinstance(shards, str) else shards, out)
    found = {name: folder for name, folder in folders.items() if (folder / RECONSTRUCTIONS).is_file()}
    lacking = "".join(
        f" {folder} has no {RECONSTRUCTIONS}." for name, folder in folders.items() if name not in found
    )
    if not found:
        return Section("Reconstructions", lacking.strip())
    manifests = {name: read_manifest_file(folder / MANIFEST) for name, folder in found.items()}
    head = ["PSNR, dB", "SSIM", "codes in use", "unigram, nats per code", "codes per image", "codebook"]
    table = [
        ["codes", *head],
        *([name or one.code_maker.name, *_row(found[name], one)] for name, one in manifests.items()),
    ]
    sentence = (
        f"Images of {', '.join(dict.fromkeys(one.source for one in manifests.values()))}, and the same decoded from"
        f" {_each(manifests)}: the best that a model of these codes can draw.{lacking}"
    )
    if len(manifests) > 1:
        sentence += (
            " Where PSNR, codes in use or the unigram cost of held-out codes differ, the codes do not differ in meaning"
            " alone."
        )
    return Section(
        "Reconstructions",
        sentence,
        _show({name: folder / RECONSTRUCTIONS for name, folder in found.items()}),
        table,
    )


def _each(manifests: dict[str, Manifest]) -> str:
    return " and ".join(
        f"{one.codes_per_image} codes of {one.codebook_size}" + (f" ({name})" if name else "")
        for name, one in manifests.items()
    )


def _row(folder: Path, manifest: Manifest) -> list[str]:
    """Say of an image tokenizer what its card and its shards do; - where they do not."""
    card, unigram = (
        read_card(folder / IMAGE_TOKENIZER),
        manifest.floors_nats.get("heldout", {}).get("unigram"),
    )
    measures = (
        ["-"] * 3 if card is None else [f"{card.psnr:.2f}", f"{card.ssim:.4f}", f"{card.codes_in_use:.1%}"]
    )
    cost = "-" if unigram is None else f"{unigram:.4f}"
    return [*measures, cost, str(manifest.codes_per_image), str(manifest.codebook_size)]


def _show(files: dict[str, Path]) -> Figure:
    """Show image files as they are, one below another."""
    images = {name: plt.imread(file) for name, file in files.items()}
    figure, axes = plt.subplots(len(images), 1, squeeze=False)
    figure.set_size_inches(9, sum(9 * image.shape[0] / image.shape[1] + 0.4 for image in images.values()))
    for axis, (name, image) in zip(axes[:, 0], images.items(), strict=True):
        axis.imshow(image, interpolation="nearest")
        shown = "originals above, reconstructions below"
        axis.set(xticks=[], yticks=[], title=f"{name}: {shown}" if name else shown)
    return figure


SECTIONS = (
    SectionKind(
        "reconstructions",
        reads="manifest.json, reconstructions.png and the image tokenizer's card of shards",
        make=reconstructions,
    ),
)
