from dataclasses import replace

import pytest
import torch
from tiny_tokenizers import TINY, Killed, at_step, kill, squares
from torch import nn

from t2i.config import TokenizerConfig
from t2i.errors import UserError
from t2i.image_tokenizer import train as image_tokenizer
from t2i.image_tokenizer.adversary import Adversary
from t2i.image_tokenizer.train import train_image_tokenizer

CHANNELS = (8, 16)


def an_adversary():
    torch.manual_seed(0)
    return Adversary.begin(CHANNELS, lr=2e-3, device=torch.device("cpu"))


def test_its_loss_weighs_at_the_last_layer_what_the_pixels_weigh():
    adversary, last = an_adversary(), nn.Conv2d(4, 3, 1)
    pixels, hidden = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16)
    output = last(hidden)
    reconstruction = 7 * (output - pixels).abs().mean()
    loss = adversary.loss(output, reconstruction=reconstruction, last=last.weight)
    lengths = [
        torch.autograd.grad(term, last.weight, retain_graph=True)[0].norm() for term in (reconstruction, loss)
    ]
    assert torch.allclose(*lengths, rtol=0.01)
    # The other way about it would learn to be told apart.
    before = adversary.discriminator(output).mean()
    (towards,) = torch.autograd.grad(loss, output)
    assert adversary.discriminator(output - 0.1 * towards / towards.norm()).mean() > before
    assert all(weight.grad is None for weight in adversary.discriminator.parameters())
    assert all(weight.requires_grad for weight in adversary.discriminator.parameters())


def test_it_learns_to_tell_images_from_blurred_ones_and_sees_others_of_their_kind():
    adversary = an_adversary()
    generator = torch.Generator().manual_seed(0)

    def sharp_and_blurred():
        sharp = (torch.rand(8, 3, 16, 16, generator=generator) < 0.5).float()
        return sharp, nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1)

    for _ in range(60):
        adversary.learn(*sharp_and_blurred())
    real, made = (adversary.discriminator(pixels).mean().item() for pixels in sharp_and_blurred())
    assert real > 0.5 and made < -0.5


@pytest.mark.usefixtures("few_latents")
def test_it_changes_nothing_before_its_share_of_the_steps_and_the_model_after_it(tmp_path, monkeypatch):
    learned, learn = [], Adversary.learn
    monkeypatch.setattr(Adversary, "learn", lambda self, *args: learned.append(1) or learn(self, *args))
    # Of 20 steps; the last one always has it, as it has been asked for.
    for weight, share, expected in ((0.0, 0.0, 0), (0.5, 0.5, 10), (0.5, 0.99, 1)):
        learned.clear()
        config = replace(TINY, adversarial_weight=weight, adversarial_after_share=share)
        with monkeypatch.context() as patched:
            saved = {}
            save = image_tokenizer.Training.save

            def keep(training, path, *, step, save=save, saved=saved):
                saved[step] = {name: value.clone() for name, value in training.trained.state_dict().items()}
                save(training, path, step=step)

            patched.setattr(image_tokenizer.Training, "save", keep)
            train_image_tokenizer(squares(), config=config, out=tmp_path / f"{weight}-{share}")
        assert len(learned) == expected
        if not weight:
            plain = saved
        same = [all(map(torch.equal, plain[step].values(), saved[step].values())) for step in (10, 20)]
        assert same == [True, not weight]


@pytest.mark.usefixtures("few_latents")
def test_a_stopped_training_resumes_with_its_discriminator(tmp_path, monkeypatch):
    config = replace(TINY, adversarial_weight=0.5, adversarial_after_share=0.2)
    whole = train_image_tokenizer(squares(), config=config, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        at_step(patched, 15, kill)
        with pytest.raises(Killed):
            train_image_tokenizer(squares(), config=config, out=tmp_path / "killed")
    resumed = train_image_tokenizer(squares(), config=config, out=tmp_path / "killed")
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    with pytest.raises(UserError, match=r"other settings \(adversarial_weight\)"):
        train_image_tokenizer(
            squares(), config=replace(config, adversarial_weight=1.0), out=tmp_path / "killed"
        )


def test_images_too_small_for_its_levels_are_refused():
    with pytest.raises(
        UserError, match="has 4 levels, which need images of 24 pixels per side; --image-size is 16"
    ):
        TokenizerConfig(image_size=16, adversarial_weight=1.0, discriminator_channels=(8, 8, 8, 8))
    with pytest.raises(UserError, match="--discriminator-channels is empty"):
        TokenizerConfig(discriminator_channels=())
    least = replace(TINY, image_size=16, adversarial_weight=1.0, discriminator_channels=(8, 8, 8))
    adversary = Adversary.begin(least.discriminator_channels, lr=1e-3, device=torch.device("cpu"))
    assert adversary.discriminator(torch.rand(1, 3, 12, 12)).shape == (1, 1, 1, 1)
