"""What the training loop says while it runs: progress bar, `metrics.jsonl`, trackers, and the time it has taken."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..error_bins import ERRORS_KEY, SAMPLES_KEY, ErrorBins, means_by_bin
from ..reports.training_cost import gpu_of_device, model_flops_utilization
from .guard import describe_images
from .profiling import labelled
from .run import TrainingRun
from .run_folder import METRICS_FILE
from .step import TrainedStep
from .tracking import MetricsFile, tracked_values


class StepLog:
    """Progress bar, `metrics.jsonl` and trackers; asks the device for numbers at logging steps only."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        is_main = run.accelerator.is_main_process
        self.metrics = MetricsFile(run.output_dir / METRICS_FILE, run.first_step) if is_main else None
        # Nothing where it may show: what is given there, TQDM_DISABLE cannot change.
        hidden: dict[str, Any] = {} if is_main else {"disable": True}
        self.progress = tqdm(
            total=run.config.max_train_steps,
            initial=run.first_step,
            desc="Training",
            unit="step",
            **hidden,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        device = run.accelerator.device
        self._gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        # Loss, unweighted MSE, variance term.
        self.sums = torch.zeros(3, device=device)
        self.bins = ErrorBins(run.config.num_train_timesteps, device)
        self._shared: set[int] = set()
        self._marked = time.perf_counter()
        self._start_again()
        if run.log is not None:
            self._load_state_dict(run.log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # So that the line of an error does not stand behind the bar.
        self.progress.close()

    def _start_again(self) -> None:
        self.sums.zero_()
        self.bins.reset()
        self.micro_steps = 0
        self.steps = 0
        self._seconds_then = self.run.seconds

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know of the steps since the last line; every process must call it.

        JSON values: one row of "totals" for each process.
        """
        totals = self.run.accelerator.gather(self._totals()[None])
        return {
            "steps": self.steps,
            "micro_steps": self.micro_steps * self.run.accelerator.num_processes,
            "seconds": self._seconds_then,
            "totals": totals.tolist(),
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        run, mine = self.run, self._totals()
        rows = torch.tensor(state["totals"], device=mine.device)
        if rows.shape[1:] != mine.shape or not state["steps"]:
            return  # of other bins (allow_config_changes), or nothing to add to
        if len(rows) == run.accelerator.num_processes:
            mine = rows[run.accelerator.process_index]
        elif run.accelerator.is_main_process:
            mine = rows.sum(0)
        self.steps = state["steps"]
        self.micro_steps = self.steps * run.layout.accumulation
        self._seconds_then = state["seconds"]
        # Means of batches, of which a step may have more or fewer now.
        batches = self.micro_steps * run.accelerator.num_processes
        self.sums.copy_(mine[: len(self.sums)] * (batches / state["micro_steps"]))
        self.bins.totals.copy_(mine[len(self.sums) :].view_as(self.bins.totals))

    def _totals(self) -> Tensor:
        return torch.cat((self.sums, self.bins.totals.flatten()))

    def _mark(self) -> None:
        """Counts the time since the last mark as training."""
        now = time.perf_counter()
        self.run.seconds += now - self._marked
        self._marked = now

    @labelled("logging")
    def add(self, step: TrainedStep) -> None:
        """Takes in the losses of a step without waiting for them."""
        for micro_step in step.micro_steps:
            result = micro_step.result
            bits = result.squared_error.new_zeros(()) if result.variance_bits is None else result.variance_bits.mean()
            self.sums += torch.stack((result.loss, result.squared_error.mean(), bits))
            self.bins.add(self.run.scheduler.timestep_indices(micro_step.timesteps), result.squared_error)
        self.micro_steps += len(step.micro_steps)
        self.steps += 1
        self.progress.update()

    @labelled("logging")
    def write(self, step: TrainedStep) -> None:
        """Averages over all processes since the last call and reports; stops on gradients that were not finite."""
        run, done = self.run, step.done
        self.stop_if_not_finite()
        self.share_bad_images()
        # One reduction and one copy to the host: means, then the bins' sums and counts.
        totals = torch.cat((self.sums / self.micro_steps / run.accelerator.num_processes, self.bins.totals.flatten()))
        loss, squared_error, bits, *binned = run.summed(totals).tolist()
        self._mark()
        images_seen = done * run.layout.global_batch
        values = {"loss": loss, "squared_error": squared_error}
        if run.learned_variance is not None:
            values["variance_bits"] = bits
        values |= {
            "learning_rate": run.lr_scheduler.get_last_lr()[0],
            "grad_norm": float(step.grad_norm),
            "epoch": images_seen / len(run.source),
            "images_seen": images_seen,
            "images_per_second": self.steps * run.layout.global_batch / (run.seconds - self._seconds_then),
            "seconds": run.seconds,
        }
        mfu = self._utilization(values["images_per_second"])
        if mfu is not None:
            values["mfu"] = mfu
        bins = len(binned) // 2
        errors, counts = means_by_bin(binned[:bins], binned[bins:]), [int(count) for count in binned[bins:]]
        line = {"step": done, **values, ERRORS_KEY: errors, SAMPLES_KEY: counts}
        if self.metrics is not None:
            self.metrics.write(line)
        run.trackers.log(tracked_values(line, run.config.num_train_timesteps), done)
        shown = {"loss": f"{loss:.4f}", "images/s": f"{values['images_per_second']:,.0f}"}
        self.progress.set_postfix(shown | ({} if mfu is None else {"MFU": f"{mfu:.1%}"}), refresh=False)
        self._start_again()

    def _utilization(self, images_per_second: float) -> float | None:
        """Share of the devices' peak that the training reaches; None where the peak is not known."""
        run = self.run
        bf16 = run.accelerator.mixed_precision == "bf16"
        if self._gpu is None or not (bf16 or run.config.allow_tf32):
            return None
        each = images_per_second / run.layout.processes
        config = run.core.transformer.config
        return model_flops_utilization(config, each, self._gpu, precision="bf16" if bf16 else "tf32")

    def share_bad_images(self) -> None:
        """Tells every process which images the others could not read, and lists them in the folder of the run.

        Raises:
            InputError: In every process: they are too many.
        """
        run = self.run
        if run.config.cache_latents:
            return  # all were known before the first step
        new = [image for image in run.bad_images if image.row not in self._shared]
        if gathered := gather_object(new):
            self._shared |= {image.row for image in gathered}
            run.bad_images.add(gathered)
            if run.accelerator.is_main_process:
                run.bad_images.save()

    def stop_if_not_finite(self) -> None:
        """Ends a run whose gradients were not finite, before anything of it is saved.

        Raises:
            FloatingPointError: With the step, and the images whose losses were not finite, by rank and timestep.
        """
        guard, accelerator = self.run.guard, self.run.accelerator
        failed_step = guard.failed_step()
        if failed_step is not None:
            self.close()
            # All processes have seen the same norm, so all of them come here.
            timesteps, losses = accelerator.gather(guard.images_of(failed_step)[None]).cpu().unbind(1)
            raise FloatingPointError(
                f"The gradients of step {failed_step} are not finite; nothing was applied from then on. "
                f"{describe_images(timesteps, losses)} Resume from the last checkpoint with a lower learning_rate or "
                "max_grad_norm=1."
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within does not count as training."""
        self._mark()
        yield
        self._marked = time.perf_counter()

    def close(self, message: str | None = None) -> None:
        """Ends the progress bar, with a word on the images that could not be read and a last one."""
        self.progress.close()
        if self.run.bad_images and self.run.accelerator.is_main_process:
            self.run.bad_images.save()
            print(self.run.bad_images.summary())
        if message:
            self.run.accelerator.print(message)
