"""What a run of each family costs, before it runs: public checkpoints by known sizes, folders by their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.models.build_flux import build_flux
from weft.train import plan

ROOT = Path(__file__).parent.parent / "recipes"
FLUX, T5_XXL, CLIP_L = 11_901_408_320, 4_762_310_656, 123_060_480
QWEN_IMAGE, QWEN_VL_7B = 20_430_401_088, 8_292_166_656


@pytest.mark.slow
def test_flux_and_its_adapter():
    found = plan(ROOT / "dreamomni2" / "edit.yaml", ["plan.tflops=100"])
    assert found.parameters["transformer"] == FLUX and found.parameters["text_encoder_2"] == T5_XXL
    assert found.parameters["text_encoder"] == CLIP_L
    # data that are not here: one picture; the first format has 98 x 42 tokens
    (stage,) = found.stages
    assert stage.tokens == 2 * 98 * 42 + 512
    # each block 12 w^2 a token, four or three adapted layers of rank 256, and attention; 2 operations each
    w, n = 3072, stage.tokens
    linear = 19 * (12 * w * w + 4 * 512 * w) + 38 * (12 * w * w + 3 * 512 * w)
    by_hand = 2 * linear * n + 57 * 4 * w * n * n
    assert stage.flops == pytest.approx(by_hand, rel=0.03)
    assert found.samples == 7250 * 16 and found.forwards == 7250 * 16
    assert found.memory["frozen weights"] >= 2 * (FLUX + T5_XXL)
    assert found.trained == (19 * 8 + 38 * 3) * 512 * w


@pytest.mark.long
def test_qwen_image_edit():
    found = plan(ROOT / "edit_r1" / "qwen_sft.yaml")
    assert found.parameters["transformer"] == QWEN_IMAGE and found.parameters["text_encoder"] == QWEN_VL_7B
    assert found.stages[0].flops > 2 * QWEN_IMAGE * 0.3 * found.stages[0].tokens  # modulation aside


@pytest.mark.long
def test_metaquery_and_the_rewriter():
    queries = plan(ROOT / "unipic2" / "metaquery_a.yaml")
    assert queries.parameters["vlm"] == QWEN_VL_7B and queries.trained == queries.parameters["conditioner"]
    cached = plan(ROOT / "unipic2" / "metaquery_a.yaml", ["trainable_args.train_queries=false"])
    assert cached.trained == queries.trained - 256 * 3584
    assert cached.stages[0].flops < queries.stages[0].flops  # the VLM runs only while queries train
    later = plan(ROOT / "unipic2" / "metaquery_c.yaml")
    assert any("is not on this machine: the released sizes" in line for line in later.assumptions)
    rewriter = plan(ROOT / "dreamomni2" / "rewriter.yaml")
    assert rewriter.parameters == {"vlm": QWEN_VL_7B} and 0.9 * QWEN_VL_7B < rewriter.trained < QWEN_VL_7B
    assert rewriter.seconds > 0


def test_a_folder_says_its_own_sizes(tmp_path):
    kontext = tiny_kontext_folder(tmp_path / "kontext")
    sizes = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32,
             "axes_dims_rope": [16, 8, 8], "guidance_embeds": False}  # fmt: skip
    folder = build_flux(
        {"transformer": sizes, "resolution": 64, "tokenizer_2": {"length": 44}}, kontext, tmp_path / "f"
    )
    found = plan(ROOT / "tiny" / "omni_base.yaml", [f"model.path={folder}", "data.0.source.args.count=4"])
    assert found.parameters["transformer"] == found.trained
    pictures = found.stages[0].tokens / 16 - 1 - 44 / 16
    assert 1 < pictures < 2.5  # the mean over the tasks
    with pytest.raises(WeftError, match="not on this machine"):
        plan(ROOT / "tiny" / "omni_base.yaml")
