"""The model card: what a release is, how to use it, how it was made and measured, and what it may be used for."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..assets import EMBEDDED
from ..config.schema import default_of
from ..metrics.curves import METRIC_NAMES
from ..metrics.score_record import Score
from ..models import FREQ_SHIFT, STOCK_FREQ_SHIFT
from ..reports.strategy_plot import area_shares, mean_weight
from ..reports.strategy_report import own_name
from ..settings import SPEED_KEYS
from ..training.config import TrainConfig
from ..training.ema import fitted_decay
from ..training.parts import make_scheduler
from ..variance import LEARNED_RANGE
from .facts import Facts
from .licences import Licences

SAMPLES_FILE, CURVE_FILE, ERRORS_FILE = "samples.png", "training_curve.png", "error_by_timestep.png"
PICTURES = {
    SAMPLES_FILE: "Generated images",
    CURVE_FILE: "Losses and scores by optimizer step",
    ERRORS_FILE: "Unweighted MSE by timestep",
}
"""What a card may show, by the names of the files beside it."""

TASK = "unconditional-image-generation"
"""The Hub's task that comes closest: it lists none for classes."""

HUB_DATASETS = {EMBEDDED: "zalando-datasets/fashion_mnist"}
"""Ids of embedded data on the Hub."""

EFFECTIVE = ("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile", "compile_backend")
"""Options that may differ in a resumed run, but are a part of the recipe."""

TAGS = ("diffusers", "diffusers-training", "dit", "speed-diffusers")

PRECISIONS = {"bf16": "bf16, with float32 weights", "no": "float32"}

CITATION = """@article{wang2024closer,
  title={A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training},
  author={Wang, Kai and Shi, Mingjia and Zhou, Yukun and Li, Zekai and Yuan, Zhihang and Shang, Yuzhang and Peng, Xiaojiang and Zhang, Hanwang and You, Yang},
  journal={arXiv preprint arXiv:2405.17403},
  year={2024}
}

@inproceedings{peebles2023scalable,
  title={Scalable Diffusion Models with Transformers},
  author={Peebles, William and Xie, Saining},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2023}
}"""  # noqa: E501


def model_card(
    facts: Facts,
    repo_id: str,
    licences: Licences,
    *,
    branch: str = "main",
    pictures: Mapping[str, str],
    has_half: bool,
) -> ModelCard:
    """The card of a release.

    Args:
        facts: What is known of the model.
        repo_id: Its name on the Hub.
        licences: What the one who releases says of them.
        branch: Where it lies there.
        pictures: File names of those that lie beside the card, each with its caption.
        has_half: Whether the weights in half precision lie beside the others.
    """
    sections = [
        _introduction(facts, repo_id, pictures),
        _use(facts, repo_id, branch, has_half),
        _training(facts, pictures),
        _scores(facts.scores),
        _limits(facts, has_half),
        _licences(facts, licences),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{card_data(facts, repo_id, licences).to_yaml()}\n---\n\n{text}\n")


def card_data(facts: Facts, repo_id: str, licences: Licences) -> ModelCardData:
    """The metadata of the card: what the Hub finds and filters models by, and the scores with their protocols."""
    dataset = _dataset(facts)
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Class-conditional image generation" if facts.class_names else "Image generation",
            dataset_type=dataset or "local",
            dataset_name=_dataset_words(facts),
            metric_type=name,
            metric_name=_metric_words(name),
            metric_value=float(f"{value:.6g}"),
            metric_config=score.protocol.in_words(),
            metric_args={"protocol": score.protocol.short_hash()},
        )
        for score in facts.scores
        for name, value in score.values.items()
        if value is not None
    ]
    return ModelCardData(
        license=licences.of_weights(facts.record.base_model),
        library_name="diffusers",
        pipeline_tag=TASK,
        base_model=facts.record.base_model,
        datasets=[dataset] if dataset else None,
        tags=[*TAGS, *["class-conditional"] * bool(facts.class_names)],
        model_name=_title(repo_id),
        eval_results=results or None,
        # Once each, whole; the results name them by their hashes.
        protocols={score.protocol.short_hash(): _plain(dataclasses.asdict(score.protocol)) for score in facts.scores}
        or None,
    )


