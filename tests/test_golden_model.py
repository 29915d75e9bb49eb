"Encoder, decoder, segmenter and a full training step agree with the released program."

from functools import partial

import numpy as np
import pytest
import timm
import torch
from golden import close, load, needs_golden, tensors
from steps import make_step
from torch import nn

from mbs.methods import Method
from mbs.segmenter import MaskTransformer, Segmenter, ViTEncoder, _resize_positions

pytestmark = needs_golden
GOLDEN = load()
DTYPES = [torch.float64, torch.float32]


def encoder(prefix, dtype):
    "The reference's encoder: 32×32, patch 8, width 16, layer norms of eps 1e-5."
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        num_classes=0,
    )
    state = tensors(GOLDEN, prefix, torch.float32)
    vit.load_state_dict({k: v for k, v in state.items() if not k.startswith("head")})
    return ViTEncoder(vit).to(dtype)


def own_names(state):
    "The reference calls class tokens cls_emb and gives them a leading axis."
    return {k.replace("cls_emb", "class_tokens"): v[0] if "cls_emb" in k else v for k, v in state.items()}


def decoder(prefix, groups, dtype):
    d = MaskTransformer(groups, 16, heads=2, mlp_ratio=2).to(dtype)
    d.load_state_dict(own_names(tensors(GOLDEN, prefix, dtype)))
    return d


def segmenter(encoder_prefix, decoder_prefix, groups, dtype=torch.float64):
    s = Segmenter(encoder(encoder_prefix, dtype), groups, heads=2, mlp_ratio=2).to(dtype)
    s.decoder.load_state_dict(own_names(tensors(GOLDEN, decoder_prefix, dtype)))
    return s.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoder(dtype):
    x, net = tensors(GOLDEN, "encoder/", dtype), encoder("encoder/sd/", dtype).eval()
    close(net(x["im"]), x["out"][:, 1:], dtype)
    close(net(x["im_resize"]), x["out_resize"][:, -15:], dtype)
    close(_resize_positions(net.vit.pos_embed, (4, 4), (5, 3)), x["pos_embed_resized"], dtype)
    grid = net.vit.patch_embed(x["im"]) + net.vit.pos_embed[:, 1:]
    grid = torch.cat([(net.vit.cls_token + net.vit.pos_embed[:, :1]).expand(2, -1, -1), grid], 1)
    features = []
    for block in net.vit.blocks:
        features.append(grid := block(grid))
    close(torch.stack([f[:, 1:] for f in features], 1), x["block_features"], dtype)


def test_loaded_positions():
    "Positions of pretrained weights are resized as the released program's loader did (bicubic; float32 values)."
    mine = _resize_positions(torch.from_numpy(GOLDEN["encoder/timm_posembed_in"]), (24, 24), (32, 32), mode="bicubic")
    close(mine, torch.from_numpy(GOLDEN["encoder/timm_posembed_bicubic_32x32"]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoder(dtype):
    x, net = tensors(GOLDEN, "decoder/", dtype), decoder("decoder/sd/", [1, 3, 2], dtype).eval()
    tokens = x["x"].clone().requires_grad_()
    logits, patches, classes = net(tokens)
    masks = logits.mT.unflatten(2, (4, 4))
    close(masks, x["masks"], dtype)
    close(patches, x["patches"], dtype)
    close(classes, x["cls_seg_feat"], dtype)
    close(net.tokens().expand(2, -1, -1), x["cls_token"], dtype)
    (masks * x["cotangent"]).sum().backward()
    close(tokens.grad, x["grad_x"], dtype, rtol=1e-9 if dtype == torch.float64 else 2e-5)  # sums of 24 float32 products
    check_gradients(net, tensors(GOLDEN, "decoder/grad_sum/", torch.float64), dtype)


def check_gradients(net, want, dtype):
    "Every parameter's gradient by its sum and its sum of squares."
    grads = {k: p.grad for k, p in net.named_parameters()}
    want = {k.replace("cls_emb", "class_tokens"): v for k, v in want.items()}
    assert set(grads) == set(want)
    for k, grad in grads.items():
        close(
            torch.stack([grad.double().sum(), grad.double().square().sum()]),
            want[k],
            dtype,
            rtol=1e-9 if dtype == torch.float64 else 1e-4,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segmenter(dtype):
    "A 30 × 37 picture with a patch of 8: padded, decoded, cropped back."
    x = tensors(GOLDEN, "segmenter/", dtype)
    out = segmenter("encoder/sd/", "decoder/sd/", [1, 3, 2], dtype)(x["im"])
    close(out.logits, x["logits"], dtype)
    close(out.patch_logits, x["masks"], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_step(dtype):
    x, want = tensors(GOLDEN, "fullstep/", dtype), tensors(GOLDEN, "fullstep/s1/", torch.float64)
    student = segmenter("encoder/sd/", "decoder/sd/", [1, 3, 2], dtype)
    teacher = segmenter("fullstep/prev_encoder_sd/", "fullstep/prev_decoder_sd/", [1, 3], dtype).frozen()
    terms = Method("mbs").loss(student(x["im"]), teacher(x["im"]), x["labels"], make_step(4, 2))
    for mine, theirs in (("cross_entropy", "seg_loss"), ("patch_features", "lfd_patches"), ("loss", "loss_total")):
        close(terms[mine], want[theirs], dtype)
    close(terms["output"] + terms["orthogonality"], want["lod"], dtype)
    terms["loss"].backward()
    check_gradients(
        student, {own_prefix(k): v for k, v in tensors(GOLDEN, "fullstep/s1/grad_sum/", torch.float64).items()}, dtype
    )
    close(
        student.encoder.vit.patch_embed.proj.weight.grad,
        want["grad_patch_embed"],
        dtype,
        rtol=None if dtype == torch.float64 else 1e-4,
    )
    close(student.decoder.class_tokens[2].grad, want["grad_cls_emb2"][0], dtype)
    assert all(name.startswith("encoder.head") for name in GOLDEN["fullstep/s1/params_without_grad"])
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3, weight_decay=1e-5, momentum=0.9, nesterov=True)
    for _ in range(3):
        optimiser.step()
    close(student.decoder.class_tokens[2], want["cls_emb2_after_3_sgd"][0], dtype)
    close(student.encoder.vit.patch_embed.proj.bias, want["patch_bias_after_3_sgd"], dtype)


def own_prefix(name):
    return name.replace("encoder.", "encoder.vit.", 1) if name.startswith("encoder.") else name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_step(dtype):
    x, want = tensors(GOLDEN, "fullstep/", dtype), tensors(GOLDEN, "fullstep/s0/", torch.float64)
    student = segmenter("encoder/sd/", "decoder/sd/", [1, 3, 2], dtype)
    terms = Method("mbs").loss(student(x["im"]), None, x["labels"], make_step(1, 5))
    assert np.array_equal(GOLDEN["fullstep/s0/labels_out"], GOLDEN["fullstep/labels"])
    close(terms["cross_entropy"], want["seg_loss"], dtype)
    close(terms["loss"], want["loss_total"], torch.float32)  # the reference itself is float32 here
    terms["loss"].backward()
    check_gradients(
        student, {own_prefix(k): v for k, v in tensors(GOLDEN, "fullstep/s0/grad_sum/", torch.float64).items()}, dtype
    )
