"""Scorers: parity with the public reward code, OpenCLIP conversion, consistency, missing instead of invented."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from tiny import fill_
from weft.errors import WeftError
from weft.record import make_record
from weft.reward.scorers import clip
from weft.reward.scorers.consistency import Consistency, ExecutionConsistency, psnr_where, ssim_map
from weft.reward.scorers.geneval import COLOURS, ClipColours, Found, GenEval, relations
from weft.reward.scorers.ocr import TextScore, edit_distance, text_score
from weft.types import Score

torch.set_num_threads(1)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "reward_scorers.json").read_text("utf-8"))
GREY = Image.new("RGB", (32, 32), (90, 90, 90))


def noise(seed: int, size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def test_geneval_is_the_public_reward() -> None:
    for row in GOLDEN["geneval"]:
        colours = {tuple(box): colour for _, box, colour in row["things"]}
        things = [Found(name, 0.95, tuple(box)) for name, box, _ in row["things"]]
        record = make_record("x", meta={"include": row["include"], "tag": "two_object"})

        def scored(parity: bool, things: Any = things, colours: Any = colours, record: Any = record) -> Score:
            tell = lambda image, found: [colours[thing.box] for thing in found]  # noqa: E731
            return GenEval(lambda images: [things], tell, parity=parity)([(record, GREY)])[0]

        public, ours = scored(True), scored(False)
        assert public.value == pytest.approx(row["dense"], abs=1e-9)
        assert public.parts["strict"] == ours.parts["strict"] == float(row["strict"])
        assert public.parts["accuracy"] == ours.parts["accuracy"] == float(row["accuracy"])
        assert ours.value is not None and ours.value <= row["dense"] + 1e-9


def test_geneval_accuracy_is_not_the_strict_one() -> None:
    boxes = [(0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9)]
    dogs = [Found("dog", 0.9 - 0.1 * k, box) for k, box in enumerate(boxes)]
    asked: list[tuple[int, str]] = []

    def colours(image: Any, things: Any) -> list[str]:
        asked.append((len(things), things[0].name))
        return ["red", "red", "blue"][: len(things)]

    def parts(row: list[dict[str, Any]], exclude: Any = None, **options: Any) -> Any:
        meta = {"include": row, "tag": "x"} | ({"exclude": exclude} if exclude else {})
        return GenEval(lambda images: [dogs], colours, **options)([(make_record("x", meta=meta), GREY)])[0]

    two = {"class": "dog", "count": 2}
    assert parts([two]).parts == {"dense": 0.5, "strict": 0.0, "accuracy": 1.0}, "a third dog does no harm"
    assert parts([two], mode="accuracy").value == 1
    assert parts([two], [{"class": "dog", "count": 3}]).parts["accuracy"] == 0
    assert parts([two], [{"class": "dog", "count": 4}, {"class": "cat", "count": 1}]).parts["accuracy"] == 1
    assert parts([two | {"color": "red"}]).parts["accuracy"] == 1, "the two most confident"
    assert parts([two | {"color": "blue"}]).parts["accuracy"] == 0
    three = {"class": "dog", "count": 3, "color": "red"}
    asked.clear()
    assert parts([three]).parts == {"dense": pytest.approx(5 / 6), "strict": 0.0, "accuracy": 0.0}
    assert asked == [(3, "dog")], "colours are told once"
    assert parts([two], [{"class": "dog"}]).value is None, "an exclude that is no clause"
    with pytest.raises(WeftError, match="dense, strict or accuracy"):
        GenEval(lambda images: [dogs], mode="right")  # type: ignore[arg-type]


def test_geneval_confidence_and_missing(tmp_path: Path) -> None:
    things = [Found("dog", 0.5, (0, 0, 9, 9)), Found("dog", 0.95, (20, 0, 29, 9)), Found("cat", 0.2, (0, 0, 5, 5))]
    scorer = GenEval(lambda images: [things] * len(images), mode="strict")
    row = [{"class": "dog", "count": 1}]
    metas: list[dict[str, Any]] = [
        {"include": row, "tag": "counting"},
        {"include": row, "tag": "single_object"},
        {},
        {"include": [{"class": "dog"}]},
        {"include": [{"class": "dog", "count": 1, "color": "red"}]},
    ]
    scores = scorer([(make_record("x", meta=meta), GREY) for meta in metas])
    assert [score.value for score in scores] == [1.0, 0.0, None, None, None]
    assert all(score.reason for score in scores[2:])
    assert relations(things[0], things[1]) == {"left of"} and relations(things[0], things[0]) == set()
    with pytest.raises(WeftError, match="no detector can be read"):
        GenEval(str(tmp_path))


def tiny_detector(folder: Path, names: dict[int, str]) -> None:
    """A detector's folder of one layer, which finds two things of class 0 with certainty, whatever it sees."""
    from transformers import YolosConfig, YolosForObjectDetection
    from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = YolosConfig(**sizes, image_size=[32, 32], patch_size=16, num_detection_tokens=2, id2label=names)
    model = YolosForObjectDetection(config)
    last = model.class_labels_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        last.bias[0] = 9.0
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)