def _introduction(facts: Facts, repo_id: str, pictures: Mapping[str, str]) -> str:
    kind = "class-conditional " if facts.class_names else ""
    model = facts.config.get("model") if facts.config.get("pretrained_model_name_or_path") is None else None
    side = facts.resolution
    sentence = (
        f"A {kind}Diffusion Transformer{f' ({model})' if model else ''} of {_parameters(facts)}, for images of "
        f"{side}x{side} pixels{f' in {len(facts.class_names):,} classes' if facts.class_names else ''}"
    )
    config = facts.train_config()
    if config is not None and facts.config:
        with_speed = (
            "trained with [SpeeD](https://arxiv.org/abs/2405.17403)"
            if own_name(make_scheduler(config)) != "uniform"
            else "trained with uniformly drawn timesteps, without SpeeD"
        )
        steps = f" for {facts.step:,} steps" if facts.step else ""
        if facts.step and facts.max_train_steps and facts.step < facts.max_train_steps:
            steps += f" of the {facts.max_train_steps:,} that its training is to have"
        sentence += f", {with_speed} by `speed_diffusers`{steps}"
        if facts.record.base_model:
            sentence += f", from [{facts.record.base_model}](https://huggingface.co/{facts.record.base_model})"
        sentence += ". The weights are the exponential moving average (EMA) of the training"
    return "\n\n".join([f"# {_title(repo_id)}", f"{sentence}.", _picture(SAMPLES_FILE, pictures)]).rstrip()


def _why_not_stock(facts: Facts, guidance: float) -> str | None:
    """What diffusers' own pipeline cannot do with the model; None where it does all."""
    if facts.is_flow:
        return "The model was trained for flow matching, from which diffusers' own `DiTPipeline` does not sample"
    if facts.pipeline.transformer.config.get(FREQ_SHIFT, STOCK_FREQ_SHIFT) != STOCK_FREQ_SHIFT:
        return (
            "The model was trained with timestep frequencies of DiT's own code (`freq_shift` in its config), which "
            "diffusers' own `DiTPipeline` does not follow"
        )
    if guidance > 1 and not facts.is_guided_by_stock:
        return (
            "The row of its label table that means no class is not where the stock pipeline looks for it, so that "
            "diffusers' own `DiTPipeline` cannot guide it"
        )
    return None


def _use(facts: Facts, repo_id: str, branch: str, has_half: bool) -> str:
    on_main = branch == "main"
    name = json.dumps(repo_id) + ("" if on_main else f", revision={json.dumps(branch)}")
    steps, guidance = facts.config.get("num_inference_steps", 50), float(facts.config.get("guidance_scale", 1.5))
    names = json.dumps(_unmistakable(facts.class_names), ensure_ascii=False) if facts.class_names else ""
    if facts.config.get("class_dropout_prob") == 0 or not facts.class_names:
        guidance = 1.0
    options = f"guidance_scale={guidance:g}, num_inference_steps={steps}"
    if why := _why_not_stock(facts, guidance):
        labels = f"{names}, " if names not in ("", "[]") else "num_images=4, "
        return (
            f"## Use\n\n{why}. The one of `speed_diffusers` does:\n\n```python\n"
            "from speed_diffusers.generation import load_pipeline\n\n"
            f"pipeline = load_pipeline({name})\nimages = pipeline({labels}{options}).images\n```"
        )
    if names not in ("", "[]"):
        labels = f"pipeline.get_label_ids({names})"
    else:
        labels = "[0, 1, 2, 3]" if facts.class_names else f"[{facts.pipeline.null_class_id}] * 4"
    lines = [
        "## Use",
        "```python\nfrom diffusers import DiTPipeline\n\n"
        f"pipeline = DiTPipeline.from_pretrained({name})\n"
        f"class_labels = {labels}\nimages = pipeline(class_labels, {options}).images\n```",
    ]
    if has_half:
        lines.append(
            "Half precision, on a GPU (older versions of diffusers call `dtype` `torch_dtype`):\n\n```python\n"
            "import torch\nfrom diffusers import DiTPipeline\n\n"
            f'pipeline = DiTPipeline.from_pretrained({name}, variant="fp16", dtype=torch.float16).to("cuda")\n```'
        )
    if not facts.class_names and (rows := facts.pipeline.transformer.config.num_embeds_ada_norm) > 1:
        lines.append(
            "If it was trained with classes, their names are not known: `class_labels` are rows of its label table, 0 "
            f"to {rows}, of which {facts.pipeline.null_class_id} is no class."
        )
    variance = "a learned variance, " if facts.predicts_variance else ""
    lines.append(
        f"`speed_diffusers.generation.load_pipeline({name})` opens it with {variance}more samplers, guidance in "
        "an interval and one seed per image. To fine-tune it, give its name to `train_dit_speed.py` as "
        f"`pretrained_model_name_or_path={repo_id}{'' if on_main else f' revision={branch}'}`. `speed_training.json` "
        "holds its training's options."
    )
    return "\n\n".join(lines)


