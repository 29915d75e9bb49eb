"Real pretrained weights from a pip package: every tensor loaded, the right network, the normalisation that belongs to it."
import timm
import torch

from mbs.segmenter import HALF, make_encoder, read_state, weights_file


def test_lite0_is_the_package_network():
    "timm's network with the package's tensors gives the features of our encoder, and nothing is left over but the classifier."
    encoder = make_encoder("tf_efficientnet_lite0", "pretrained").eval()
    assert encoder.mean == encoder.std == HALF
    assert encoder.receipt["loaded"] == len(encoder.features.state_dict()) and len(encoder.receipt["sha256"]) == 64
    assert encoder.receipt["sha256"].startswith("57934424")
    assert encoder.receipt["dropped"] == ["bn2", "classifier", "conv_head"]
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    state = read_state(weights_file("tf_efficientnet_lite0"))
    assert [tuple(v.shape) for v in state.values()] == [tuple(v.shape) for v in whole.state_dict().values()]
    whole.load_state_dict(dict(zip(whole.state_dict(), state.values())))
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        stem = whole.bn1(whole.conv_stem(x))
        middle = whole.blocks[:5](stem)  # stride 16
        ours = encoder.features(x)
    assert torch.equal(next(f for f in ours if f.shape[1] == middle.shape[1]), middle)


def test_wrong_weights_are_refused(tmp_path):
    import pytest
    state = make_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2).vit.state_dict()
    torch.save({k: v for k, v in state.items() if "norm" not in k}, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match="tensors missing or of another shape"):
        make_encoder("vit_tiny_patch16_224", str(tmp_path / "partial.pth"), 32, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)


def test_weight_file_is_loaded_and_fitted(tmp_path):
    "A ViT's weights of one size serve another: positions are resized, the rest is equal."
    options = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)
    made = make_encoder("vit_tiny_patch16_224", image_size=224, **options)
    torch.save(made.vit.state_dict(), tmp_path / "w.pth")
    loaded = make_encoder("vit_tiny_patch16_224", str(tmp_path / "w.pth"), 64, **options)
    assert loaded.vit.pos_embed.shape == (1, 65, 32) and loaded.grid == (8, 8)
    assert torch.equal(loaded.vit.blocks[0].mlp.fc1.weight, made.vit.blocks[0].mlp.fc1.weight)


def test_pretrained_batch_norms_keep_their_statistics():
    encoder = make_encoder("tf_efficientnet_lite0", "pretrained").train()
    before = encoder.features.bn1.running_mean.clone()
    encoder(torch.randn(2, 3, 32, 32))
    assert torch.equal(encoder.features.bn1.running_mean, before)
