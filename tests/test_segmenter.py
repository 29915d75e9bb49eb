"Mixed precision, weight transfer, and encoders that are not vision transformers."

import pytest
import torch

from mbs.segmenter import MaskNorm, Segmenter, check_finite, find_best_channel
from mbs.weights import make_encoder

TINY = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)


def test_mask_norm_is_float32_under_autocast():
    x = torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = MaskNorm([1, 3])(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, MaskNorm([1, 3])(x.bfloat16().float()))


def test_bfloat16_forward_and_backward():
    model = Segmenter(make_encoder("vit_tiny_patch16_224", image_size=32, **TINY), [1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(1, 3, 32, 32))
    assert out.patch_logits.dtype == torch.float32 and torch.isfinite(out.logits).all()
    out.logits.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_weight_transfer_copies_the_background_and_leaves_the_rest():
    torch.manual_seed(0)
    model = Segmenter(make_encoder("vit_tiny_patch16_224", image_size=32, **TINY), [1, 3])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.grow(2, transfer=True)
    assert torch.equal(model.decoder.class_tokens[2], before["decoder.class_tokens.0"].expand(2, -1))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not torch.equal(model.grow(1, transfer=False).decoder.class_tokens[3], before["decoder.class_tokens.0"])
    assert model.groups == [1, 3, 2, 1] and model.decoder.mask_norm.weight[3].tolist() == [1]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_convolutional_encoders(name):
    model = Segmenter(make_encoder(name), [1, 2], dim=32, heads=2).eval()
    assert model(torch.randn(1, 3, 64, 48)).patch_logits.shape == (1, 3, 4, 3)


def test_small_vit_with_another_grid():
    encoder = make_encoder("vit_small_patch16_224", image_size=100)
    assert encoder.grid == (7, 7) and encoder(torch.randn(1, 3, 64, 128)).shape == (1, 32, 384)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_channel_is_that_of_argmax(dtype):
    "In every layout; of equal channels the first, and of NaN the first."
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        n, height, width = torch.randint(1, 30, (3,), generator=generator).tolist()
        values = (2 * torch.randn(2, n, height, width, generator=generator)).round().to(dtype)
        if seed % 2:
            values[torch.rand(values.shape, generator=generator) < 0.1] = float("nan")
        by_rows = values.permute(2, 0, 1, 3).contiguous()
        for layout in (values, values.contiguous(memory_format=torch.channels_last), by_rows.permute(1, 2, 0, 3)):
            assert torch.equal(find_best_channel(layout), layout.argmax(1))
        assert torch.equal(find_best_channel(by_rows, dim=2), by_rows.argmax(2))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(number):
    logits = torch.randn(2, 3, 4, 5)
    check_finite(logits)
    logits[1, 2, 3, 4] = number
    with pytest.raises(ValueError, match="not finite: expected finite logits"):
        check_finite(logits)