def _training(facts: Facts, pictures: Mapping[str, str]) -> str:
    config = facts.train_config() if facts.config else None
    if config is None:
        return ""
    record = facts.record
    batch = record.global_batch
    seen = record.images_seen
    epochs = f", {seen / record.num_images:.1f} epochs" if seen and record.num_images else ""
    learned = ", learned variance" if config.variance_type == LEARNED_RANGE else ""
    schedule = (
        f"rectified flow, shift {config.flow_shift:g}"
        if facts.is_flow
        else f"{config.beta_schedule}, {config.num_train_timesteps:,} timesteps"
        + ", zero terminal SNR" * config.rescale_betas_zero_snr
    )
    decay = config.ema_decay if config.ema_decay is not None else fitted_decay(config.max_train_steps)
    prepared = "centre crop" if config.center_crop else "squeezed into a square"
    rows = {
        "images": ", ".join(filter(None, [_dataset_words(facts), record.images])),
        "preparation": f"{config.resolution}x{config.resolution}, {prepared}"
        + (", half of them flipped" if config.random_flip else ", not flipped"),
        "autoencoder": _vae_words(facts),
        "prediction": f"{config.prediction_type}{learned}",
        "noise schedule": schedule,
        "steps": f"{facts.step or config.max_train_steps:,}"
        + (f" of {batch:,} images" if batch else "")
        + (f" ({seen:,} images{epochs})" if seen else ""),
        "optimizer": _optimizer(config),
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler}, {config.lr_warmup_steps:,} warm-up steps",
        "EMA decay": f"{decay:.6g}",
        "label dropout": f"{config.class_dropout_prob:g}",
        "precision": PRECISIONS.get(
            str(record.mixed_precision or config.mixed_precision), "as accelerate was configured"
        ),
        "seed": str(config.seed),
        "hardware": record.hardware or "not recorded",
        "time": f"{record.seconds / 3600:.3g} hours in training steps" if record.seconds else "not recorded",
    }
    sections = [
        f"## Training\n\n{_table(('', ''), rows.items())}",
        _speed(config),
        f"The command, without what only watches it:\n\n```bash\n{recipe(facts, config)}\n```",
        _picture(CURVE_FILE, pictures),
        _picture(ERRORS_FILE, pictures),
    ]
    return "\n\n".join(section for section in sections if section)


def recipe(facts: Facts, config: TrainConfig) -> str:
    """The command line that trains such a model again."""
    words = []
    for option in fields(TrainConfig):
        value = getattr(config, option.name)
        if value != default_of(option) and (not option.metadata["free"] or option.name in EFFECTIVE):
            words.append(f"{option.name}={_option_text(value)}")
    if facts.record.dataset is None and config.dataset_name is None:
        words.insert(0, "train_data_dir=path/to/images")
    lines = ["accelerate launch train_scripts/train_dit_speed.py config=None", *map(shlex.quote, words)]
    return " \\\n    ".join(lines)


def _speed(config: TrainConfig) -> str:
    """SpeeD's settings, and what follows from them on the run's noise schedule."""
    scheduler = make_scheduler(config)
    tables, areas = scheduler.speed_tables, scheduler.speed_areas
    shares = area_shares(tables, areas)
    about = {
        "acceleration": "to where the noise level grows fastest",
        "deceleration": "from there to tau",
        "convergence": "the noise level has settled",
    }
    rows = []
    for name, area in vars(areas).items():
        timesteps = f"{area.start} to {area.stop - 1}" if len(area) else "none"
        weight = f"{float(tables.weights[area.start : area.stop].mean()):.3f}" if len(area) else "-"
        rows.append((name, timesteps, f"{shares[name]:.1%}", weight, about.get(name, "")))
    options = {f"`{key}`": f"`{_option_text(getattr(config, key))}`" for key in SPEED_KEYS}
    at = " at the beginning of the training" if scheduler.speed_is_loss_aware else ""
    return "\n\n".join(
        [
            f"### SpeeD\n\nStrategy `{own_name(scheduler)}`, tau = {scheduler.speed_areas.convergence.start} of "
            f"{config.num_train_timesteps:,} timesteps, mean weight {mean_weight(tables):.3f}{at}.",
            _table(("area", "timesteps", "share of the draws", "mean weight", ""), rows),
            _table(("option", "value"), options.items()),
        ]
    )


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    parts = ["## Scores"]
    for score in scores:
        known = {name: value for name, value in score.values.items() if value is not None}
        rows = [(_metric_words(name), f"{value:.4g}") for name, value in known.items()]
        where = score.environment
        parts.append(
            f"{_table(('number', 'value'), rows)}\n\nProtocol: {score.protocol.in_words()}. Measured with torch "
            f"{where.torch} and diffusers {where.diffusers} on {where.device}."
        )
    parts.append(
        "Numbers compare under equal protocols only; the whole protocol is in this card's metadata. A Fréchet "
        "distance is an FID only over Inception's features and against the reference of whom one compares with."
    )
    return "\n\n".join(parts)


