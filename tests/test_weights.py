"Pretrained weights: every tensor is loaded, into the right network, with its normalisation; failures are one sentence."

import pytest
import timm
import torch

import mbs.weights
from mbs.run import trained_run
from mbs.weights import _HALF, _find_installed_weights, make_encoder, read_state

TINY = dict(patch_size=8, embed_dim=32, depth=1, num_heads=2)


@pytest.mark.parametrize("name, digest", [("tf_efficientnet_lite0", "57934424"), ("tf_efficientnet_lite2", "9656183e")])
def test_encoder_is_the_package_network(name, digest):
    "timm's network with the package's tensors gives our encoder's features, and only the classifier is left over."
    encoder = make_encoder(name, "pretrained").eval()
    assert encoder.mean == encoder.std == _HALF
    receipt = encoder.receipt
    assert receipt["loaded"] == len(timm.create_model(name, num_classes=0).state_dict())
    assert len(receipt["sha256"]) == 64 and receipt["sha256"].startswith(digest)
    assert receipt["unused"] == ["classifier"]
    assert not {"bn2", "conv_head"} & {k.split(".")[0] for k in encoder.network.state_dict()}
    whole = timm.create_model(name).eval()
    state, _ = read_state(_find_installed_weights(name))
    assert [tuple(v.shape) for v in state.values()] == [tuple(v.shape) for v in whole.state_dict().values()]
    whole.load_state_dict(dict(zip(whole.state_dict(), state.values())))
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        stem = whole.bn1(whole.conv_stem(x))
        middle = whole.blocks[:5](stem)  # stride 16
        (ours,) = encoder.network.forward_intermediates(x, indices=[3], intermediates_only=True)
    assert torch.equal(ours, middle)


def test_wrong_weights_are_refused(tmp_path):
    state = make_encoder("vit_tiny_patch16_224", image_size=32, **TINY).vit.state_dict()
    torch.save({k: v for k, v in state.items() if "norm" not in k}, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match="tensors missing or of another shape"):
        make_encoder("vit_tiny_patch16_224", str(tmp_path / "partial.pth"), 32, img_size=32, **TINY)


def test_weight_file_is_loaded_and_fitted(tmp_path):
    "A ViT's weights of one size are loaded for another: positions are resized, the rest is equal."
    made = make_encoder("vit_tiny_patch16_224", image_size=224, **TINY)
    torch.save(made.vit.state_dict(), tmp_path / "w.pth")
    loaded = make_encoder("vit_tiny_patch16_224", str(tmp_path / "w.pth"), 64, **TINY)
    assert loaded.vit.pos_embed.shape == (1, 65, 32) and loaded.grid == (8, 8)
    assert torch.equal(loaded.vit.blocks[0].mlp.fc1.weight, made.vit.blocks[0].mlp.fc1.weight)


def test_pretrained_batch_norms_keep_their_statistics():
    encoder = make_encoder("tf_efficientnet_lite0", "pretrained").train()
    before = encoder.network.bn1.running_mean.clone()
    encoder(torch.randn(2, 3, 32, 32))
    assert torch.equal(encoder.network.bn1.running_mean, before)


@pytest.mark.parametrize(
    "name,options",
    [
        ("vit_small_patch16_384", dict(embed_dim=48, depth=2, num_heads=2)),
        ("swin_tiny_patch4_window7_224", dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))),
        ("resnet18", {}),
        ("tf_efficientnet_lite0", {}),
        ("convnext_atto", {}),
    ],
)
def test_any_backbone(name, options, tmp_path):
    "Tokens have stride 16 at any size; weights are read back from a file; every parameter gets a gradient."
    whole = timm.create_model(name, **options)
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "w.pth")
    encoder = make_encoder(name, str(tmp_path / "w.pth"), 64, **options)
    config = timm.get_pretrained_cfg(name)
    assert encoder.receipt["source"] == "w.pth" and encoder.receipt["missing"] == encoder.receipt["unexpected"] == 0
    assert (encoder.mean, encoder.std) == (config.mean, config.std)
    for height, width in ((64, 64), (96, 48)):
        tokens = encoder.train()(torch.randn(2, 3, height, width))
        assert tokens.shape == (2, height * width // 256, encoder.dim)
    tokens.square().mean().backward()
    without_gradient = {k for k, p in encoder.named_parameters() if p.grad is None}
    assert not without_gradient or without_gradient == {"vit.cls_token"}


def test_swin_is_timms(tmp_path):
    "The encoder gives the features of the stride-16 stage of timm's own network."
    options = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    whole = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, **options).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    encoder = make_encoder("swin_tiny_patch4_window7_224", str(tmp_path / "w.pth"), **options).eval()
    x = torch.randn(1, 3, 112, 80)
    with torch.inference_mode():
        theirs = whole.layers[2](whole.layers[1](whole.layers[0](whole.patch_embed(x))))  # (1, h, w, D)
        torch.testing.assert_close(encoder(x), theirs.flatten(1, 2))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "Pretend that timm's cache holds resnet18, and that nothing can be fetched."
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(mbs.weights, "ENDPOINT", "http://127.0.0.1:9")

    def look_up(repository, file):
        return str(tmp_path / file) if "resnet18" in repository else None

    monkeypatch.setattr(mbs.weights, "try_to_load_from_cache", look_up)


