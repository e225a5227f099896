"""Trains a class-conditional DiT with SpeeD and leaves a plain DiTPipeline.

On any laptop, with the images and the autoencoder that the package ships (about five minutes on two CPU cores):

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml train_scripts/train_dit_speed.py

ImageNet at 256x256 with DiT-XL/2 on the GPUs of one machine:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \
        train_scripts/train_dit_speed.py config=imagenet_256/dit_xl2 output_dir=runs/dit_xl2

Options are key=value or --key value; config=NAME takes a file from train_scripts/configs/. An interrupted run goes on
with the same command and resume_from_checkpoint=latest.
"""

import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import torch

from command_line import run_script
from run_results import describe_costs, describe_plan, save_results, save_state, save_validation_grid, tracker_config
from speed_diffusers.config import load_config
from speed_diffusers.objective import denoising_loss, drop_labels
from speed_diffusers.profiling import labelled
from speed_diffusers.train_config import TrainConfig
from step_log import StepLog
from training_setup import TrainingRun, check_inputs, start_run

SCRIPT_DIR = Path(__file__).resolve().parent
DEFAULT_CONFIG = "quickstart/fashion_mnist"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: list[str]) -> None:
    """Trains as the options say.

    Raises:
        InputError: Wrong options or data; nothing has been written.
    """
    config = load_config(TrainConfig, argv, SCRIPT_DIR, default=DEFAULT_CONFIG)
    inputs = check_inputs(config)
    inputs.accelerator.print(describe_plan(inputs))
    if config.dry_run:
        inputs.accelerator.print(f"\n{describe_costs(inputs)}")
        return
    run = start_run(inputs)
    run.accelerator.init_trackers(config.tracker_project_name, tracker_config(config))
    try:
        with StopRequest() as stop:
            stopped_by = train(run, stop)
        if stopped_by is None:
            save_results(run)
    finally:
        run.accelerator.end_training()
        if run.lock is not None:
            run.lock.release()
    if stopped_by is not None:
        sys.exit(128 + stopped_by)


def train(run: TrainingRun, stop: "StopRequest") -> int | None:
    """The training loop: from the run's first step to its last.

    Returns:
        None, or the number of the signal that stopped it; its state is saved then.
    """
    config, accelerator, model, layout = run.config, run.accelerator, run.model, run.layout
    log = StepLog(run)
    max_norm = config.max_grad_norm if config.max_grad_norm is not None else float("inf")
    batches = run.batches()
    for step in range(run.first_step, config.max_train_steps):
        draws = run.draws(step)
        for micro_step in range(layout.accumulation):
            with labelled("data"):
                batch = next(batches)
            part = draws.part(layout.span(micro_step))
            clean = run.latents(batch, part)
            class_rows = drop_labels(run.labels(batch), part.dropped)
            is_last = micro_step == layout.accumulation - 1
            # Gradients travel between processes once an optimizer step.
            with nullcontext() if is_last else accelerator.no_sync(model):
                with labelled("forward and loss"):
                    result = denoising_loss(
                        model,
                        run.scheduler,
                        clean,
                        class_rows,
                        part.timesteps,
                        part.noise,
                        run.learned_variance,
                        run.progress(step),
                    )
                with labelled("backward"):
                    accelerator.backward(result.loss / layout.accumulation)
            log.add(result, part.timesteps)
            if run.feedback is not None:
                run.feedback.add(part.timesteps, result.squared_error)
        with labelled("gradient norm"):
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
            run.guard.observe(grad_norm, step + 1)
        with labelled("optimizer"):
            run.optimizer.step()
            run.optimizer.zero_grad()
        with labelled("learning rate"):
            run.lr_scheduler.step()
        with labelled("ema"):
            run.ema.update()

        done, is_end = step + 1, step + 1 == config.max_train_steps
        log.advance()
        if run.feedback is not None:
            run.feedback.advance(done, run.summed)
        if is_end or done % config.logging_steps == 0:
            log.write(done, grad_norm)
        if stopped_by := stop.look(run, done):
            log.stop_if_not_finite()
            with log.paused():
                save_state(run, done)
            log.close(f"Stopped at step {done}; go on with resume_from_checkpoint=latest.")
            return stopped_by
        with log.paused():
            if is_end or (config.checkpointing_steps and done % config.checkpointing_steps == 0):
                log.stop_if_not_finite()
                save_state(run, done)
            if config.validation_steps and done % config.validation_steps == 0:
                save_validation_grid(run, done)
    log.close()
    return None


class StopRequest:
    """Notes SIGTERM and Ctrl-C, so that the state is saved before the end; a second signal ends at once.

    A single process stops after the step at hand. Several agree on it every 5 seconds or so, counted in steps, because
    they must stop at the same one.
    """

    SECONDS_BETWEEN_LOOKS = 5.0

    def __init__(self) -> None:
        self.number = 0
        self.next_look = 0
        self.looked_at: tuple[int, float] | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        print("Stopping: the state will be saved within seconds; a second signal ends at once.", file=sys.stderr)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def look(self, run: TrainingRun, done: int) -> int | None:
        """The signal that any process has received, the same on all of them; None if there was none to see yet."""
        if run.accelerator.num_processes == 1:
            return self.number or None
        if done < self.next_look:
            return None
        now = time.monotonic()
        step, time_then = self.looked_at or (done - 1, now)
        self.looked_at = (done, now)
        mine = torch.tensor([[float(self.number), (now - time_then) / (done - step)]], device=run.accelerator.device)
        number, seconds_per_step = run.accelerator.gather(mine).amax(0).tolist()
        # The first look has nothing to measure by, and the second comes with the next step.
        steps = int(self.SECONDS_BETWEEN_LOOKS / seconds_per_step) if seconds_per_step else 1
        self.next_look = done + max(1, steps)
        return int(number) or None


if __name__ == "__main__":
    run_script(main, __doc__, TrainConfig)
