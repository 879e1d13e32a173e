"""Make metaquery.safetensors by running the public UniPic2-MetaQuery code on the weights of tests/tiny_metaquery.py.

    python tests/golden/make_metaquery.py PATH_TO_CHECKOUT_OF_SkyworkAI_UniPic COMMIT

Values in the repository: SkyworkAI/UniPic at 9e2a6091d7ba81b1a3ff6349afe1f7feb34b37f5, torch 2.13.0 (CPU),
diffusers 0.42.1, transformers 5.23.0. The conditioner (eager attention) and the pipeline are the public ones, driven
as UniPic-2/scripts/unipic2_mq_t2i.py and unipic2_mq_editing.py drive them. Three things are not theirs: transformers'
processor needs torchvision, so its tokenizer and Pillow image processor are called one by one; the position ids that
transformers 4.55, which the release pins, gives inputs without token ids are written out, because later versions
leave padding in the count; and the VAE encodes to the posterior's mode.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden.make_unipic2 import _import_upstream, noise, picture  # noqa: E402
from tiny_metaquery import tiny_metaquery_folder  # noqa: E402

STEPS, GUIDANCE = 8, 3.5
PROMPT, NEGATIVE = "make the red star blue and big", "blur low quality"
JOBS = {"generate": (64, 96, False), "edit": (64, 64, True), "edit_wide": (64, 96, True), "edit_tall": (128, 64, True)}
"""Height, width, with a picture."""


def main(checkout: str, commit: str) -> None:
    import diffusers
    import transformers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    transformer_class, pipeline_class = _import_upstream(checkout)
    from unipicv2.stable_diffusion_3_conditioner import StableDiffusion3Conditioner

    torch.set_num_threads(1)
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    out: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as draft, torch.no_grad():
        folder, vlm = tiny_metaquery_folder(draft)
        eager = Path(draft) / "eager"
        shutil.copytree(folder / "conditioner", eager)
        config = json.loads((eager / "config.json").read_text())
        config["connector_config"]["_attn_implementation"] = "eager"
        (eager / "config.json").write_text(json.dumps(config))
        conditioner = StableDiffusion3Conditioner.from_pretrained(eager)
        lmm = Qwen2_5_VLForConditionalGeneration.from_pretrained(vlm)
        tokenizer = AutoTokenizer.from_pretrained(vlm)
        images = AutoImageProcessor.from_pretrained(vlm, backend="pil")
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "{% if loop.first and m['role'] != 'system' %}"
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}",
            "",
        )
        pipeline = pipeline_class(
            transformer=transformer_class.from_pretrained(folder / "transformer"),  # type: ignore[attr-defined]
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None,
            tokenizer_3=None,
        )  # fmt: skip
        count = conditioner.config.num_queries
        for name, (height, width, edits) in JOBS.items():
            image = picture(height, width)
            texts = []
            for text in (PROMPT, NEGATIVE):
                content = [{"type": "text", "text": text if edits else f"Generate an image: {text}"}]
                turn = {"role": "user", "content": [{"type": "image"}, *content] if edits else content}
                texts.append(tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
            seen = {}
            if edits:
                area = int(height * 28 / 32 * width * 28 / 32)
                seen = images(
                    images=[image, image], size={"shortest_edge": area, "longest_edge": area}, return_tensors="pt"
                )
                tokens = int(seen["image_grid_thw"][0].prod()) // 4
                texts = [text.replace("<|image_pad|>", "<|image_pad|>" * tokens) for text in texts]
            inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
            ids = torch.cat([inputs.input_ids, inputs.input_ids.new_zeros(2, count)], dim=1)
            mask = torch.cat([inputs.attention_mask, inputs.attention_mask.new_ones(2, count)], dim=1)
            embeds = lmm.get_input_embeddings()(ids)
            embeds[:, -count:] = conditioner.meta_queries[None].expand(2, -1, -1)
            if edits:
                visual = lmm.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
                embeds[ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = visual
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            states = lmm.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions.expand(3, -1, -1), use_cache=False
            ).last_hidden_state[:, -count:]
            text, pooled = conditioner(states)
            latents = pipeline(
                prompt_embeds=text[:1], pooled_prompt_embeds=pooled[:1], negative_prompt_embeds=text[1:],
                negative_pooled_prompt_embeds=pooled[1:], height=height, width=width, num_inference_steps=STEPS,
                guidance_scale=GUIDANCE, latents=noise(f"latents/{name}", 1, 16, height // 8, width // 8),
                output_type="latent", return_dict=False, **({"image": image} if edits else {}),
            )[0]  # fmt: skip
            out |= {
                f"{name}/states": states,
                f"{name}/text": text,
                f"{name}/pooled": pooled,
                f"{name}/latents": latents,
            }
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    target = Path(__file__).with_name("metaquery.safetensors")
    save_file(
        {name: tensor.contiguous() for name, tensor in out.items()},
        target,
        metadata={"source": f"https://github.com/SkyworkAI/UniPic {commit} UniPic-2/unipicv2", **versions},
    )
    print(target, {name: (tuple(tensor.shape), float(tensor.std())) for name, tensor in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
