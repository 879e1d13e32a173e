"""Building an untrained folder: tokenizers, networks, layout; stock diffusers and weft both open it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.models.build import build, corpus_texts, main, read_config
from weft.models.tokenizers import clip_tokenizer, t5_tokenizer

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny" / "model.yaml"


def config() -> dict[str, Any]:
    """The committed recipe with a smaller corpus and transformer."""
    tree = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for source in tree["corpus"]:
        source["options"]["count"] = 150
    tree["transformer"] |= {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "caption_projection_dim": 64,
    }
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(config(), tmp_path_factory.mktemp("build") / "model")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(corpus_texts(config()["corpus"]))


def test_every_common_word_is_one_token(texts: list[str]) -> None:
    clip, t5 = clip_tokenizer(texts, length=16), t5_tokenizer(texts, length=40)
    counts: dict[str, int] = {}
    for text in texts:
        for word in text.split():
            if word.isalpha():
                counts[word] = counts.get(word, 0) + 1
    common = [word for word, n in counts.items() if n >= 3]
    assert len(common) > 80 and "checkered" in common
    for word in common:
        assert len(t5(word).input_ids) == 2, word  # and </s>
        assert len(clip(word).input_ids) == 3, word  # and start, end
    assert t5.tokenize("the Two-tone star, please") == ["▁the", "▁two-tone", "▁star", ",", "▁please"]


def test_tokenizers_lower_case_and_know_every_letter(folder: Path) -> None:
    from transformers import AutoTokenizer

    for name, length in (("tokenizer", 16), ("tokenizer_2", 16), ("tokenizer_3", 40)):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.model_max_length == length
        assert tokenizer("Make the STAR Red").input_ids == tokenizer("make the star red").input_ids
        ids = tokenizer("Zyx-quiz 98%").input_ids
        assert tokenizer.unk_token_id not in ids[1:-1]
        padded = tokenizer("red", padding="max_length", max_length=length).input_ids
        assert len(padded) == length
    assert AutoTokenizer.from_pretrained(folder / "tokenizer_3").decode(ids, skip_special_tokens=True) == "zyx-quiz 98%"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_t5_spells_any_ascii(folder: Path, text: str) -> None:
    from transformers import T5TokenizerFast

    global _T5
    if _T5 is None:
        _T5 = T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    decoded = _T5.decode(_T5(text).input_ids, skip_special_tokens=True)
    for special in ("</s>", "<pad>", "<unk>"):
        if special in text:
            return
    assert "".join(decoded.split()) == "".join(text.lower().split())


_T5: Any = None


def test_the_folder_opens_in_diffusers_and_in_weft(folder: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    from weft.models.load import load

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red star", height=64, width=64, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=40
    ).images[0]
    assert image.size == (64, 64)
    assert pipe.scheduler.config.shift == 3.0
    model = load(str(folder))
    (state,) = model.encode_text(["a red star"])
    assert state["text"].shape == (16 + 40, 128) and state["pooled"].shape == (128,)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline" and index["text_encoder_3"][1] == "T5EncoderModel"


def test_the_transformer_starts_as_zero_velocity(folder: Path) -> None:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        out = model(
            torch.randn(1, 16, 8, 8), torch.randn(1, 56, 128), torch.randn(1, 128), torch.tensor([500.0])
        ).sample
        assert torch.equal(out, torch.zeros_like(out))
        linear = [n for n, m in model.named_modules() if n.endswith("norm1.linear")]
        assert linear and all(not model.get_submodule(n).weight.any() for n in linear)
        assert model.transformer_blocks[0].attn.to_q.weight.std() > 0.01


def test_t5_heads_start_with_a_sense_of_place(folder: Path) -> None:
    """The order of words changes the states from the start, most of all those of neighbours."""
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder / "text_encoder_3")
    bias = model.encoder.block[0].layer[0].SelfAttention
    table = bias.compute_bias(9, 9)[0]  # [heads, query, key]
    inner = torch.arange(1, 8)
    assert (table[0, inner].argmax(-1) == inner - 1).all() and (table[1, inner].argmax(-1) == inner + 1).all()
    assert (table[2, inner].argmax(-1) == inner).all() and not table[3].any()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_3")
    with torch.no_grad():
        a, b = (
            model(tokenizer([text], return_tensors="pt").input_ids).last_hidden_state[0]
            for text in ("paint the yellow triangle black", "paint the black triangle yellow")
        )
    assert (a[2] - b[4]).norm() > 0.2 * a[2].norm(), "the same word at another place"


def test_weights_are_a_function_of_the_seed(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    again = build(config(), tmp_path / "again")
    other = build(config() | {"seed": 1}, tmp_path / "other")
    name = "text_encoder_3/model.safetensors"
    assert (folder / name).read_bytes() == (again / name).read_bytes() != (other / name).read_bytes()
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == (again / "tokenizer/tokenizer.json").read_bytes()


def test_trained_parts_replace_built_ones(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "export" / "vae")
    whole = build(config(), tmp_path / "whole", [tmp_path / "export"])
    assert json.loads((whole / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    with pytest.raises(WeftError, match="holds no part"):
        build(config(), tmp_path / "none", [tmp_path])
    with pytest.raises(WeftError, match="exists"):
        build(config(), whole)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    wrong = config()
    wrong["transformer"]["pooled_projection_dim"] = 96
    with pytest.raises(WeftError, match="is 128, but 96 is needed"):
        build(wrong, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(WeftError, match="unknown section 'unet'"):
        read_config(config() | {"unet": {}})
    with pytest.raises(WeftError, match="come together"):
        read_config({k: v for k, v in config().items() if k != "tokenizer_3"})
    with pytest.raises(WeftError, match="'vae' is missing"):
        read_config({k: v for k, v in config().items() if k != "vae"})
    with pytest.raises(WeftError, match="no word"):
        t5_tokenizer(["a b"], length=8)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml"), str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "weft.models.build", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--from" in done.stdout
