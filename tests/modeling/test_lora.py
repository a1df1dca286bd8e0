"""LoRA through peft: which layers to name, and that adapters train, load and merge."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection


DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"
ATTENTION = ["attention.in_proj", "attention.out_proj"]
FEED_FORWARD = ["feed_forward.0", "feed_forward.3"]


@pytest.fixture(params=[{"decoder_type": "sparse_rcnn"}, {"decoder_type": "adamixer", "hidden_size": 32}], ids=str)
def model(request):
    torch.manual_seed(0)
    return DrmmForObjectDetection(tiny_config(**request.param)).eval()


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(random_pictures(), labels=random_labels(3, 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_attention_and_feed_forward_train_save_load_and_merge(model, tmp_path):
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[*ATTENTION, *FEED_FORWARD]))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    parts = {name.partition(".lora_")[0].partition(".stage.")[2] for name in trainable}
    assert parts == {*ATTENTION, *FEED_FORWARD} and len(trainable) == 2 * 4 * 2  # A and B, layers, stages
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    losses = train(adapted.train())
    assert losses[-1] < losses[0]
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable

    adapted.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(DrmmForObjectDetection.from_pretrained(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        outputs, again = adapted(random_pictures()), loaded(random_pictures())
        plain = DrmmForObjectDetection.from_pretrained(folder)(random_pictures())
        merged = loaded.merge_and_unload()(random_pictures())
    assert torch.equal(again.logits, outputs.logits) and torch.equal(again.pred_boxes, outputs.pred_boxes)
    torch.testing.assert_close(merged.logits, outputs.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(merged.pred_boxes, outputs.pred_boxes, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain.logits, outputs.logits, rtol=1e-3, atol=1e-4)


def test_a_head_is_trained_whole_beside_the_adapters(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["head"])).train()
    losses = train(adapted)
    assert losses[-1] < losses[0]
    heads = [name for name, p in adapted.named_parameters() if p.requires_grad and ".head." in name]
    assert any("classifier.weight" in name for name in heads) and any("box_scale.bias" in name for name in heads)


def test_every_linear_layer_may_have_an_adapter(model):
    """Also those that compute in the type of the boxes: an adapter that nothing calls would never get a gradient."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    adapted(random_pictures(), labels=random_labels(3, 2)).loss.backward()
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("box_delta" in name for name in adapters)
    assert not [name for name, p in adapters.items() if p.grad is None or not p.grad.any()]


def test_the_lines_of_the_documentation_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/mine/best")
    (code,) = re.findall(r"```python\n(from peft .*?)```", DOCUMENT.read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert scope["layers"] == [*ATTENTION, *FEED_FORWARD]
    torch.testing.assert_close(scope["merged"].state_dict(), model.state_dict())