def test_timms_own_weights_and_their_receipt(hub):
    encoder = make_encoder("resnet18", "pretrained")
    receipt = encoder.receipt
    assert receipt["source"] == "timm/resnet18.a1_in1k" and receipt["unused"] == ["fc"]
    assert len(receipt["tensors_sha256"]) == 64
    torch.manual_seed(0)
    assert torch.equal(encoder.network.conv1.weight, timm.create_model("resnet18").conv1.weight)


def test_no_network_is_one_sentence(hub):
    with pytest.raises(FileNotFoundError, match="by hand and give weights=FILE") as e:
        make_encoder("vit_base_patch16_384", "pretrained")
    assert "\n" not in str(e.value) and "timm/vit_base_patch16_384.augreg_in21k_ft_in1k" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\x80\x04\x95cposix\nsystem\n"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_that_are_no_weights(tmp_path, content, ending):
    (tmp_path / f"w.{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=r"of tensors$|by name"):
        make_encoder("resnet18", str(tmp_path / f"w.{ending}"))


def test_no_pickled_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        make_encoder("resnet18", str(tmp_path / "w.pth"))
    assert not (tmp_path / "evil").exists()


RESNET = {k: v for k, v in timm.create_model("resnet18").state_dict().items()}


def save_weights(folder, content):
    torch.save(content, folder / "w.pth")
    return str(folder / "w.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "model.encoder.", "teacher.backbone."])
@pytest.mark.parametrize(
    "wrapper", [(), ("state_dict",), ("model", "state_dict"), ("ema",), ("params_ema",), ("model", "x")]
)
def test_names_and_wrappers_of_other_programs(tmp_path, prefix, wrapper):
    "What stands before the names and around the tensors is taken off, and the receipt says so."
    state = {prefix + k: v for k, v in RESNET.items()} | ({"decode_head.w": torch.zeros(3)} if prefix else {})
    content = state | dict(epoch=3)
    for key in reversed(wrapper):
        content = {key: content, "optimizer": dict(lr=0.1), "best": 0.5}
    encoder = make_encoder("resnet18", save_weights(tmp_path, content), 64)
    assert torch.equal(encoder.network.conv1.weight, RESNET["conv1.weight"])
    assert encoder.receipt.get("prefix", "") == prefix and "epoch" in encoder.receipt["left_out"]
    assert encoder.receipt["unused"] == (["decode_head", "fc"] if prefix else ["fc"])


def test_files_without_counters_of_batches(tmp_path):
    state = {k: v for k, v in RESNET.items() if "num_batches" not in k}
    receipt = make_encoder("resnet18", save_weights(tmp_path, state), 64).receipt
    assert receipt["missing"] == 20 and receipt["loaded"] == 120
    del state["layer1.0.bn1.running_mean"]
    with pytest.raises(ValueError, match="1 tensors missing"):
        make_encoder("resnet18", save_weights(tmp_path, state), 64)


def test_two_networks_in_a_file_are_refused(tmp_path):
    state = {p + k: v for p in ("student.", "teacher.") for k, v in RESNET.items()}
    with pytest.raises(ValueError, match=r"hold several networks, named student\., teacher\."):
        make_encoder("resnet18", save_weights(tmp_path, state), 64)


@pytest.mark.parametrize("key", ["extra.weight", "layer9.0.conv1.weight"])
def test_tensors_that_belong_to_nothing_are_refused(tmp_path, key):
    "With a prefix, too: what stands under it must be the network's."
    for prefix in ("", "module."):
        state = {prefix + k: v for k, v in (RESNET | {key: torch.zeros(1)}).items()}
        with pytest.raises(ValueError, match="1 unexpected"):
            make_encoder("resnet18", save_weights(tmp_path, state), 64)


def test_the_model_of_a_run_is_an_encoder(tmp_path):
    run = trained_run("mbs")
    file = str(run.step_path(0, "model.safetensors"))
    encoder = make_encoder(run.settings.encoder, file, run.card.recipe.crop, **run.settings.encoder_options)
    expected = run.model(0, identity=False).encoder.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items())
    assert encoder.receipt["prefix"] == "encoder.vit." and encoder.receipt["unused"] == ["decoder"]


def test_two_wrapped_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_state(save_weights(tmp_path, dict(student=RESNET, teacher=RESNET)))
