"""Trains a class-conditional DiT with SpeeD and leaves a plain DiTPipeline.

On any laptop, with the images and the autoencoder that the package ships (about five minutes on two CPU cores):

    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml train_scripts/train_dit_speed.py

ImageNet at 256x256 with DiT-XL/2 on the GPUs of one machine:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \
        train_scripts/train_dit_speed.py config=imagenet_256/dit_xl2 output_dir=runs/dit_xl2

Options are key=value or --key value; config=NAME takes a file from train_scripts/configs/. The same command with
resume_from_checkpoint=latest resumes an interrupted run.
"""

import sys
from pathlib import Path

from speed_diffusers.config.command_line import run_script
from speed_diffusers.config.load import load_config
from speed_diffusers.release import push_after_training
from speed_diffusers.training.config import DEFAULT_CONFIG, TrainConfig
from speed_diffusers.training.results import (
    check_images,
    describe_costs,
    describe_plan,
    save_results,
    save_state,
    start_trackers,
    validate,
    validate_missed,
)
from speed_diffusers.training.run import TrainingRun
from speed_diffusers.training.setup import check_inputs, start_run
from speed_diffusers.training.step import training_steps
from speed_diffusers.training.step_log import StepLog
from speed_diffusers.training.stop_request import StopRequest

SCRIPT_DIR = Path(__file__).resolve().parent


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
        if config.check_images and inputs.accelerator.is_main_process:
            print(f"\n{check_images(inputs)}")
        return
    run = start_run(inputs)
    start_trackers(run)
    try:
        with run.ranks.naming_who_is_gone():
            with StopRequest() as stop:
                stopped_by = train(run, stop)
            if stopped_by is None:
                save_results(run)
        if stopped_by is None:
            push_after_training(run)
    finally:
        run.close()
    if stopped_by is not None:
        sys.exit(128 + stopped_by)


def train(run: TrainingRun, stop: StopRequest) -> int | None:
    """Takes every step of a run, and logs, saves, validates and stops between them.

    Returns:
        None, or the number of the signal that stopped it; its state is saved then.
    """
    config = run.config
    with StepLog(run) as log:
        with log.paused():
            validate_missed(run)
        for step in training_steps(run):
            log.add(step)
            if step.is_last or step.done % config.logging_steps == 0:
                log.write(step)
            stopped_by = stop.look(run, step.done)
            with log.paused():
                if stopped_by or config.saves_at(step.done):
                    log.stop_if_not_finite()
                    save_state(run, step.done, log.state_dict())
                if stopped_by:
                    log.close(f"Stopped at step {step.done}; resume with resume_from_checkpoint=latest.")
                    return stopped_by
                if config.validation_steps and step.done % config.validation_steps == 0:
                    validate(run, step.done)
        log.close()
    return None


if __name__ == "__main__":
    run_script(main, __doc__, TrainConfig)
