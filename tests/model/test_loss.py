import pytest
import torch
import torch.nn.functional as F

from t2i.model import softmax
from t2i.model.loss import split_sums, summed_loss, token_losses
from t2i.model.softmax import Head

KINDS = {"num_text_rows": 20, "first_image_id": 27}


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 200, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(48, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(48, (3, 200), generator=generator)
    labels[torch.rand(3, 200, generator=generator) < 0.2] = -100
    return hidden, labels, head


@pytest.mark.parametrize("tile_rows", [7, 48])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_and_gradients_equal_plain_cross_entropy(z_loss, tile_rows, monkeypatch):
    monkeypatch.setattr(
        softmax, "CPU_TILE_ROWS", tile_rows
    )  # 48 rows in seven tiles, the last of 6, or in one
    hidden, labels, head = batch()
    total, losses, partitions = summed_loss(hidden, labels, head=Head(head), z_loss=z_loss)
    (0.5 * total).backward()
    gradients = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    squares = logits.logsumexp(-1).square() * (labels != -100)
    (0.5 * (plain.sum() + z_loss * squares.sum())).backward()
    # Sums of about 500 terms in fp32, in another order.
    assert total.item() == pytest.approx((plain.sum() + z_loss * squares.sum()).item(), rel=1e-6)
    assert not losses.requires_grad and not partitions.requires_grad
    assert torch.allclose(losses, plain, atol=1e-5)
    assert torch.allclose(partitions, squares, rtol=1e-5)
    assert torch.allclose(gradients[0], hidden.grad, atol=1e-5)
    assert torch.allclose(gradients[1], head.grad, atol=1e-4)


@pytest.mark.parametrize("image_rows", [None, range(27, 48)])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_bias_a_scale_and_a_cap_are_those_of_plain_logits(cap, image_rows, monkeypatch):
    monkeypatch.setattr(softmax, "CPU_TILE_ROWS", 7)
    hidden, labels, weight = batch()
    bias = torch.randn(48, generator=torch.Generator().manual_seed(1)).requires_grad_()
    head = Head(weight, bias=bias, scale=0.5, cap=cap)
    total, losses, squares = summed_loss(hidden, labels, head=head, z_loss=0.1, image_rows=image_rows)
    total.backward()
    gradients = [value.grad.clone() for value in (hidden, weight, bias)]
    hidden.grad = weight.grad = bias.grad = None
    logits = (hidden @ weight.T + bias) / 2
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(head.logits(hidden), logits)
    over = logits.clone()
    if image_rows:  # image labels are over the image vocabulary alone
        over[..., : image_rows.start] = over[..., : image_rows.start].masked_fill(
            (labels >= image_rows.start)[..., None], -torch.inf
        )
    plain = F.cross_entropy(over.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    partitions = over.logsumexp(-1).square() * (labels != -100)
    (plain.sum() + 0.1 * partitions.sum()).backward()
    torch.testing.assert_close(losses, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(squares, partitions, atol=1e-5, rtol=1e-5)
    # Sums of about 500 terms in fp32, in another order.
    for found, value in zip(gradients, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(found, value.grad, atol=1e-4, rtol=1e-4)


def test_image_labels_can_be_told_from_image_rows_alone():
    hidden, labels, head = batch()
    image_rows = range(27, 45)  # the last three of 48 rows are no codes
    labels[labels >= 45] = -100
    total, losses, partitions = summed_loss(
        hidden, labels, head=Head(head), z_loss=0.1, image_rows=image_rows
    )
    total.backward()
    gradients = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    is_image = ((labels >= 27) & (labels < 45))[..., None]
    is_other_row = torch.tensor([row not in image_rows for row in range(48)])
    logits = logits.masked_fill(is_image & is_other_row, -torch.inf)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    squares = logits.logsumexp(-1).square() * (labels != -100)
    (plain.sum() + 0.1 * squares.sum()).backward()
    assert torch.allclose(losses, plain, atol=1e-5)
    assert torch.allclose(partitions, squares, rtol=1e-5)
    assert torch.allclose(gradients[0], hidden.grad, atol=1e-5)
    assert torch.allclose(gradients[1], head.grad, atol=1e-4)
    measured = token_losses(hidden, labels, head=Head(head), image_rows=image_rows)
    assert all(torch.equal(a, b) for a, b in zip((losses, partitions), measured, strict=True))


def test_losses_to_measure_and_to_learn_from_are_equal():
    hidden, labels, head = batch()
    _, *learned = summed_loss(hidden, labels, head=Head(head))
    measured = token_losses(hidden, labels, head=Head(head))
    assert all(torch.equal(a, b) for a, b in zip(learned, measured, strict=True))


def test_bf16_gradients_are_close_to_an_upcast_twin():
    hidden, labels, head = batch(torch.bfloat16)
    total, *_ = summed_loss(hidden, labels, head=Head(head), z_loss=0.1)
    total.backward()
    twins = [value.detach().float().requires_grad_() for value in (hidden, head)]
    twin, *_ = summed_loss(twins[0], labels, head=Head(twins[1]), z_loss=0.1)
    twin.backward()
    for value, wanted in zip((hidden, head), twins, strict=True):
        assert value.grad.dtype == torch.bfloat16
        # bf16 keeps 8 bits: powers, products and the result are each rounded by up to 0.4%.
        assert (value.grad.float() - wanted.grad).norm() < 0.01 * wanted.grad.norm()


def test_the_split_equals_a_loop_over_tokens():
    hidden, labels, head = batch()
    losses, squares = token_losses(hidden, labels, head=Head(head))
    sums = split_sums(losses, labels, squares=squares, **KINDS)
    twin = {"text": [0.0, 0], "image": [0.0, 0], "special": [0.0, 0]}
    for row in range(3):
        for place in range(200):
            label = labels[row, place].item()
            if label == -100:
                continue
            kind = "text" if label < 20 else "special" if label < 27 else "image"
            logits = head @ hidden[row, place]
            twin[kind][0] -= logits.log_softmax(-1)[label].item()
            twin[kind][1] += 1
    for kind, (total, count) in twin.items():
        found, counted = sums.by_kind()[kind]
        assert counted.item() == count > 0
        assert found.item() == pytest.approx(total, rel=1e-5)
        assert sums.mean(kind) == pytest.approx(total / count, rel=1e-5)


def test_bf16_sums_are_fp32_and_close_to_an_upcast_twin():
    hidden, labels, head = batch(torch.bfloat16)
    losses, _ = token_losses(hidden, labels, head=Head(head))
    twin, _ = token_losses(hidden.float(), labels, head=Head(head.float()))
    assert losses.dtype == torch.float32
    # bf16 logits of size 4 are rounded by up to 0.01 each; the rounding averages out over 480 tokens.
    assert abs(losses.sum() - twin.sum()).item() / (labels != -100).sum().item() < 1e-3


def test_padding_never_reaches_the_loss():
    hidden, labels, head = batch()
    losses, _ = token_losses(hidden, labels, head=Head(head))
    assert (losses[labels == -100] == 0).all()
    nothing, *_ = summed_loss(hidden, torch.full_like(labels, -100), head=Head(head))
    nothing.backward()
    assert nothing.item() == 0
    assert (hidden.grad == 0).all() and (head.grad == 0).all()
