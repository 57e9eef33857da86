"""Reference features, computed once and cached in a folder that is named by the hash of what made them."""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from t2i.errors import DataError
from t2i.files import values_sha256
from t2i.measure.distances import FrechetStatistics, statistics
from t2i.measure.extractor import FeatureExtractor
from t2i.measure.features import extract
from t2i.measure.images import LazyImages

logger = logging.getLogger(__name__)

MADE_OF, FEATURES_FILE, STATISTICS = "made_of.json", "features.npy", "statistics.npz"
FEATURE_BATCH = 32


@dataclass(frozen=True)
class Reference:
    """Real images that drawn ones are compared with."""

    name: str
    """In words."""
    images: LazyImages
    which: dict[str, object]
    """Which images these are, as plain JSON."""
    crop: str
    """The rule for cropping them to squares, in words."""
    image_size: int
    """Pixels per side after it."""
    cache: Path | None = None
    """Folder of cached features; None where `which` does not identify the content, so nothing is cached."""

    def made_of(self) -> dict[str, object]:
        """Describe all that decides the pixels; the hash of this names the reference in results."""
        return {**self.which, "crop": self.crop, "image_size": self.image_size}

    def sha256(self) -> str:
        """Hash the description of its pixels."""
        return values_sha256(self.made_of())


@dataclass(frozen=True)
class Measured:
    """Features of one set of images, and the Gaussian fitted to them."""

    features: np.ndarray
    """(N, D) float32."""
    statistics: FrechetStatistics


def with_statistics(features: np.ndarray) -> Measured:
    """Fit the Gaussian of features (N, D)."""
    return Measured(features=features, statistics=statistics(features))


def measure_reference(reference: Reference, extractor: FeatureExtractor, *, progress: bool) -> Measured:
    """Compute a reference's features, or read them from the cache."""
    if reference.cache is None:
        return with_statistics(
            extract(reference.images, extractor, batch_size=FEATURE_BATCH, progress=progress)
        )
    made_of = {
        **reference.made_of(),
        "features": extractor.name,
        "features_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "versions": {name: version(name) for name in ("pillow", "clean-fid")},  # they decide the pixels
    }
    if extractor.preprocessing:
        made_of["preprocessing"] = extractor.preprocessing
    # By content and not by name: features of other pixels or weights then have another folder, and none grows stale.
    folder = reference.cache / values_sha256(made_of)[:32]
    if not folder.is_dir():
        logger.info("computing features of %s once, into %s", reference.name, folder)
        measured = with_statistics(
            extract(reference.images, extractor, batch_size=FEATURE_BATCH, progress=progress)
        )
        try:
            _publish(measured, made_of, folder)
        except OSError as error:  # a home that cannot be written, or a full one
            logger.warning("%s cannot be written (%s): features are computed again.", folder, error.strerror)
            return measured
    return _load(folder)


def _publish(measured: Measured, made_of: dict[str, object], folder: Path) -> None:
    """Write a folder under another name and rename it; another process may have been quicker."""
    # Named by machine and process: nodes of one job may share the folder.
    part = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)  # of a process of the same number that was killed
    part.mkdir(parents=True)
    # Features beside the Gaussian: the kernel distance needs them all, and rows without some images are fitted anew.
    gaussian = measured.statistics
    try:
        np.save(part / FEATURES_FILE, measured.features)
        np.savez(part / STATISTICS, mean=gaussian.mean, cov=gaussian.cov, n=gaussian.n)
        (part / MADE_OF).write_text(json.dumps(made_of))
        part.rename(folder)
    except OSError:  # a folder that is not empty cannot be renamed over: somebody was quicker
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _load(folder: Path) -> Measured:
    try:
        with np.load(folder / STATISTICS) as arrays:
            gaussian = FrechetStatistics(mean=arrays["mean"], cov=arrays["cov"], n=int(arrays["n"]))
        return Measured(features=np.load(folder / FEATURES_FILE), statistics=gaussian)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise DataError(
            f"{folder}, cached features, is damaged: {error}. Remove it to compute them again."
        ) from error
