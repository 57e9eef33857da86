"""Embeddings of codes and words: nearest text tokens, the semantics probe."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from t2i.report.figures import finish, panels, styles
from t2i.report.sections.section import Section, SectionKind, files_in, in_folder
from t2i.study.measured import NearestTokens, read_alignment, read_each, read_nearest
from t2i.study.spec import Study


def nearest(study: Study, out: Path, *, files: dict[str, str], rows: str = "input") -> Section:
    """Draw cosines of image embeddings to the nearest text embedding, beside those of text and random ones."""
    models = read_each(files_in(files, out), read_nearest)
    found = {name: sides[rows] for name, sides in models.items() if rows in sides}
    if not found:
        return Section("Nearest text tokens", "No file of nearest tokens was made.")
    table = [
        [
            "model",
            "median image",
            "median random",
            "median text",
            "random nearer than image",
            "codes 0 to 3, nearest token",
        ]
    ]
    for name, one in found.items():
        medians = [f"{median:.3f}" for median in one.medians.values()]
        # Quoted, as a token may be a blank or a line break.
        tokens = " ".join(repr(tokens[0]) for tokens in one.tokens[:4])
        table.append([name, *medians, f"{one.random_nearer:.1%}", tokens])
    shares = ", ".join(f"{one.random_nearer:.0%} ({name})" for name, one in found.items())
    sentence = f"A random embedding is nearer to text than an image's in {shares}; noise gives 50%."
    return Section("Nearest text tokens", sentence, _draw_cosines(found), table)


def probe(study: Study, out: Path, *, folder: str, files: dict[str, str]) -> Section:
    """Tabulate what image codes share with words: retrieval by bags of embeddings, nearness to text, CKA.

    Args:
        folder: of the alignment.
        files: nearest.json files; those made with --before have linear CKA.
    """
    aligned = read_alignment(in_folder(folder, out))
    table = [["what", "embeddings", "value", "control"]]
    for name, one in aligned.items():
        directions = {"image to text": one.image_to_text, "text to image": one.text_to_image}
        for direction, share in directions.items():
            table.append([f"alignment, {direction}", name, f"{share:.2%}", f"{one.chance:.2%}"])
    for model, sides in read_each(files_in(files, out), read_nearest).items():
        for side, near in sides.items():
            # Inverted, so that in every row of this table a value above its control is better.
            nearer = f"{1 - near.random_nearer:.1%}"
            table.append([f"{model}: nearer to text than a random one", side, nearer, "50.0%"])
            if near.cka is not None:
                cells = [f"{near.cka:.3f}", "0: unrelated, 1: only rotated"]
                table.append([f"{model}: CKA of image embeddings before and after", side, *cells])
    ratios = [one.image_to_text / one.chance for one in aligned.values()]
    sentence = (
        f"A bag of codes retrieves its caption {max(ratios):.1f} times as often as chance"
        if ratios
        else "Not aligned"
    )
    return Section(
        "Semantics probe", f"{sentence}; {len(table) - 1} numbers beside their controls.", table=table
    )


def _draw_cosines(found: dict[str, NearestTokens]) -> Figure:
    """Draw, a panel per model, how near image, random and text embeddings are to the nearest text one."""
    figure, axes = panels(len(found))
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        every = np.concatenate(list(one.cosines.values()))
        # Common bins: histograms over bins of their own cannot be laid over one another.
        bins = np.linspace(every.min(), every.max(), 50)
        for (kind, cosines), (colour, dash) in zip(one.cosines.items(), styles(), strict=False):
            axis.hist(
                cosines,
                bins=bins,
                density=True,
                histtype="step",
                color=colour,
                linestyle=dash,
                label=kind,
            )
        axis.set(xlabel="cosine to the nearest text embedding", ylabel="density", title=name)
        finish(axis)
    return figure


SECTIONS = (
    SectionKind("nearest", reads="nearest.json", make=nearest),
    SectionKind("probe", reads="align.json of an alignment, nearest.json", make=probe),
)
