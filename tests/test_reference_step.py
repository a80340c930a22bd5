"""The baseline of the benchmark takes the authors' step: their tensors of one, and the weights that ours comes to."""

import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, by_image, parts
from tiny import tiny_model

from trainers.conversion.ijepa_authors import from_ijepa_checkpoint
from trainers.conversion.names import FUSED_ENCODER, FUSED_PREDICTOR
from trainers.reference_step import ReferenceStep


def test_it_is_the_authors_step():
    golden = load_file(GOLDEN / "ijepa_step.safetensors")
    reference = ReferenceStep(from_ijepa_checkpoint(parts(golden), image_size=64, num_attention_heads=3))
    loss = reference.loss(golden["pixel_values"], golden["context_mask"][:, 0], golden["target_masks"])
    torch.testing.assert_close(loss, golden["loss_smooth_l1"], atol=1e-6, rtol=0)
    loss.backward()
    gradients = parts(golden, prefix="grad.")
    for part, tensors in (("encoder", reference.encoder), ("predictor", reference.predictor)):
        for name, expected in gradients[part].items():
            assert (tensors[name].grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-8, name
    assert by_image(golden["predictions"]).shape[:2] == golden["target_masks"].shape[:2]


def test_ours_comes_to_the_same_weights():
    model = tiny_model(regularizer_weight=0.0, layer_norm_eps=1e-6).train()
    reference = ReferenceStep(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == decays], "weight_decay": 0.05 * decays}
              for decays in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        masks = model.sample_masks(4, generator=generator)
        loss = model(images, *masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target_encoder(0.9)
        assert abs(reference.finish(reference.loss(images, *masks), momentum=0.9) - loss.item()) < 1e-6
    for table, ours, theirs in (
        (FUSED_ENCODER, model.context_encoder, reference.encoder),
        (FUSED_PREDICTOR, model.predictor, reference.predictor),
        (FUSED_ENCODER, model.cjepa, reference.target_encoder),
    ):
        for name, tensor in table.to_theirs(ours.state_dict()).items():
            torch.testing.assert_close(theirs[name].detach(), tensor, atol=2e-5, rtol=0)