def _metric_words(name: str) -> str:
    """What a number is called, and whether more of it is better."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


def _limits(facts: Facts, has_half: bool) -> str:
    side = facts.resolution
    lines = [
        f"It makes square images of {side}x{side} pixels of what it was trained on, and nothing else"
        + (": its classes are fixed." if facts.class_names else "."),
        "What the images show, and whom they leave out, follows the training images; nobody has looked for biases or "
        "for images learned by heart.",
    ]
    if facts.predicts_variance and not facts.is_flow:
        lines.append("The stock pipeline does not use the variance that the model predicts; `load_pipeline`'s does.")
    if facts.class_names and facts.config.get("class_dropout_prob") == 0:
        lines.append("It was never trained without its classes, so guidance does not work.")
    if has_half:
        lines.append('The weights of `variant="fp16"` are rounded, autoencoder included.')
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licences(facts: Facts, licences: Licences) -> str:
    lines = licences.lines(base_model=facts.record.base_model, vae=facts.record.vae, data=facts.record.dataset)
    return f"## Licences\n\n{_table(('what', 'licence'), lines.items())}"


def _picture(name: str, pictures: Mapping[str, str]) -> str:
    return f"![{PICTURES[name]}]({name})\n\n*{pictures[name]}*" if name in pictures else ""


def _title(repo_id: str) -> str:
    return repo_id.rpartition("/")[2]


def _parameters(facts: Facts) -> str:
    """Parameters as the file holds them; where training had one embedder for all blocks, without its copies too."""
    transformer = facts.pipeline.transformer
    stored = sum(parameter.numel() for parameter in transformer.parameters())
    embedder = sum(parameter.numel() for parameter in transformer.transformer_blocks[0].norm1.emb.parameters())
    if not facts.config.get("tie_embedders", False):
        return f"{_millions(stored)} parameters"
    trained = stored - embedder * (len(transformer.transformer_blocks) - 1)
    return f"{_millions(trained)} parameters ({_millions(stored)} in the file, where each block has its own embedder)"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _unmistakable(class_names: Mapping[int, str]) -> list[str]:
    """Two names, or fewer, that the stock pipeline finds the right rows by: it knows only parts between commas."""
    rows: dict[str, set[int]] = {}
    for row, name in class_names.items():
        for part in name.split(","):
            rows.setdefault(part.strip(), set()).add(row)
    found = []
    for name in class_names.values():
        own = [part.strip() for part in name.split(",") if part.strip() and len(rows[part.strip()]) == 1]
        found += own[:1]
    return [found[0], found[-1]] if len(found) > 1 else found


def _dataset(facts: Facts) -> str | None:
    """Id of the training images on the Hub; None where they are not there."""
    name = facts.record.dataset
    return HUB_DATASETS.get(name, name) if name is not None else None


def _dataset_words(facts: Facts) -> str:
    name = facts.record.dataset
    if name == EMBEDDED:
        return "Fashion-MNIST, as embedded in `speed_diffusers`"
    return name if name is not None else "images of one's own"


def _vae_words(facts: Facts) -> str:
    name, factor = facts.record.vae, 2 ** (len(facts.pipeline.vae.config.block_out_channels) - 1)
    channels = facts.pipeline.vae.config.latent_channels
    named = {EMBEDDED: "that of `speed_diffusers`", None: "one's own"}.get(
        name, f"[{name}](https://huggingface.co/{name})"
    )
    return f"{named} (`vae/` here): {channels} channels, downsampling factor {factor}"


def _optimizer(config: TrainConfig) -> str:
    adamw = f"AdamW, betas {config.adam_beta1:g} and {config.adam_beta2:g}, weight decay {config.adam_weight_decay:g}"
    clip = "" if config.max_grad_norm is None else f", gradients clipped to {config.max_grad_norm:g}"
    if config.optimizer == "muon":
        muon = f"Muon (momentum {config.muon_momentum:g}, {config.muon_ns_steps} Newton-Schulz steps)"
        return f"{muon} for the blocks' matrices, for all else {adamw}{clip}"
    return adamw + clip


def _option_text(value: object) -> str:
    """A value as the training script reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _table(head: Sequence[str], rows: Any) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that YAML has too."""
    return {
        name: _plain(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