def test_a_detectors_classes_have_the_names_of_geneval(tmp_path: Path) -> None:
    """COCO says mouse, GenEval's rows say computer mouse; what a detector cannot find is missing, not absent."""
    tiny_detector(tmp_path, {0: "mouse", 1: "dog"})
    scorer = GenEval(str(tmp_path))
    metas = [{"include": [{"class": name, "count": 2}]} for name in ("computer mouse", "dog", "unicorn")]
    found, absent, unknown = scorer([(make_record("x", meta=meta), GREY) for meta in metas])
    assert found.value == 1.0 and absent.value == 0.0
    assert unknown.value is None and "unicorn" in str(unknown.reason)
    wrong = [{"include": [{"count": 2}]}, {"include": [7]}, {"include": "dog"}]
    assert [score.value for score in scorer([(make_record("x", meta=meta), GREY) for meta in wrong])] == [None] * 3


def test_colours_are_told_by_clip_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_clip(tmp_path)
    tell = GenEval(lambda images: [[]], str(tmp_path)).colours
    assert isinstance(tell, ClipColours)
    things = [
        Found("cup", 0.9, (-2.0, 0.2, 16.4, 32.0)),
        Found("bus", 0.9, (20, 20, 20, 20)),
        Found("cup", 0.9, (8, 8, 99, 31)),
    ]
    found = tell(noise(1), things)
    clf = tell.clip
    for thing, box, colour in zip(things, [(0, 0, 16, 32), (20, 20, 21, 21), (8, 8, 32, 31)], found, strict=True):
        logits = []
        for name in COLOURS:
            said = [f"a photo of a {name} {thing.name}", f"a photo of a {name}-colored {thing.name}"]
            words, seen = clf.embed([*said, f"a photo of a {name} object"], [noise(1).crop(box)])
            logits.append(float(torch.nn.functional.normalize(words.mean(0), dim=0) @ seen[0]))
        assert COLOURS[int(np.argmax(logits))] == colour
    row = {"include": [{"class": "cup", "count": 2, "color": found[0]}]}
    scorer = GenEval(lambda images: [things], str(tmp_path))
    assert scorer([(make_record("x", meta=row), noise(1))])[0].parts["dense"] >= 0.75


def test_functions_may_be_named_where_a_recipe_cannot_hold_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "def read(image): return 'OPEN'\n"
        "def none(image): return None\n"
        "def detect(images): return [[] for _ in images]\n"
        "def colours(image, things): return []\n"
        "def mask(record): return np.eye(32) > 0\n"
    )
    sign = [(make_record('a sign "open"', GREY), GREY)]
    assert TextScore(f"{file}:read")(sign)[0].value == 1.0
    assert "NoneType instead of a text" in str(TextScore(f"{file}:none")(sign)[0].reason)
    assert Consistency(mask=f"{file}:mask")(sign)[0].value == 1.0
    row = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    scorer = GenEval(f"{file}:detect", f"{file}:colours")
    assert scorer([(make_record("x", meta=row), GREY)])[0].value == 0.0
    with pytest.raises(WeftError, match="no function"):
        TextScore(f"{file}:reed")


def test_text_scores_are_the_public_ones() -> None:
    for wanted, found, expected in GOLDEN["ocr"]:
        assert text_score(found, wanted) == pytest.approx(expected, abs=1e-12)
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "ab") == 2


def test_an_ocr_that_fails_is_missing() -> None:
    def read(image: Image.Image) -> str:
        if image.width == 16:
            raise RuntimeError("no paddle")
        return "open"

    batch = [
        (make_record('a sign "OPEN"'), GREY),
        (make_record('a sign "OPEN"'), noise(0, 16)),
        (make_record("a sign"), GREY),
        (make_record("a sign", meta={"text": "oven"}), GREY),
    ]
    scores = TextScore(read)(batch)
    assert [score.value for score in scores] == [1.0, None, None, 0.75]
    assert "no paddle" in str(scores[1].reason)


