"""A study of runs whose files are written by hand, so that every number of a report is known."""

import json
from pathlib import Path

import yaml

from t2i.study.jobs import read_study, run_dir

IMAGES = {
    "format_version": 2,
    "source": "a test",
    "heldout_share": 0.1,
    "counts": {"train": 9, "heldout": 1},
    "files": {},
    "arguments": {},
    "floors_nats": {},
    "text_tokenizer": {"name": "a test", "fingerprint": "0", "num_tokens": 9},
    "image_tokenizer": {"name": "a test", "fingerprint": "0"},
    "given_ids": True,
    "codes_per_image": 16,
    "codebook_size": 8,
}
"""What a manifest of codes says."""


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


class Made:
    """A study with arms and seeds, and a way to write the files of its runs."""

    def __init__(self, out: Path, **seeds):
        """Take the seeds of each arm."""
        self.out = out
        study = {"title": "T", "question": "Q", "arms": {arm: {} for arm in seeds}, "arm_seeds": seeds}
        (out / "study.yaml").write_text(yaml.safe_dump(study))
        self.study = read_study(out / "study.yaml")

    def folder(self, arm, seed):
        return run_dir(self.out, arm, seed)

    def run(self, arm, seed, *, train=(), heldout=(), text=(), state="done", manifest=None, settings=None):
        """Write one run.

        Args:
            train: what rows of metrics.jsonl hold at steps 2, 4, 6 and so on; likewise heldout and text.
            manifest: what it says that IMAGES does not.
        """
        folder = self.folder(arm, seed)
        steps = range(2, 2 * max(map(len, (train, heldout, text, [()]))) + 1, 2)
        rows = [{"step": step, "tokens": 100 * step, "loss": 1.0} for step in steps]
        for row, values in zip(rows, train, strict=False):
            row |= values
        for split, given in (("heldout", heldout), ("text", text)):
            rows += [
                {"step": step, "split": split, **values} for step, values in zip(steps, given, strict=False)
            ]
        write_json(folder / "status.json", {"state": state})
        write_json(folder / "data_manifest.json", IMAGES | (manifest or {}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "resolved.yaml").write_text(yaml.safe_dump(settings or {}))
        return folder
