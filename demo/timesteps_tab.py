"""The tab of strategies: density, loss weight and areas on a noise schedule, over log SNR and over timesteps."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from speed_diffusers.errors import InputError
from speed_diffusers.presets import PRESETS
from speed_diffusers.registry import Registry
from speed_diffusers.reports.strategy_curves import strategy_curves
from speed_diffusers.reports.strategy_report import speed_values, strategy_tables
from speed_diffusers.reports.web_page import web_file
from speed_diffusers.schedulers import speed_scheduler
from speed_diffusers.settings import SPEED_DEFAULTS
from speed_diffusers.timesteps import DENSITIES, DRAWS
from speed_diffusers.weightings import WEIGHTINGS

HERE = Path(__file__).resolve().parent
FLOW = "rectified flow"
SCHEDULES = {
    "linear (DDPM, DiT)": "linear",
    "scaled linear (Stable Diffusion)": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
    "rectified flow (SD3, Flux)": FLOW,
}
MOST_TIMESTEPS = 10_000
CUSTOM = "your own"

CHART_STYLES = web_file("charts.css") + (HERE / "timesteps.css").read_text("utf-8")

CHART_SCRIPTS = f"<script>\n{web_file('charts.js')}\n{web_file('strategies.js')}</script>"

DRAW = (HERE / "timesteps.js").read_text("utf-8")


def timesteps_tab(app: gr.Blocks) -> None:
    """The tab's controls and charts.

    Args:
        app: The app that it is in, which draws it once when it opens.
    """
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            schedule = gr.Dropdown(list(SCHEDULES.items()), value="linear", label="Noise schedule", elem_id="schedule")
            with gr.Row():
                steps = gr.Number(
                    1000, label="Timesteps", precision=0, minimum=2, maximum=MOST_TIMESTEPS, min_width=120
                )
                shift = gr.Number(
                    1.0, label="Shift of the flow", minimum=0.01, maximum=100, visible=False, min_width=120
                )
                prediction = gr.Dropdown(
                    ["epsilon", "v_prediction", "sample"], value="epsilon", label="Predicts", min_width=120
                )
            zero_snr = gr.Checkbox(False, label="Zero terminal SNR")
            names = gr.Dropdown(
                list(PRESETS),
                value=["paper", "uniform"],
                multiselect=True,
                allow_custom_value=True,
                label="Strategies",
                info="Presets, or density+weighting such as logit_normal:mean=0+min_snr",
                elem_id="strategies",
            )
            with gr.Accordion("One of your own", open=False):
                own = gr.Checkbox(False, label="Show it")
                density, density_values, density_chosen = _choice(DENSITIES, "asymmetric", "Density", own)
                weighting, weighting_values, weighting_chosen = _choice(WEIGHTINGS, "change_aware", "Loss weight", own)
                draw = gr.Dropdown(list(DRAWS), value="independent", label="Draws of a batch")
                k = gr.Slider(1, 20, value=5, step=0.5, label="k", buttons=[], info="How much more often before tau")
                r = gr.Slider(2, 1000, value=145, step=1, label="r", buttons=[], info="tau: 1/r of the signal is left")
                lambda_ = gr.Slider(
                    0.5, 1, value=0.6, step=0.01, label="lambda", buttons=[], info="Weights from 1 - lambda to lambda"
                )
            progress = gr.Slider(0, 1, value=0, step=0.01, label="Progress of the training", buttons=[])
        with gr.Column(scale=3, min_width=320):
            coordinate = gr.Radio(
                [("log SNR", "log_snr"), ("Timesteps", "timesteps")],
                value="log_snr",
                label="Over",
                show_label=False,
                container=False,
                elem_id="coordinate",
            )
            charts = gr.HTML(
                html_template='<div class="strategies"></div>',
                js_on_load=DRAW,
                apply_default_css=False,
                elem_id="charts",
            )
            code = gr.Code(language="python", label="paper", interactive=False)
    inputs = [schedule, steps, shift, prediction, zero_snr, names, own, density, density_values, weighting]
    inputs += [weighting_values, draw, k, r, lambda_, progress, coordinate]
    schedule.input(_fitting_controls, schedule, [shift, prediction, zero_snr], show_progress="hidden")
    for control in (draw, density_values, weighting_values, k, r, lambda_):
        control.input(lambda: True, None, own, show_progress="hidden")
    # A density or weighting is shown with parameters of its own, not with those of the one chosen before.
    others = [control.change for control in inputs if control not in (density, weighting)]
    gr.on(
        [app.load, *others],
        show_strategies,
        inputs,
        [charts, code],
        show_progress="hidden",
        trigger_mode="always_last",
        api_name="strategies",
    )
    for chosen in (density_chosen, weighting_chosen):
        chosen.then(show_strategies, inputs, [charts, code], show_progress="hidden", api_name=False)


def _choice(
    registry: Registry[Any], value: str, label: str, own: gr.Checkbox
) -> tuple[gr.Dropdown, gr.Textbox, gr.events.Dependency]:
    """A registered name, a field for its parameters that says what they are, and when a choice has set both."""
    name = label.split()[-1].lower()
    choice = gr.Dropdown(list(registry), value=value, label=label, info=registry[value].summary, elem_id=name)
    values = gr.Textbox(
        "", label=f"Parameters of the {name}", visible=bool(registry[value].parameters), elem_id=f"{name}-values"
    )

    def describe(name: str) -> tuple[Any, Any, bool]:
        entry = registry[name]
        known = "; ".join(map(str, entry.parameters))
        default = ",".join(f"{each.name}={each.default:g}" for each in entry.parameters)
        return (
            gr.update(info=f"{entry.summary} ({entry.reference})"),
            gr.update(value=default, info=known, visible=bool(entry.parameters)),
            True,
        )

    chosen = choice.input(describe, choice, [choice, values, own], show_progress="hidden")
    return choice, values, chosen


def _fitting_controls(schedule: str) -> tuple[Any, Any, Any]:
    """What a noise schedule can be told: a flow has a shift, and one thing to predict."""
    flow = schedule == FLOW
    return gr.update(visible=flow), gr.update(visible=not flow), gr.update(visible=not flow)


def show_strategies(
    schedule: str,
    steps: float | None,
    shift: float | None,
    prediction: str,
    zero_snr: bool,
    names: list[str],
    own: bool,
    density: str,
    density_values: str,
    weighting: str,
    weighting_values: str,
    draw: str,
    k: float,
    r: float,
    lambda_: float,
    progress: float,
    coordinate: str,
) -> tuple[str, Any]:
    """The curves for the page's charts as JSON, and as Python the scheduler of one's own strategy or the first.

    Raises:
        gr.Error: What was asked for does not exist, or not on this noise schedule; in one line.
    """
    numbers = {"speed_k": k, "speed_r": r, "speed_lambda": lambda_} if own else {}
    try:
        host = _host(schedule, steps, shift, prediction, zero_snr)
        scheduler = speed_scheduler(host, **numbers)
        wanted = list(dict.fromkeys(names)) or ["uniform"]
        tables = strategy_tables(scheduler, wanted, progress)
        shown, values = wanted[0], speed_values(wanted[0])
        if own:
            parts = [_written(density, density_values), _written(weighting, weighting_values), draw]
            text = "+".join(parts)
            tables |= {f"{CUSTOM}: {text}": strategy_tables(scheduler, [text], progress)[text]}
            shown, values = text, numbers | speed_values(text)
    except InputError as error:
        raise gr.Error(str(error), title="This cannot be shown", print_exception=False) from error
    curves = strategy_curves(tables, scheduler.speed_areas)
    return json.dumps({"curves": curves, "coordinate": coordinate}), gr.update(
        value=_python(host, values), label=shown
    )


def _host(schedule: str, steps: float | None, shift: float | None, prediction: str, zero_snr: bool) -> Any:
    """The scheduler of diffusers that is asked for."""
    if not steps or not 2 <= steps <= MOST_TIMESTEPS:
        raise InputError(f"Timesteps: {steps} must lie in [2, {MOST_TIMESTEPS:,}].")
    if schedule == FLOW:
        if not shift or shift <= 0:
            raise InputError(f"Shift of the flow: {shift} must be above 0.")
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(steps), shift=shift)
    return DDPMScheduler(
        num_train_timesteps=int(steps),
        beta_schedule=schedule,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
    )


def _written(name: str, values: str) -> str:
    """A choice with its parameters, as the registries read it."""
    return f"{name}:{values.strip()}" if values.strip() else name


def _python(host: Any, values: dict[str, Any]) -> str:
    """The lines of a training loop that change, with the settings of a strategy."""
    plain = type(host)()
    schedule = {key: value for key, value in host.config.items() if value != plain.config.get(key) and key[0] != "_"}
    speed = {key: value for key, value in values.items() if value != SPEED_DEFAULTS.get(key)}
    name = f"SpeeD{type(host).__name__}"
    arguments = "".join(f"\n    {key}={value!r}," for key, value in (schedule | speed).items())
    made = f"{name}({arguments}\n)" if arguments else f"{name}()"
    strategy = speed_scheduler(host, **values).speed_strategy
    progress = ", progress=step / max_train_steps" if strategy.needs_progress else ""
    lines = [
        f"from speed_diffusers import {name}",
        "",
        f"scheduler = {made}",
        "",
        f"timesteps = scheduler.sample_timesteps(len(clean), device=clean.device{progress})",
        "noisy = scheduler.add_noise(clean, noise, timesteps)",
        f"loss = (scheduler.loss_weights(timesteps{progress}) * error).mean()  # error: (batch,)",
    ]
    if strategy.is_loss_aware:
        lines += [
            "",
            "# It learns from the errors, so tell it; of several processes their sums.",
            "zeros = torch.zeros(scheduler.config.num_train_timesteps, device=clean.device)",
            "indices = scheduler.timestep_indices(timesteps)",
            "error_sums = zeros.index_add(0, indices, error.detach())",
            "error_counts = zeros.index_add(0, indices, torch.ones_like(error))",
            "scheduler.update_speed(error_sums, error_counts)",
        ]
    return "\n".join(lines)