def test_consistency_measures_outside_the_mask_only() -> None:
    mask = np.zeros((32, 32), bool)
    mask[:16] = True
    source = noise(0)
    inside, outside = (np.asarray(source).copy() for _ in range(2))
    inside[:8] = 0
    outside[24:] = 0
    record = make_record("x", source, mask=Image.fromarray(mask.astype(np.uint8) * 255))
    kept, lost = Consistency()([(record, Image.fromarray(inside)), (record, Image.fromarray(outside))])
    assert kept.value is not None and kept.value > 0.99 and kept.parts["psnr"] == 100
    assert lost.value is not None and lost.value < 0.8 and lost.parts["ssim"] < 0.8
    by_function = Consistency(mask=lambda record: mask)
    assert by_function([(make_record("x", source), Image.fromarray(inside))])[0].value == pytest.approx(kept.value)
    larger = Image.fromarray(inside).resize((64, 64), Image.Resampling.NEAREST)
    assert Consistency()([(record, larger)])[0].value is not None
    everything = make_record("x", source, mask=Image.new("L", (32, 32), 255))
    missing = Consistency()([(make_record("x"), GREY), (make_record("x", GREY), GREY), (everything, GREY)])
    assert [score.value for score in missing] == [None] * 3 and all(score.reason for score in missing)


