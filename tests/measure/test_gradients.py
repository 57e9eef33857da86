import json

import pytest
import torch

from t2i.measure.gradients import gradient_shares, write_gradients
from t2i.runs.loading import open_model
from t2i.tokens.sequence import encode_sequence


def test_shares_equal_those_of_a_loss_written_out(model_folder, tmp_path, capsys):
    model = open_model(str(model_folder), needs_images=False)
    layout, network = model.layout, model.model
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack(
        [
            encode_sequence(
                torch.randint(50, (length,), generator=generator),
                torch.randint(layout.codebook_size, (16,), generator=generator),
                layout=layout,
                mode="text-to-image",
                seq_len=32,
            )
            for length in (3, 7, 5)
        ]
    )
    found = gradient_shares(model, ids, batch_size=2)
    assert "gradient of image: 100%" in capsys.readouterr().err
    logits = network(ids).logits[:, :-1].log_softmax(-1)
    labels = ids[:, 1:]
    nats = -logits.gather(-1, labels[..., None])[..., 0]
    counted = labels != layout.pad_id
    image = labels >= layout.first_image_id
    text = labels < layout.num_text_rows
    masks = {"text": text & counted, "image": image & counted, "special": ~text & ~image & counted}
    total = counted.sum()
    parts = {}
    for kind, mask in masks.items():
        network.zero_grad()
        ((nats * mask).sum() / total).backward(retain_graph=True)
        parts[kind] = torch.cat([value.grad.flatten().double() for value in network.parameters()])
        layers = {
            name: value for name, value in network.named_parameters() if value.shape[0] != layout.vocab_size
        }
        inner = torch.cat([value.grad.flatten().double() for value in layers.values()])
        assert len(layers) == len(list(network.parameters())) - 2  # embedding and head
        assert getattr(found, kind).tokens == int(mask.sum())
        # fp32 sums of a few hundred numbers in another order.
        assert getattr(found, kind).norm == pytest.approx(float(parts[kind].norm()), rel=1e-4)
        assert getattr(found, kind).norm_layers == pytest.approx(float(inner.norm()), rel=1e-4)
        assert getattr(found, kind).norm_layers < getattr(found, kind).norm
        share = float((nats * mask).sum().detach() / (nats * counted).sum().detach())
        assert getattr(found, kind).loss_share == pytest.approx(share, rel=1e-4)
    assert found.text.token_share == pytest.approx(15 / int(total))
    cosine = parts["text"] @ parts["image"] / parts["text"].norm() / parts["image"].norm()
    assert found.cosine_text_image == pytest.approx(float(cosine), abs=1e-4)
    assert sum(getattr(found, kind).loss_share for kind in masks) == pytest.approx(1)
    norms = [float(parts[kind].norm()) for kind in ("text", "image", "special")]
    assert found.image.norm_share == pytest.approx(norms[1] / sum(norms), rel=1e-4)

    # Image codes alone have no angle to a text that is not there.
    alone = gradient_shares(model, ids[:, -17:-1].clamp(min=layout.first_image_id), batch_size=2)
    assert (alone.text.tokens, alone.text.norm, alone.cosine_text_image) == (0, 0, None)
    assert alone.image.norm_share == pytest.approx(1)

    write_gradients(found, model=model, path=tmp_path / "gradients.json")
    written = json.loads((tmp_path / "gradients.json").read_text())
    assert set(written) == {"checkpoint", "text", "image", "special", "cosine_text_image"}
    shares = {"token_share", "loss_share", "norm_share"}
    assert set(written["image"]) == {"tokens", "norm", "norm_layers"} | shares