def test_ssim_is_that_of_scikit_image() -> None:
    a, b = (np.asarray(noise(k, 48), np.float64) / 255 for k in range(2))
    b = 0.7 * a + 0.3 * b
    _, expected = structural_similarity(
        a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert np.abs(ssim_map(a, b) - expected.mean(-1)).max() < 1e-9
    where = np.ones((48, 48), bool)
    assert psnr_where(a, b, where) == pytest.approx(-10 * np.log10(((a - b) ** 2).mean()))
    assert psnr_where(a, a, where) == 100


def test_execution_times_consistency() -> None:
    def fixed(*values: float | None) -> Any:
        return lambda batch: [Score(v, reason=None if v is not None else "down") for v in values]

    product = ExecutionConsistency(fixed(0.8, 0.0, 0.8, None), fixed(0.5, 1.0, None, 1.0), floor=0.6)
    scores = product([(make_record("x"), GREY)] * 4)
    assert [score.value for score in scores] == [pytest.approx(0.64), 0.0, None, None]
    assert scores[2].reason == "consistency: down" and scores[3].reason == "execution: down"


# -- CLIP --


def tiny_clip(folder: Path) -> Any:
    """A CLIP folder: two layers, 32-pixel pictures, and a tokenizer of the corpus."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from weft.models.tokenizers import clip_tokenizer

    tokenizer = clip_tokenizer(["a red star on a blue ring"] * 5, length=16)
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"hidden_act": "gelu", "projection_dim": 24}
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": 2, "pad_token_id": len(tokenizer) - 1}
    config = CLIPConfig(
        text_config=common | {"vocab_size": len(tokenizer), "max_position_embeddings": 16} | ends,
        vision_config=common | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = fill_(CLIPModel(config), "clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def to_open_clip(model: Any) -> dict[str, torch.Tensor]:
    """The inverse of the conversion, written the other way round."""
    out: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    back = {v: k for k, v in clip._WHOLE.items()}
    for name, value in state.items():
        if name in back:
            out[back[name]] = value.T.contiguous() if name.endswith("projection.weight") else value
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            here, there = f"{tower}.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                qkv = [state[f"{here}self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{there}attn.in_proj_{kind}"] = torch.cat(qkv)
                for theirs, ours in clip._INNER.items():
                    out[f"{there}{theirs}.{kind}"] = state[f"{here}{ours}.{kind}"]
    return out


def test_clip_scores_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_clip(tmp_path)
    pictures, texts = [noise(k) for k in range(3)], ["a red star", "a blue ring", "a star on a ring"]
    batch = [(make_record(text), picture) for text, picture in zip(texts, pictures, strict=True)]
    scorer = clip.CLIPScore(str(tmp_path), batch_size=2)
    words = scorer.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    pixels = scorer.images(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(**words, pixel_values=pixels).logits_per_image.diagonal()
    assert [s.value for s in scorer(batch)] == pytest.approx((logits / 100).tolist(), abs=1e-6)
    assert [s.value for s in clip.PickScore(str(tmp_path))(batch)] == pytest.approx((logits / 26).tolist(), abs=1e-5)
    with pytest.raises(WeftError, match="no CLIP model can be read"):
        clip.CLIPScore(str(tmp_path / "nowhere"))


def test_hps_weights_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    model = tiny_clip(tmp_path)
    state = to_open_clip(model)
    state = {k: v.half().float() for k, v in state.items()}
    model.load_state_dict(clip.open_clip_to_transformers(state))
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "hps.safetensors")  # as the released file has them
    config = clip.clip_config(state, head=8)
    read_config = clip.clip_config
    monkeypatch.setattr(clip, "clip_config", lambda state: config)
    scorer = clip.HPSv2(str(tmp_path / "hps.safetensors"), str(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(scorer.network.state_dict()[name], value), name
    batch = [(make_record("a red star"), noise(0))]
    model.save_pretrained(tmp_path)
    cosine = clip.CLIPScore(str(tmp_path))(batch)[0].value * 100 / float(model.logit_scale.detach().exp())  # type: ignore[operator]
    assert scorer(batch)[0].value == pytest.approx(cosine, abs=1e-5)
    wide = Image.new("RGB", (64, 48))
    wide.paste(noise(1), (32, 0))
    square = Image.new("RGB", (64, 64))
    square.paste(wide, (0, 8))
    whole, cut = scorer([(make_record("a red star"), picture) for picture in (wide, wide.crop((8, 0, 56, 48)))])
    assert whole.value == pytest.approx(scorer([(make_record("a red star"), square)])[0].value, abs=0.02)
    assert whole.value != pytest.approx(cut.value, abs=1e-4), "not the middle square alone"
    with pytest.raises(WeftError, match="unknown weight visual.extra"):
        clip.open_clip_to_transformers(state | {"visual.extra": torch.zeros(1)})
    with pytest.raises(WeftError, match="is missing"):
        read_config({})
    with pytest.raises(WeftError, match="not a safetensors file; convert .* weft.models.foreign"):
        clip.HPSv2("HPS_v2.1.pt", str(tmp_path))


@pytest.mark.parametrize(("size", "resized"), [((100, 90), (32, 29)), ((48, 97), (16, 32)), ((32, 32), (32, 32))])
def test_hps_sees_a_picture_as_its_public_transform(size: tuple[int, int], resized: tuple[int, int]) -> None:
    """ResizeMaxSize: Pillow's floats stand for torchvision's; half of what is padded, rounded down, goes to the top."""
    scorer = object.__new__(clip.HPSv2)
    scorer.network = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=32)))
    scorer.images = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3])
    picture = noise(5).resize(size)
    values = np.zeros((3, 32, 32), np.float32)
    (width, height), left, top = resized, (32 - resized[0]) // 2, (32 - resized[1]) // 2
    for channel, band in enumerate(picture.split()):
        floats = Image.fromarray(np.asarray(band, np.float32) / 255).resize(resized, Image.Resampling.BICUBIC)
        values[channel, top : top + height, left : left + width] = np.asarray(floats)
    expected = (values - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.2, 0.25, 0.3])[:, None, None]
    assert np.abs(scorer.pixels([picture])[0].numpy() - expected).max() < 1e-5


def test_hps_has_the_geometry_of_vit_h() -> None:
    with torch.device("meta"):
        from transformers import CLIPConfig, CLIPModel

        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        shape = {"visual.conv1.weight": (1280, 3, 14, 14), "visual.positional_embedding": (257, 1280)}
        shape |= {"ln_final.weight": (1024,), "token_embedding.weight": (49408, 1024), "text_projection": (1024, 1024)}
        shape |= {"positional_embedding": (77, 1024)}
        for tower, width, layers in (("", 1024, 24), ("visual.", 1280, 32)):
            for k in range(layers):
                shape[f"{tower}transformer.resblocks.{k}.mlp.c_fc.weight"] = (4 * width, width)
        config = clip.clip_config({name: torch.empty(size) for name, size in shape.items()})
        assert {k: getattr(config.vision_config, k) for k in vision} == vision
        assert {k: getattr(config.text_config, k) for k in text} == text
        assert config.vision_config.image_size == 224 and config.vision_config.patch_size == 14
        count = sum(p.numel() for p in CLIPModel(CLIPConfig.from_dict(config.to_dict())).parameters())
    assert count == 986_109_441
